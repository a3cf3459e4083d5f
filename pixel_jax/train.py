"""`pixel-jax sft --config=...` and `pixel-jax rl --config=...`: a model directory and a file of examples in, a model out."""

import collections
import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from absl import flags

from pixel_jax.config import define_flag, load, positive
from pixel_jax.data.digests import Digests, digest_model, digest_rows
from pixel_jax.data.example import Report
from pixel_jax.data.limits import Limits
from pixel_jax.data.rooms import prompt_shape
from pixel_jax.data.shapes import BatchShape, Measured, bucket_shapes, training_work
from pixel_jax.identity import nest
from pixel_jax.named import digest, is_name
from pixel_jax.rollout.config import RolloutConfig
from pixel_jax.rollout.limits import FILE, SHOWN, differences, read_limits
from pixel_jax.run_lock import hold
from pixel_jax.state_files import write_json
from pixel_jax.tools.named import DEFAULT, find_format, find_tools
from pixel_jax.training.rl import RLConfig
from pixel_jax.training.sft import SFTConfig
from pixel_jax.training.watch import Criterion, Look, WatchConfig

FLAGS = flags.FLAGS
# In a run's directory: all its settings (config.json is what a model has), and what was read.
CONFIG, DATA = "settings.json", "data.json"
# Shapes by hand come together: those of all rows, and those of rows about videos.
BY_HAND = {
    "sft": (("trace_tokens", "trace_frames", "trace_patches"), ("video_frames", "video_patches")),
    "rl": (("canvas", "prompt_width"), ("video_canvas", "video_prompt_width")),
}
SETTINGS = "pixel_jax.train:TrainConfig"  # whose fields `--help` lists


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Adapters (`pixel_jax.models.lora.add_lora`); a phase trains them alone if its `trainable` is ".*lora_"."""

    rank: int  # of the two factors
    alpha: float  # they are scaled by alpha / rank
    targets: str  # regular expression, the linear layers that get one

    def __post_init__(self):
        positive(self, "rank", "alpha")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One experiment. A file under `configs/` makes one; any field can be set as `--config.FIELD=VALUE`."""

    model: str  # directory to start from
    data: str  # a file of one's own, a released one, or a prepared directory (`pixel_jax.data.read`)
    out: str  # run directory: checkpoints, metrics, what was looked at, the page of the run, and at the end the model
    data_eval: str | None = (
        None  # examples that the run is judged by, in the format of `data`; None: `watch.share` of these
    )
    image_folders: tuple[
        str, ...
    ] = ()  # where else than beside the data images may lie: ("/",) allows all that it names
    # What data of one's own calls our fields, as in {"question": "prompt", "images": "image"} (`pixel_jax.data.own`).
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    sft: SFTConfig | None = None
    rl: RLConfig | None = None
    architecture: str | None = None  # name of a released network (`pixel_jax.models.released`), for planning without it
    lora: LoRAConfig | None = None
    tools: tuple[str, ...] = (
        DEFAULT  # what a model may call: names of shipped ones, or module:name (`pixel_jax.tools.named`)
    )
    corrections: bool = True  # tune on traces that show a mistake, too
    rollout: RolloutConfig = RolloutConfig()  # limits and pixel budgets of traces; `rl.rollout` has those of rollouts
    # Axis sizes of data, fsdp, sequence, tensor; -1 takes the devices that are left. None: one device.
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    # The same for rollouts, which may lie otherwise on the same devices; none: as above.
    rollout_mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    bad_rows: Literal["error", "drop"] = "error"  # "drop" leaves out what cannot be read or has no room, and counts it
    limits: Limits = Limits()  # of the size of a picture, and of the memory that reading takes in a process
    read_threads: int = 16  # that read and decode files
    read_ahead: int = 32  # rows (of prompts or packed traces) whose pixels wait in memory
    # Shapes of batches. None: worked out from the data. By hand, for tuning: the room of a row of one or more traces.
    trace_tokens: int | None = None
    trace_frames: int | None = None  # room for pictures in a row: images, frames and crops
    trace_patches: int | None = None  # of one frame
    buckets: tuple[int, ...] = ()  # shorter rows for shorter traces, in tokens: a compilation and less padding for each
    video_frames: int | None = (
        None  # room of a row of traces that need more frames than `trace_frames`; None: there are none
    )
    video_patches: int | None = None  # of one frame of such a row
    # By hand, for reinforcement learning: images of a prompt, and the largest one's height and width.
    canvas: tuple[int, int, int] | None = None
    prompt_width: int | None = None  # tokens of a prompt
    # Of questions about videos, if they have shapes of their own: frames, and their height and width. None: as above.
    video_canvas: tuple[int, int, int] | None = None
    video_prompt_width: int | None = None  # tokens of a prompt with a video
    seed: int = 0  # of the order of the examples and of new adapters
    watch: WatchConfig = WatchConfig()  # what is looked at while the run goes on
    save_model_every: int = (
        0  # steps (rl: iterations): a model in `out`/models/STEP; 0: only the last one, in `out`/model
    )
    # The model of the look that was best, in `out`/best: the highest accuracy or the lowest loss on what is held out.
    keep_best: Criterion | None = None
    # Of the weights of the model that is saved. None: that of the model it began with, as its files have it.
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def __post_init__(self):
        positive(self, "read_threads", "read_ahead", *BY_HAND["sft"][0], *BY_HAND["sft"][1], "prompt_width")
        positive(self, "video_prompt_width")
        if self.save_model_every < 0:
            raise ValueError(f"save_model_every must not be negative: {self.save_model_every}")
        for name in ("canvas", "video_canvas"):
            if (room := getattr(self, name)) is not None and min(room) < 1:
                raise ValueError(f"{name} is (pictures, height, width), all positive: {room}")
        for together, more in BY_HAND.values():
            for names in (together, more):
                given = [name for name in names if getattr(self, name) is not None]
                if given and len(given) < len(names):
                    raise ValueError(
                        f"{', '.join(names)} come together, or none of them: only {', '.join(given)} is given"
                    )
                if given and names is more and getattr(self, together[0]) is None:
                    raise ValueError(f"{given[0]} needs {', '.join(together)}, too")
        if self.buckets and self.trace_tokens is None:
            raise ValueError(
                f"buckets {self.buckets} need {', '.join(BY_HAND['sft'][0])}, too: shapes are by hand, or worked out"
            )
        for name in ("model", "data", "out"):
            if "://" in getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)!r}: files are local; mount what is elsewhere")

    @property
    def trace_shapes(self) -> tuple[BatchShape, ...] | None:
        """Of rows to tune on; None: they are worked out."""
        if self.trace_tokens is None:
            return None
        shape = lambda frames, patches: BatchShape(self.trace_tokens, frames, frames, patches)
        shapes = bucket_shapes(self.buckets, shape(self.trace_frames, self.trace_patches))
        return shapes if self.video_frames is None else (*shapes, shape(self.video_frames, self.video_patches))

    @property
    def prompt_shapes(self) -> tuple[BatchShape, ...] | None:
        """Of prompts for `rl`; None: they are worked out."""
        if self.canvas is None:
            return None
        limits, video_canvas = self.rl.rollout, self.video_canvas or self.canvas
        return (
            prompt_shape(*self.canvas, self.prompt_width, limits, video=False),
            prompt_shape(*video_canvas, self.video_prompt_width or self.prompt_width, limits, video=True),
        )


def define_flags(command: str) -> None:
    define_flag(None, "The experiment: a file, or a name as pixel/own_data.")
    flags.mark_flag_as_required("config")
    flags.DEFINE_bool(
        "resume_changed", False, "Go on with a run although its settings or data have changed; its history says which."
    )


def main(command: str, arguments: list[str]) -> None:
    from pixel_jax.cli import UserError

    if arguments:
        raise UserError(f"unexpected argument {arguments[0]!r}; settings are given as --config.NAME=VALUE")
    config = load(TrainConfig, FLAGS.config)
    if getattr(config, command) is None:
        raise UserError(f"the config has no section {command!r}")

    from pixel_jax.parallel.processes import first, join, together
    from pixel_jax.training.preemption import NOTICE

    NOTICE.listen()
    join()
    with together(), hold(config.out, first()):
        train(command, config, resume_changed=FLAGS.resume_changed)


def facts_of(command: str, config: TrainConfig, examples: Sequence, digests: Digests) -> dict[str, Any]:
    """What a run is besides its phase's section, which the phase itself adds."""
    settings = {name: x for name, x in dataclasses.asdict(config).items() if name not in ("sft", "rl")}
    rows = {f"data.{name}": x for name, x in digest_rows(examples, digests).items()}
    limits, terms = config.rollout, ()
    if command == "rl":
        limits, terms = config.rl.rollout, [name for name, _ in config.rl.reward.terms]
    # Other code of one's own is another experiment.
    code = {name: digest(name) for name in (*config.tools, limits.call_format, *terms) if is_name(name)}
    return {"command": command, **settings, **digest_model(config.model, digests), **rows, "code": code}


def recorded(settings: Mapping[str, Any]) -> tuple[str, TrainConfig]:
    """The command and the config of a run, from what it noted of itself (`facts_of`, by dotted names)."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    own = {name: x for name, x in settings.items() if name in names or name.split(".")[0] in names - {"data"}}
    if settings.get("command") not in ("sft", "rl"):
        raise ValueError("the run was not begun by `pixel-jax sft` or `pixel-jax rl`")
    return settings["command"], load(TrainConfig, nest(own))


def train(command: str, config: TrainConfig, *, resume_changed: bool = False) -> None:
    """One phase, in as many processes as have joined."""
    import jax

    from pixel_jax import from_pretrained
    from pixel_jax.cli import UserError
    from pixel_jax.data.limits import use_limits
    from pixel_jax.data.packed import Packing
    from pixel_jax.data.questions import find_rooms, question_batches, rooms_of
    from pixel_jax.data.read import read_examples
    from pixel_jax.dialog.tokenizer import Vocabulary
    from pixel_jax.export import write_model
    from pixel_jax.models.io import dtype_of
    from pixel_jax.models.lora import add_lora
    from pixel_jax.models.released import check_architecture
    from pixel_jax.parallel import make_mesh, share
    from pixel_jax.parallel.memory import PICTURES, device_memory
    from pixel_jax.parallel.processes import first, say
    from pixel_jax.parallel.sharding import row_parts
    from pixel_jax.rollout.prompts import tables
    from pixel_jax.rollout.rollout import host_rollouts, rollout
    from pixel_jax.run_page import draw_run
    from pixel_jax.training.loop import Identity
    from pixel_jax.training.progress import announce_compiles, use_compilation_cache
    from pixel_jax.training.rewards import Rewards
    from pixel_jax.training.rl import rl
    from pixel_jax.training.sft import sft
    from pixel_jax.training.stages import Stages, collect_on_host
    from pixel_jax.training.watch import Watch
    from pixel_jax.watching import Setting, hold_out

    out = pathlib.Path(config.out)
    (out / command).mkdir(parents=True, exist_ok=True)
    if first():
        write_json(out / CONFIG, dataclasses.asdict(config))
    use_limits(config.limits)
    limits = config.rollout if command == "sft" else config.rl.rollout
    tools, calls = find_tools(config.tools), find_format(limits.call_format)
    examples, report = read_examples(
        config.data,
        turns=command == "sft",
        drop=config.bad_rows == "drop",
        image_folders=config.image_folders,
        columns=config.columns,
    )
    facts: dict[str, Any] = {}
    if first():
        announce_compiles()
    with Digests(out / "digests.json") if first() else contextlib.nullcontext() as digests:
        if first():
            facts = facts_of(command, config, examples, digests)
        examples, judging, places = found = hold_out(
            examples,
            config.data_eval,
            config.watch,
            out / command,
            digests,
            seed=config.seed,
            turns=command == "sft",
            image_folders=config.image_folders,
        )
    facts |= {"data.held_out": places} if places else {}
    pause("the data is read")
    identity = Identity(facts, resume_changed)
    use_compilation_cache(out / "compiled")
    mesh = make_mesh(config.mesh) if config.mesh else None
    rollout_mesh = make_mesh(config.rollout_mesh) if config.rollout_mesh else None
    part = share(mesh)
    if mesh is None and jax.process_count() > 1:
        raise UserError(f"{jax.process_count()} processes have joined, but config.mesh is empty: one device")
    model, processor = from_pretrained(config.model, mesh=mesh)
    if processor is None:
        raise UserError(f"{config.model} has no tokenizer")
    pause("the model is read")
    dtype = config.dtype or dtype_of(model)
    if config.architecture is not None:
        check_architecture(model, config.architecture, config.model)
    if config.lora is not None:
        model = add_lora(model, jax.random.key(config.seed), **dataclasses.asdict(config.lora))
    vocabulary = Vocabulary.of(processor.tokenizer)
    token_tables = tables(vocabulary, tools, calls)
    memory = device_memory() // PICTURES * (1 if mesh is None else row_parts(mesh))
    measured = lambda rows: Measured(training_work(model.config), rows, memory // rows)
    with host_rollouts(config.tools, tools, vocabulary) as rollouts:
        setting = Setting(
            config, vocabulary, token_tables, measured(config.watch.batch), mesh, rollout_mesh, rollouts or rollout
        )
        kept = {"directory": out / command, "identity": identity, "mesh": mesh}
        adapters = config.lora is not None

        def watch(steps: int, look: Look | None, limits: RolloutConfig) -> Watch:
            save = lambda state, where: write_model(
                state.model, processor, where, dtype, adapters=adapters, limits=limits
            )
            return Watch(
                config.watch,
                out / command,
                steps,
                vocabulary,
                look=look,
                save=save,
                save_every=config.save_model_every,
                best=config.keep_best,
                draw=lambda: draw_run(out),
            )

        process = {"process_index": part.index, "process_count": part.count}
        reading = {"threads": config.read_threads, "ahead": config.read_ahead}

        if command == "sft":
            if not config.corrections:
                without = lambda rows: [
                    x for x in rows if all(learned for turn in x.turns for _, learned in turn.parts)
                ]
                examples, judging = without(examples), without(judging)
            packing = Packing(
                examples,
                vocabulary,
                token_tables,
                limits,
                config.trace_shapes or tuned_by(config.sft, model.config, mesh),
                size=config.sft.batch_size,
                seed=config.seed,
                report=report,
            )
            epoch = packing.epoch
            steps = config.sft.updates(epoch)
            course = f"{steps} steps of {config.sft.batch_size} rows make {steps / epoch:.3g} epochs"
            if epoch < 1:
                course += (
                    f", each trace {1 / epoch:.3g} times a step: fewer config.sft.batch_size teach as much in less time"
                )
            announce(out, report, str(found), f"{len(packing.examples)} traces; {packing}; {course}")
            data = packing.batches(**process, **reading)
            look = setting.of_tuning(judging, packing) if judging else None
            pause("the data is written out")
            model = sft(model, data, config.sft, epoch=epoch, watch=watch(steps, look, limits), **kept)
        else:
            for line in other_limits(config):
                say(line)
            by = config.prompt_shapes or measured(config.rl.prompts)
            asked = find_rooms(examples, by, vocabulary, limits, report, tools)
            course = course_of(config.rl, collections.Counter(x.room for x in asked))
            announce(out, report, str(found), f"{course}; {rooms_of(asked)}")
            data = question_batches(
                asked,
                vocabulary,
                token_tables,
                limits,
                size=config.rl.prompts,
                seed=config.seed,
                **process,
                **reading,
            )
            decode = lambda ids: vocabulary.to_bytes(ids).decode("utf-8", "replace")
            look = setting.of_learning(judging, list(dict.fromkeys(x.room for x in asked))) if judging else None
            watching = watch(config.rl.iterations, look, limits)
            stages = Stages(Rewards.of(config.rl.reward, decode), advantages=watching.advantages)
            pause("the data is written out")
            if rollouts is not None:
                stages = dataclasses.replace(stages, collect=functools.partial(collect_on_host, rollouts))
            model = rl(model, data, stages, config.rl, rollout_mesh=rollout_mesh, watch=watching, **kept)
        write_model(model, processor, out / "model", dtype, adapters=adapters, limits=limits)
    if first():
        draw_run(out)
    say(f"The model is in {out / 'model'}.")


def tuned_by(config: SFTConfig, network, mesh) -> Measured:
    """By what the shapes of rows to tune on are worked out."""
    from pixel_jax.parallel.memory import device_memory
    from pixel_jax.parallel.sharding import sequence_parts
    from pixel_jax.training.footprint import row_bytes

    parts, width = sequence_parts(mesh), 2 if config.forward.compute_dtype == "bfloat16" else 4

    def takes(shape: BatchShape) -> int:
        shown = (shape.slices, shape.patches)
        return row_bytes(network, shape.tokens // parts, shown, width=width, remat=bool(config.forward.remat))

    return Measured(training_work(network), config.batch_size, device_memory(), takes)


def pause(place: str) -> None:
    """Between two things that take long: processes wait for one another, and a run that is told to go does."""
    from pixel_jax.parallel.processes import meet, say
    from pixel_jax.training.preemption import NOTICE, Preempted

    meet(place)
    if NOTICE.reached():
        say("told to go before the first step; what was done before is saved. Started again, the run goes on.")
        raise Preempted


def course_of(config: RLConfig, rooms: Mapping[Any, int]) -> str:
    """How often the questions are asked; `rooms` has their number by room, of which an iteration takes one."""
    count, iterations = sum(rooms.values()), config.iterations
    epochs = iterations * config.prompts / count
    said = f"{count} questions; {iterations} iterations of {config.prompts} prompts make {epochs:.3g} epochs"
    if (times := config.prompts / min(rooms.values())) > 1:
        each = "each question" if len(rooms) == 1 else "a question of the rarest shape"
        said += f", {each} {times:.4g} times an iteration: more questions or fewer config.rl.prompts teach more"
    return said


def other_limits(config: TrainConfig) -> list[str]:
    """Which limits `rl` goes by where others are given: those beside the model, or `config.rollout`, which is tuning's."""
    used, usual = config.rl.rollout, RolloutConfig()
    asked = [field.name for field in dataclasses.fields(usual)]
    asked = [name for name in asked if getattr(config.rollout, name) != getattr(usual, name)]
    kept = read_limits(config.model) or used
    others = {
        f"{pathlib.Path(config.model) / FILE}": differences(used, kept, SHOWN),
        "config.rollout, which is of tuning": differences(used, config.rollout, asked),
    }
    return [
        f"rl goes by config.rl.rollout.{name}={mine!r}, not by the {other!r} of {where}"
        for where, found in others.items()
        for name, (mine, other) in found.items()
    ]


def announce(out: pathlib.Path, report: Report, judged_by: str, data: str) -> None:
    """Says what was read and what was not, and notes it in `data.json`."""
    from pixel_jax.parallel.processes import first, say

    say("\n".join(filter(None, [str(report), f"{report.source}: {data}; {judged_by}"])))
    if first():
        left_out = {"dropped": report.dropped, "mended": dict(report.mended)}
        write_json(out / DATA, {"source": report.source, "data": data, "judged_by": judged_by, **left_out})
