"""`pixel-jax sft --config=...` and `pixel-jax rl --config=...`: a model directory and a file of examples in, a model out."""

import collections
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from absl import flags

from pixel_jax.config import define_flag, load, positive
from pixel_jax.data.digests import Digests, digest_model, digest_rows
from pixel_jax.data.limits import Limits
from pixel_jax.identity import nest
from pixel_jax.rollout.config import RolloutConfig
from pixel_jax.rollout.limits import FILE, SHOWN, differences, read_limits, write_limits
from pixel_jax.run_lock import hold
from pixel_jax.tools.named import DEFAULT, find_format, find_tools
from pixel_jax.training.rl import RLConfig
from pixel_jax.training.sft import SFTConfig

FLAGS = flags.FLAGS
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
    out: str  # run directory: checkpoints, metrics, and at the end the model
    image_folders: tuple[
        str, ...
    ] = ()  # where else than beside the data images may lie: ("/",) allows all that it names
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
    trace_tokens: int = 4096  # room of a row of one or more traces
    trace_frames: int = 6  # room for pictures in a row: images, frames and crops
    trace_patches: int = 8000  # of one frame
    buckets: tuple[int, ...] = ()  # shorter rows for shorter traces, in tokens: a compilation and less padding for each
    video_frames: int = 0  # room of a row of traces that need more frames than `trace_frames`; 0: there are none
    video_patches: int = 4800  # of one frame of such a row
    prompt_width: int = 3072  # tokens
    canvas: tuple[int, int, int] = (1, 2048, 2048)  # images of a prompt, and the largest one's height and width
    # Of questions about videos, if they have shapes of their own; batches are then of one kind. None: as above.
    video_prompt_width: int | None = None
    video_canvas: tuple[int, int, int] | None = None  # frames of a video, and the largest one's height and width
    seed: int = 0  # of the order of the examples and of new adapters
    # Of the weights of the model that is saved. None: that of the model it began with, as its files have it.
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def __post_init__(self):
        positive(self, "read_threads", "read_ahead", "trace_tokens", "trace_frames", "trace_patches", "video_patches")
        positive(self, "prompt_width", "video_prompt_width")
        if self.video_frames < 0:
            raise ValueError(f"video_frames must not be negative: {self.video_frames}")
        for name in ("canvas", "video_canvas"):
            if (room := getattr(self, name)) is not None and min(room) < 1:
                raise ValueError(f"{name} is (pictures, height, width), all positive: {room}")
        for name in ("model", "data", "out"):
            if "://" in getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)!r}: files are local; mount what is elsewhere")
        if (self.video_canvas is None) != (self.video_prompt_width is None):
            raise ValueError(
                f"video_canvas {self.video_canvas} and video_prompt_width {self.video_prompt_width} come together"
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
    return {"command": command, **settings, **digest_model(config.model, digests), **rows}


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

    from pixel_jax import from_pretrained, save_pretrained
    from pixel_jax.cli import UserError
    from pixel_jax.data.limits import use_limits
    from pixel_jax.data.packed import Packing, bucket_shapes
    from pixel_jax.data.questions import find_rooms, question_batches
    from pixel_jax.data.read import read_examples
    from pixel_jax.data.rooms import Room
    from pixel_jax.data.traces import Shape
    from pixel_jax.dialog.tokenizer import Vocabulary
    from pixel_jax.models.io import dtype_of
    from pixel_jax.models.lora import add_lora, merge_lora
    from pixel_jax.models.released import check_architecture
    from pixel_jax.parallel import make_mesh, share
    from pixel_jax.parallel.processes import first, say
    from pixel_jax.rollout.prompts import tables
    from pixel_jax.rollout.rollout import host_rollouts
    from pixel_jax.training.progress import announce_compiles, use_compilation_cache
    from pixel_jax.training.rl import rl, text_score
    from pixel_jax.training.sft import sft

    out = pathlib.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    use_limits(config.limits)
    tools = find_tools(config.tools)
    calls = find_format((config.rollout if command == "sft" else config.rl.rollout).call_format)
    examples, report = read_examples(
        config.data,
        turns=command == "sft",
        drop=config.bad_rows == "drop",
        image_folders=config.image_folders,
    )
    facts = {}
    if first():
        announce_compiles()
        with Digests(out / "digests.json") as digests:
            facts = facts_of(command, config, examples, digests)
    pause("the data is read")
    held = {"facts": facts, "resume_changed": resume_changed}
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
    process = {"process_index": part.index, "process_count": part.count}
    reading = {"threads": config.read_threads, "ahead": config.read_ahead}

    if command == "sft":
        if not config.corrections:
            examples = [x for x in examples if all(learned for turn in x.turns for _, learned in turn.parts)]
        limits = config.rollout
        shape = lambda frames, patches: Shape(config.trace_tokens, frames, frames, patches)
        buckets = bucket_shapes(config.buckets, shape(config.trace_frames, config.trace_patches))
        if config.video_frames:
            buckets += (shape(config.video_frames, config.video_patches),)
        packing = Packing(
            examples,
            vocabulary,
            token_tables,
            limits,
            buckets,
            size=config.sft.batch_size,
            seed=config.seed,
            report=report,
        )
        epoch = packing.epoch
        steps = config.sft.updates(epoch)
        course = f"{steps} steps of {config.sft.batch_size} rows make {steps / epoch:.3g} epochs"
        say(announcement(report, f"{len(packing.examples)} traces; {packing}; {course}"))
        data = packing.batches(**process, **reading)
        pause("the data is written out")
        model = sft(model, data, config.sft, directory=out / "sft", mesh=mesh, epoch=epoch, **held)
    else:
        limits = config.rl.rollout
        for line in other_limits(config):
            say(line)
        room = Room(*config.canvas, config.prompt_width)
        video_room = config.video_canvas and Room(*config.video_canvas, config.video_prompt_width)
        asked = find_rooms(examples, room, video_room, vocabulary, limits, report, tools)
        say(announcement(report, course_of(config.rl, collections.Counter(x.room for x in asked))))
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
        score = text_score(decode, config.rl.reward)
        pause("the data is written out")
        with host_rollouts(config.tools, tools, vocabulary) as rollouts:
            held |= {"mesh": mesh, "rollout_mesh": rollout_mesh, "rollouts": rollouts}
            model = rl(model, data, score, config.rl, directory=out / "rl", **held)
    save_pretrained(model if config.lora is None else merge_lora(model, dtype), processor, out / "model", dtype)
    if first():
        write_limits(out / "model", limits)
    say(f"The model is in {out / 'model'}.")


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


def announcement(report, data: str) -> str:
    """What was read and what was not."""
    return "\n".join(filter(None, [str(report), f"{report.source}: {data}"]))
