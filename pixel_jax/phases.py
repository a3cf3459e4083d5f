"""The phases `pixel-jax sft` and `pixel-jax rl`: they read data and a model, train, and write a model."""

import collections
import contextlib
import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh

from pixel_jax import from_pretrained
from pixel_jax.cli import UserError
from pixel_jax.data.batches import Batches
from pixel_jax.data.digests import Digests
from pixel_jax.data.example import Example, ReadReport
from pixel_jax.data.limits import use_limits
from pixel_jax.data.packed import PackedRow, Packing
from pixel_jax.data.questions import ShapedQuestion, assign_shapes, describe_shapes, question_batches
from pixel_jax.data.read import read_examples
from pixel_jax.data.shapes import AutoShapes, training_work
from pixel_jax.dialog.grammar import Language
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.export import write_model
from pixel_jax.identity import read_settings
from pixel_jax.models.checkpoint import named_weights
from pixel_jax.models.config import ModelConfig
from pixel_jax.models.io import dtype_of, read_network
from pixel_jax.models.layers import LoRAWeight
from pixel_jax.models.lora import add_lora
from pixel_jax.models.peft import FOLDER
from pixel_jax.models.released import check_architecture
from pixel_jax.parallel import make_mesh, process_shard
from pixel_jax.parallel.memory import PICTURES_DIVISOR, device_memory
from pixel_jax.parallel.processes import among, barrier, is_main_process, say, waiting
from pixel_jax.parallel.sharding import row_shards, sequence_shards
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.limits import VIEW_FIELDS, differences, limits_file, read_limits
from pixel_jax.rollouts.prompts import tables
from pixel_jax.rollouts.rollout import HostRollouts, host_rollouts, rollout
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.rollouts.trajectory import Tables
from pixel_jax.run_page import draw_run
from pixel_jax.run_record import record_run
from pixel_jax.state_files import write_json
from pixel_jax.tools.named import find_format, find_tools
from pixel_jax.train_config import CONFIG, DATA, TrainConfig, run_settings
from pixel_jax.training.cost import row_bytes
from pixel_jax.training.looks import Sampling
from pixel_jax.training.loop import Identity
from pixel_jax.training.preemption import NOTICE, Preempted
from pixel_jax.training.progress import announce_compiles, use_compilation_cache
from pixel_jax.training.rewards import Rewards
from pixel_jax.training.rl import RLConfig, questions_shard, rl
from pixel_jax.training.sft import SFTConfig, sft
from pixel_jax.training.stages import Stages, collect_on_host
from pixel_jax.training.state import are_apart
from pixel_jax.training.watch import Look, Watch
from pixel_jax.training.writers import read_metrics
from pixel_jax.watching import HeldOutLooks, hold_out


class PhaseData(NamedTuple):
    """The examples of a phase."""

    examples: Sequence[Example]  # to train on
    held_out: Sequence[Example]  # to evaluate the run on
    about_held_out: str  # a sentence about `held_out`
    report: ReadReport
    identity: Identity  # of the run


Command = Literal["sft", "rl"]


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase that is about to begin: its settings, and what was read for it."""

    command: Command
    config: TrainConfig
    data: PhaseData
    network: ModelConfig
    dtype: str  # of the weights that are saved
    processor: Any
    mesh: Mesh | None
    tables: Tables  # of the tokenizer and the tools
    rollouts: HostRollouts | None  # None: no tool runs on the host

    @property
    def limits(self) -> RolloutConfig:
        """The limits that are written beside the model."""
        return limits_of(self.command, self.config)

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The token ids of the processor's tokenizer."""
        return Vocabulary.of(self.processor.tokenizer)

    @functools.cached_property
    def packing(self) -> Packing:
        """The traces of tuning as packed rows."""
        config, section = self.config, self.config.tuning
        return Packing(
            self.data.examples,
            self.vocabulary,
            self.tables,
            self.limits,
            config.trace_shapes or tuning_shapes(section, self.network, self.mesh),
            size=section.batch_size,
            seed=config.seed,
            report=self.data.report,
        )

    @functools.cached_property
    def questions(self) -> list[ShapedQuestion]:
        """The questions of reinforcement learning."""
        shapes = self.config.prompt_shapes or self.auto_shapes(self.config.learning.prompts)
        data = self.data
        return assign_shapes(data.examples, shapes, self.vocabulary, self.limits, data.report, self.tables.tools)

    @functools.cached_property
    def question_batches(self) -> Batches:
        """The batches of `questions`."""
        size, seed = self.config.learning.prompts, self.config.seed
        return question_batches(
            self.questions, self.vocabulary, self.tables, self.limits, size=size, seed=seed, **self.reader_options
        )

    @property
    def rollout_mesh(self) -> Mesh | None:
        """The mesh of rollouts; None: the mesh of training. Rows are written ahead by the devices behind those of training."""
        shape = self.config.rollout_mesh
        if self.ahead and (self.mesh is None or not shape):
            raise UserError(
                f"config.rl.staleness is {self.config.learning.staleness}: rollouts need devices of their own; set "
                "config.mesh and config.rollout_mesh"
            )
        if not shape:
            return None
        devices = jax.devices()[self.mesh.size :] if self.ahead and self.mesh is not None else jax.devices()
        if not devices:
            raise UserError(
                f"config.mesh {dict(self.config.mesh)} has all {len(jax.devices())} devices, and config.rl.staleness needs some "
                "for config.rollout_mesh: make config.mesh smaller"
            )
        mesh = make_mesh(shape, devices)
        try:
            are_apart(self.mesh, mesh)
        except ValueError as error:
            raise UserError(f"config.mesh and config.rollout_mesh: {error}") from error
        return mesh

    @property
    def trains(self) -> bool:
        """Whether this process has a part in training; with `staleness`, rollouts can have processes of their own."""
        return self.mesh is None or bool(self.mesh.local_devices)

    @property
    def ahead(self) -> bool:
        """Whether rows are written ahead, by devices of their own."""
        return self.config.rl is not None and self.command == "rl" and self.config.learning.staleness > 0

    @property
    def run_options(self) -> dict[str, Any]:
        """The arguments of `sft` and `rl` that say where checkpoints and metrics go, and which run they belong to."""
        directory = pathlib.Path(self.config.out) / self.command
        return {"directory": directory, "identity": self.data.identity, "mesh": self.mesh}

    @property
    def reader_options(self) -> dict[str, Any]:
        """The arguments of data loaders that say which rows this process reads, and how far ahead."""
        shard = process_shard(self.mesh) if self.command == "sft" else questions_shard(self.config.learning, self.mesh)
        ahead = {"threads": self.config.read_threads, "ahead": self.config.read_ahead}
        return {"process_index": shard.index, "process_count": shard.count, **ahead}

    @property
    def looks(self) -> HeldOutLooks:
        """The maker of evaluations on held-out examples."""
        # Devices that write rows ahead are busy: held-out questions are answered by those of training.
        mesh = None if self.ahead else self.rollout_mesh
        by = Sampling(self.vocabulary, self.tables, self.mesh, mesh, self.rollouts or rollout)
        return HeldOutLooks(self.config, self.auto_shapes(self.config.watch.batch), by)

    def auto_shapes(self, rows: int) -> AutoShapes:
        """Returns the inputs for shapes of questions: the images of `rows` prompts get a share of the memory."""
        return question_shapes(self.network, self.mesh, rows)

    def watch(self, steps: int, look: Look | None) -> Watch:
        """Makes the object that evaluates and saves the model during a run of `steps`."""
        config, out = self.config, pathlib.Path(self.config.out)
        return Watch(
            config.watch,
            out / self.command,
            steps,
            self.vocabulary,
            look=look,
            save=lambda state, where: self.write(state.model, where),
            save_every=config.save_model_every,
            best=config.keep_best if self.trains else None,
            draw=lambda: _draw(out),
        )

    def write(self, model: Any, where: pathlib.Path) -> None:
        """Writes the model as a directory."""
        adapter_of = self.config.model if self.config.adapts else None
        write_model(model, self.processor, where, self.dtype, adapter_of=adapter_of, limits=self.limits)


def _draw(out: pathlib.Path) -> None:
    draw_run(out)


def train(command: Command, config: TrainConfig, *, resume_changed: bool = False) -> None:
    """Runs one phase, in as many processes as have joined.

    Args:
        command: the phase.
        config: its settings; the section of the phase is there.
        resume_changed: whether a run goes on whose settings or data have changed.
    """
    out = pathlib.Path(config.out)
    (out / command).mkdir(parents=True, exist_ok=True)
    if is_main_process():
        write_json(out / CONFIG, dataclasses.asdict(config))
        announce_compiles()
    use_limits(config.limits)
    # The user's own code is imported first: a mistake in it shows at once.
    tools, calls = find_tools(config.tools), find_format(limits_of(command, config).call_format)
    config = config.for_model(read_network(config.model))
    with waiting("reading the data"):
        data = read_data(command, config, Language(tools, calls), resume_changed)
    use_compilation_cache(out / "compiled")
    model, processor, mesh = read_model(config)
    vocabulary = Vocabulary.of(processor.tokenizer)
    with host_rollouts(config.tools, tools, vocabulary, config.host_tools) as rollouts:
        token_tables = tables(vocabulary, tools, calls)
        dtype = config.dtype or dtype_of(model)
        phase = Phase(command, config, data, model.config, dtype, processor, mesh, token_tables, rollouts)
        model = tune(phase, model) if command == "sft" else learn(phase, model)
        if phase.trains:
            with among(phase.mesh), waiting("writing the model"):
                phase.write(model, out / "model")
        barrier("the model is written")
        if is_main_process():
            record(phase, model)
    if is_main_process():
        with waiting("drawing the run's page"):
            draw_run(out)
    say(f"The model is in {out / 'model'}.")


def limits_of(command: Command, config: TrainConfig) -> RolloutConfig:
    """The limits of a phase. Tuning renders traces as a rollout would, within `config.rollout`."""
    return config.rollout if command == "sft" else config.learning.rollout


def read_data(command: Command, config: TrainConfig, language: Language, resume_changed: bool) -> PhaseData:
    """Reads the examples, whose calls are in the `language`, and divides them into those to train on and those held out."""
    out, turns = pathlib.Path(config.out), command == "sft"
    pictures = limits_of(command, config).max_images > 0
    examples, report = read_examples(
        config.data,
        turns=turns,
        drop=config.bad_rows == "drop",
        image_folders=config.image_folders,
        columns=config.columns,
        language=language,
        pictures=pictures,
    )
    settings: dict[str, Any] = {}
    with Digests(out / "digests.json") if is_main_process() else contextlib.nullcontext() as digests:
        if is_main_process():
            assert digests is not None
            settings = run_settings(command, config, examples, digests)
        examples, judging, rows = split = hold_out(
            examples,
            config.data_eval,
            config.watch,
            out / command,
            digests,
            seed=config.seed,
            turns=turns,
            image_folders=config.image_folders,
            columns=config.columns,
            language=language,
            pictures=pictures,
        )
    if turns and not config.corrections:
        examples, judging = without_corrections(examples), without_corrections(judging)
    settings |= {"data.held_out": rows} if rows else {}
    pause("the data is read")
    return PhaseData(examples, judging, str(split), report, Identity(settings, resume_changed))


def without_corrections(examples: Sequence[Example]) -> list[Example]:
    """Returns the traces of which every turn is learned. A turn that is not learned is a mistake, corrected later."""
    return [x for x in examples if all(learned for turn in x.turns for _, learned in turn.parts)]


def read_model(config: TrainConfig) -> tuple[Any, Any, Mesh | None]:
    """Reads the model that a phase starts from.

    Returns:
        The model, with adapters if the config has them; its processor; the mesh on which it lies.

    Raises:
        UserError: several processes have joined and the config has no mesh, or the model has no tokenizer.
    """
    mesh = make_mesh(config.mesh) if config.mesh else None
    if mesh is None and jax.process_count() > 1:
        raise UserError(f"{jax.process_count()} processes have joined, but config.mesh is empty: one device")
    model, processor = from_pretrained(config.model, mesh=mesh, adapter=config.adapter)
    if processor is None:
        raise UserError(f"{config.model} has no tokenizer")
    pause("the model is read")
    if config.architecture is not None:
        check_architecture(model, config.architecture, config.model)
    if config.lora is not None:
        model = add_lora(model, jax.random.key(config.seed), **dataclasses.asdict(config.lora))
    return model, processor, mesh


def tune(phase: Phase, model: Any) -> Any:
    """Tunes `model` on traces and returns it."""
    config, section, data = phase.config, phase.config.tuning, phase.data
    with waiting("writing the traces as tokens"):
        packing = phase.packing
    epoch = packing.epoch
    steps = section.updates(epoch)
    course = f"{steps} steps of {section.batch_size} rows make {steps / epoch:.3g} epochs"
    if epoch < 1:
        course += f", each trace {1 / epoch:.3g} times a step: fewer config.sft.batch_size teach as much in less time"
    announce(pathlib.Path(config.out), data, f"{len(packing.examples)} traces; {packing}; {course}")
    batches = packing.batches(**phase.reader_options)
    look = phase.looks.of_tuning(data.held_out, packing) if data.held_out else None
    pause("the data is written out")
    return sft(model, batches, section, epoch=epoch, watch=phase.watch(steps, look), **phase.run_options)


def learn(phase: Phase, model: Any) -> Any:
    """Trains `model` by reinforcement learning and returns it."""
    config, section, phase_data, vocabulary = phase.config, phase.config.learning, phase.data, phase.vocabulary
    rollout_mesh = phase.rollout_mesh
    for line in other_limits(config):
        say(line)
    with waiting("writing the questions as tokens"):
        questions = phase.questions
    course = course_of(section, collections.Counter(x.shape for x in questions))
    announce(pathlib.Path(config.out), phase_data, f"{course}; {describe_shapes(questions)}")
    data = phase.question_batches
    shapes = list(dict.fromkeys(x.shape for x in questions))
    look = phase.looks.of_learning(phase_data.held_out, shapes) if phase_data.held_out and phase.trains else None
    watch = phase.watch(section.iterations, look)
    older = [f"staleness {section.staleness}"] * bool(section.staleness)
    older += ["a rollout_budget"] * section.rollout_budget.limits
    if older and phase.rollouts is not None:
        raise UserError(
            f"config.rl has {' and '.join(older)}, and some of the tools {', '.join(config.tools)} run on the host: with such "
            "tools rollouts and training take turns, and rows are written to their ends"
        )
    stages = Stages(
        Rewards.of(section.reward, lambda ids: vocabulary.to_bytes(ids).decode("utf-8", "replace")),
        advantages=watch.advantages,
    )
    if phase.rollouts is not None:
        stages = dataclasses.replace(stages, collect=functools.partial(collect_on_host, phase.rollouts))
    pause("the data is written out")
    return rl(model, data, stages, section, rollout_mesh=rollout_mesh, watch=watch, **phase.run_options)


def question_shapes(network: ModelConfig, mesh: Mesh | None, rows: int) -> AutoShapes:
    """Returns the inputs for shapes of questions: the images of `rows` prompts get a share of the memory."""
    memory = device_memory() // PICTURES_DIVISOR * (1 if mesh is None else row_shards(mesh))
    return AutoShapes(training_work(network), rows, memory // rows)


def record(phase: Phase, model: Any) -> None:
    """Writes what the adapter of the trained model was trained on, if an adapter is all that the run has trained."""
    command, config, out = phase.command, phase.config, pathlib.Path(phase.config.out)
    section = config.tuning if command == "sft" else config.learning
    trained = [weight for _, path, weight in named_weights(model) if re.match(section.trainable, path)]
    if not all(isinstance(weight, LoRAWeight) for weight in trained):
        return
    if command == "rl" and config.learning.rollout_budget.limits:
        say(
            "what the adapter was trained on is not recorded: with a rollout_budget, the order of the data does not say it"
        )
        return
    if command == "sft":
        packing = phase.packing
        examples, shapes, size, epoch = packing.examples, packing.buckets, packing.size, packing.epoch
        order, steps = packing.order, config.tuning.updates(epoch)
    else:
        examples = [x.example for x in phase.questions]
        shapes = list(dict.fromkeys(x.shape for x in phase.questions))
        size, steps = config.learning.prompts, config.learning.iterations
        epoch, question_order = len(examples) / size, phase.question_batches.order
        numbers = [int(question_order[position]) for position in range(steps * size)]
        order = [PackedRow(shapes.index(phase.questions[i].shape), (i,)) for i in numbers]
    with Digests(out / "digests.json") as digests:
        record_run(
            out / command,
            command,
            read_settings(out / command),
            examples,
            shapes,
            [[order[step * size + row] for row in range(size)] for step in range(steps)],
            epoch=epoch,
            metrics=read_metrics(out / command / "metrics.jsonl"),
            adapter=out / "model" / FOLDER,
            digests=digests,
        )


def tuning_shapes(config: SFTConfig, network: ModelConfig, mesh: Mesh | None) -> AutoShapes:
    """Returns the inputs for the shapes of rows to tune on."""
    shards, width = sequence_shards(mesh), 2 if config.forward.compute_dtype == "bfloat16" else 4

    def bytes_of_row(shape: BatchShape) -> int:
        shown = (shape.slices, shape.patches)
        return row_bytes(network, shape.tokens // shards, shown, width=width, remat=bool(config.forward.remat))

    return AutoShapes(training_work(network), config.batch_size, device_memory(), bytes_of_row)


def pause(stage: str) -> None:
    """Waits for the other processes between two long stages, and ends a run that was asked to stop.

    Raises:
        Preempted: the run was asked to stop.
    """
    barrier(stage)
    if NOTICE.reached():
        say("asked to stop before the first step; what was done before is saved. Started again, the run goes on.")
        raise Preempted


def course_of(config: RLConfig, shapes: Mapping[Any, int]) -> str:
    """Says how often questions are asked. `shapes` counts them by batch shape; an iteration has one shape."""
    count, iterations = sum(shapes.values()), config.iterations
    epochs = iterations * config.prompts / count
    text = f"{count} questions; {iterations} iterations of {config.prompts} prompts make {epochs:.3g} epochs"
    if (times := config.prompts / min(shapes.values())) > 1:
        each = "each question" if len(shapes) == 1 else "a question of the rarest shape"
        text += f", {each} {times:.4g} times an iteration: more questions or fewer config.rl.prompts teach more"
    return text


def other_limits(config: TrainConfig) -> list[str]:
    """Lines about limits of `rl` that differ from those beside the model, or from `config.rollout`, which is for tuning."""
    used, usual = config.learning.rollout, RolloutConfig()
    names = [field.name for field in dataclasses.fields(usual)]
    changed = [name for name in names if getattr(config.rollout, name) != getattr(usual, name)]
    beside_model = read_limits(config.model) or used
    others = {
        f"{limits_file(config.model)}": differences(used, beside_model, VIEW_FIELDS),
        "config.rollout, which is of tuning": differences(used, config.rollout, changed),
    }
    return [
        f"rl goes by config.rl.rollout.{name}={own!r}, not by the {other!r} of {where}"
        for where, pairs in others.items()
        for name, (own, other) in pairs.items()
    ]


def announce(out: pathlib.Path, phase_data: PhaseData, data: str) -> None:
    """Prints what was read and what was dropped, and writes it to `data.json`."""
    report = phase_data.report
    say("\n".join(filter(None, [str(report), f"{report.source}: {data}; {phase_data.about_held_out}"])))
    if is_main_process():
        left_out = {"dropped": report.dropped, "mended": dict(report.mended)}
        write_json(
            out / DATA, {"source": report.source, "data": data, "judged_by": phase_data.about_held_out, **left_out}
        )
