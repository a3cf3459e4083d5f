"""The programs of a recipe, built from shapes alone: the functions of training, and abstract arrays as their arguments."""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pixel_jax.models.attention import CACHE_TILE
from pixel_jax.models.config import ModelConfig
from pixel_jax.models.inputs import Visual
from pixel_jax.models.lora import add_lora
from pixel_jax.models.model import LanguageModel, Model
from pixel_jax.models.peft import shape_adapter
from pixel_jax.ops.crop_resize import ROW_BLOCK, tiles
from pixel_jax.parallel.sharding import ROWS, row_shards, shardings
from pixel_jax.rollouts import decode_loop
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.materialize import cut_patches
from pixel_jax.rollouts.queue import read_together
from pixel_jax.rollouts.rollout import compiled_rollout, traced_settings
from pixel_jax.rollouts.shapes import RolloutShape, budgets, prompt_shape
from pixel_jax.rollouts.trajectory import Prompts, Tables
from pixel_jax.train_config import TrainConfig
from pixel_jax.training.batch import Batch, from_trajectories
from pixel_jax.training.optimizer import make_optimizer
from pixel_jax.training.state import TrainState, cast, init_state
from pixel_jax.training.steps import make_rl_step, make_score_step, make_sft_step

RUN = ("update", "score", "rollout")  # steps of RL, which are planned together; others are planned separately
# The number of steps of SFT by epochs, which is unknown without data and only changes the learning rate.
ANY_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A config, with the network and the tables that it refers to."""

    config: TrainConfig
    network: ModelConfig
    tables: Tables  # of the tokenizer
    dtype: str = "bfloat16"  # of the checkpoint's weights
    configured: bool = False  # whether meshes and micro-batches are the config's, and not chosen by the plan
    # What a shard takes at a time, chosen by the plan: prompts of a rollout, rows of another step's micro-batch. None: the
    # config's prompts in flight, and the config's micro-batches if `configured`, otherwise one row.
    together: int | None = None

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps of this recipe, in the order in which they are planned."""
        config = self.config
        tuning = ("sft",) if config.sft is not None else ()
        if config.rl is None:
            return tuning
        return (*tuning, "update", *["score"] * (config.rl.old_logprobs == "recomputed"), "rollout")

    def rows(self, step: str) -> int:
        """The number of rows in one call of the step's program."""
        if step not in RUN:
            return self.config.tuning.batch_size
        return self.config.learning.rows if step == "rollout" else self.config.learning.train_batch

    def micro_batches(self, step: str, mesh: Mesh) -> int:
        """The number of micro-batches of a step: of `together` rows per shard of the mesh; without it, the config's or of one.

        Rows are long, and the memory of a step grows with the rows of a micro-batch.

        Raises:
            ValueError: the rows cannot be divided among the shards.
        """
        phase = self.config.learning if step in RUN else self.config.tuning
        if self.together is None and self.configured and phase.forward.micro_batches is not None:
            return phase.forward.micro_batches
        rows, each = self.rows(step), row_shards(mesh) * (self.together or 1)
        if rows % each:
            raise ValueError(f"{rows} rows cannot be split over data x fsdp = {row_shards(mesh)}")
        return rows // each

    def in_flight(self, shards: int) -> int:
        """The number of prompts whose rows a rollout decodes at the same time, on so many shards."""
        phase = self.config.learning
        wanted = phase.rollout.in_flight if self.together is None else self.together * shards
        return min(wanted or phase.prompts, phase.prompts)

    def flying(self, shards: int) -> "Recipe":
        """The recipe of a rollout on so many shards, with its prompts in flight in the config."""
        if self.together is None:
            return self
        rl = self.config.learning
        rl = dataclasses.replace(rl, rollout=dataclasses.replace(rl.rollout, in_flight=self.in_flight(shards)))
        return dataclasses.replace(self, config=dataclasses.replace(self.config, rl=rl), together=None)

    def sizes(self, step: str, shards: int) -> list[int]:
        """What `together` may be on so many shards, ascending.

        Rows of a shard are divided evenly. Prompts in flight are refilled from a queue: of the numbers that need as many rounds,
        the least is there, which needs the least memory.
        """
        if step == "rollout":
            prompts = self.config.learning.prompts // shards
            return sorted({-(-prompts // rounds) for rounds in range(1, prompts + 1)})
        rows = self.rows(step) // shards
        return [size for size in range(1, rows + 1) if rows % size == 0]

    def length(self, step: str) -> int:
        """The number of tokens in a row."""
        return self.prompt_width + self.config.learning.rollout.max_response if step in RUN else self.trace_shape[0]

    @property
    def prompt_width(self) -> int:
        """The number of tokens of a prompt, which the config must give."""
        assert self.config.prompt_width is not None
        return self.config.prompt_width

    @property
    def image_buffer(self) -> tuple[int, int, int]:
        """The number of images of a prompt, and their height and width, which the config must give."""
        assert self.config.image_buffer is not None
        return self.config.image_buffer

    @property
    def trace_shape(self) -> tuple[int, int, int]:
        """The numbers of tokens and frames of a row of traces, and of patches of a frame, which the config must give."""
        config = self.config
        assert config.trace_tokens is not None and config.trace_frames is not None and config.trace_patches is not None
        return config.trace_tokens, config.trace_frames, config.trace_patches

    def sequences(self, step: str) -> tuple[int, ...]:
        """The numbers of shards into which a mesh may split the positions of a row."""
        return (1,) if step == "rollout" else (1, 2, 4, 8)

    def build(self, step: str, mesh: Mesh) -> "Program":
        """Builds the program of one of the steps on a mesh."""
        return build(self, step, mesh)


class Program(NamedTuple):
    """A jitted function and the abstract arguments it is compiled for."""

    function: Callable[..., Any]
    arguments: tuple
    options: dict[str, Any]
    turns: Mapping[str, float]  # of the loops and branches that the data decides: how often a scope's body runs
    mesh: Mesh

    def lower(self) -> jax.stages.Lowered:
        """Traces the function with the mesh set, as a rollout is called."""
        assert isinstance(self.function, jax.stages.Wrapped)  # all of them are jitted
        with jax.set_mesh(self.mesh):
            return self.function.lower(*self.arguments, **self.options)


def sharded(tree, layout):
    """A tree of abstract arrays with the shardings of the tree `layout`."""
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, layout)


def by_rows(tree, mesh: Mesh):
    """A tree of abstract arrays whose leading axis is rows, split over the mesh."""
    return sharded(tree, jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec(ROWS)), tree))


def replicated(tree, mesh: Mesh):
    """A tree of abstract arrays of which every device has a copy."""
    return sharded(tree, jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree))


def bytes_per_device(tree) -> int:
    """The bytes that one device holds of abstract arrays with shardings."""
    return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))


def abstract_model(recipe: Recipe) -> Model:
    """The model that a run starts from, adapters included, without its weights."""

    def build(key):
        model = LanguageModel(recipe.network, key, dtype=jnp.dtype(recipe.dtype))
        lora, adapter = recipe.config.lora, recipe.config.adapter
        if adapter is not None:
            return shape_adapter(model, adapter)
        return model if lora is None else add_lora(model, key, rank=lora.rank, alpha=lora.alpha, targets=lora.targets)

    return jax.eval_shape(build, jax.random.key(0))


def abstract_state(recipe: Recipe, phase, steps: int, mesh: Mesh) -> TrainState:
    """The training state of a phase (`config.sft` or `config.rl`) as it lies on the mesh."""
    optimizer = make_optimizer(phase.optimizer, steps)
    state = jax.eval_shape(
        lambda model: init_state(model, optimizer, trainable=phase.trainable), abstract_model(recipe)
    )
    return sharded(state, shardings(state, mesh))


def array(dtype, *shape: int) -> jax.Array:
    """An abstract array, with the type of the array that it stands for: `Batch` and others declare arrays."""
    return typing.cast(jax.Array, jax.ShapeDtypeStruct(shape, dtype))


def sft_batch(recipe: Recipe, *, packed: bool) -> Batch:
    """An abstract batch of traces: several to a row, as `pixel-jax sft` packs them, or one, as an edit takes them."""
    rows, (length, frames, patches) = recipe.config.tuning.batch_size, recipe.trace_shape
    return Batch(
        tokens=array(jnp.int32, rows, length),
        valid=array(jnp.bool_, rows, length),
        loss_mask=array(jnp.bool_, rows, length),
        logprobs=array(jnp.float32, rows, length),
        old_logprobs=array(jnp.float32, rows, length),
        visual=Visual(
            patches=array(jnp.uint8, rows, frames, patches, recipe.config.rollout.patch_bytes),
            slices=array(jnp.int32, rows, frames, 2),
            grids=array(jnp.int32, rows, frames, 3),
            seconds=array(jnp.float32, rows, frames),
        ),
        advantage=array(jnp.float32, rows, length) if packed else array(jnp.float32, rows),
        weight=array(jnp.float32, rows),
        segments=array(jnp.int32, rows, length) if packed else None,
    )


def prompt_arrays(recipe: Recipe) -> Prompts:
    """The prompts of one rollout, as `pixel-jax rl` builds them."""
    batch, (buffers, height, width) = recipe.config.learning.prompts, recipe.image_buffer
    return Prompts(
        tokens=array(jnp.int32, batch, recipe.prompt_width),
        length=array(jnp.int32, batch),
        buffers=array(jnp.uint8, batch, buffers, height, width, 3),
        image_sizes=array(jnp.int32, batch, buffers, 2),
        image_counts=array(jnp.int32, batch),
        is_video=array(jnp.bool_, batch),
        seconds=array(jnp.float32, batch),
        uid=array(jnp.int32, batch),
        tables=jax.eval_shape(lambda tables: tables, recipe.tables),
    )


def rollout_shape(recipe: Recipe, shards: int) -> RolloutShape:
    """The shape of a rollout, as `pixel_jax.rollouts.rollout.layout` makes it. A prompt of several buffers is a video."""
    limits, buffer = recipe.config.learning.rollout, recipe.image_buffer
    prompts = prompt_shape(*buffer, recipe.prompt_width, limits, video=buffer[0] > 1)
    return RolloutShape.of(prompts, limits, recipe.tables.tools, shards)


def policy(recipe: Recipe, mesh: Mesh) -> Model:
    """The abstract model as a rollout on the mesh reads it."""
    model = jax.eval_shape(
        lambda model: cast(model, recipe.config.learning.forward.compute_dtype), abstract_model(recipe)
    )
    return sharded(model, shardings(model, mesh))


def rollout_arguments(recipe: Recipe, mesh: Mesh) -> tuple[tuple, dict[str, Any]]:
    """Positional arguments and options of `compiled_rollout`, as `training.rl` calls it."""
    model, prompts = policy(recipe, mesh), prompt_arrays(recipe)
    tables = replicated(prompts.tables, mesh)
    prompts = by_rows(prompts._replace(tables=()), mesh)._replace(tables=tables)
    assistant_prefix, temperature, config = traced_settings(recipe.config.learning.rollout, ())
    traced_arguments = replicated(jax.eval_shape(lambda: (jax.random.key(0), assistant_prefix, temperature)), mesh)
    options = {"shape": rollout_shape(recipe, row_shards(mesh)), "mesh": mesh}
    return (model, prompts, *traced_arguments, config), options


def rl_batch(recipe: Recipe) -> Batch:
    """The abstract batch of one update, with the shapes that a rollout returns."""
    assistant_prefix, temperature, config = traced_settings(recipe.config.learning.rollout, ())
    shape, rows = rollout_shape(recipe, 1), recipe.config.learning.train_batch
    run = functools.partial(compiled_rollout, config=config, shape=shape, mesh=None)
    model, prompts = abstract_model(recipe), prompt_arrays(recipe)
    trajectories = jax.eval_shape(run, model, prompts, jax.random.key(0), assistant_prefix, temperature)
    batch = jax.eval_shape(lambda t: from_trajectories(t), trajectories)
    batch = jax.tree.map(lambda x: array(x.dtype, rows, *x.shape[1:]), batch)
    buffers, visual = array(jnp.uint8, rows, *prompts.buffers.shape[1:]), batch.visual
    assert visual is not None  # prompts have images
    patches = jax.eval_shape(functools.partial(cut_patches, config=config, shape=shape), buffers, visual.source)
    return batch._replace(visual=Visual(patches, visual.slices, visual.grids, visual.seconds))


def build(recipe: Recipe, step: str, mesh: Mesh) -> Program:
    """The program of one step ("sft", "update", "score", "rollout") on a mesh, whose devices need not exist.

    Raises:
        ValueError: there is no such step.
    """
    turns = vision_turns(recipe.network)
    if step == "rollout":
        recipe = recipe.flying(row_shards(mesh))
        arguments, options = rollout_arguments(recipe, mesh)
        return Program(compiled_rollout, arguments, options, turns | rollout_turns(recipe, mesh), mesh)
    micro_batches = recipe.micro_batches(step, mesh)
    if step == "sft":
        phase = recipe.config.tuning
        forward = dataclasses.replace(phase.forward, micro_batches=micro_batches)
        steps = phase.steps or ANY_STEPS
        optimizer = make_optimizer(phase.optimizer, steps)
        function = make_sft_step(forward, optimizer, normalizer=phase.normalizer, mesh=mesh)
        state, batch = abstract_state(recipe, phase, steps, mesh), by_rows(sft_batch(recipe, packed=True), mesh)
        return Program(function, (state, batch), {}, turns, mesh)
    phase = recipe.config.learning
    forward = dataclasses.replace(phase.forward, micro_batches=micro_batches)
    total = phase.iterations * phase.updates
    state, batch = abstract_state(recipe, phase, total, mesh), by_rows(rl_batch(recipe), mesh)
    temperatures = {
        "temperature": phase.rollout.temperature,
        "later_temperature": phase.rollout.later_temperature,
        "mesh": mesh,
    }
    if step == "update":
        function = make_rl_step(forward, phase.loss, make_optimizer(phase.optimizer, total), **temperatures)
        return Program(function, (state, batch), {}, turns, mesh)
    if step == "score":
        function = make_score_step(forward, **temperatures)
        model = jax.eval_shape(lambda state: state.model, state)
        model = sharded(model, shardings(model, mesh))
        return Program(function, (model, batch), {}, turns, mesh)
    raise ValueError(f"there is no step {step!r}")


def resident(recipe: Recipe, step: str, trained: Mesh, rolled: Mesh) -> int:
    """Bytes that a device of a reinforcement-learning run holds besides the arguments of a step's program.

    During a rollout that is the training state, during a score the optimiser's state. Where the two meshes differ, frozen
    weights are held twice (`Resharder`).

    Args:
        recipe: of the run.
        step: the step whose program runs.
        trained: the mesh of updates and scores.
        rolled: the mesh of rollouts.
    """
    rl = recipe.config.learning
    state = abstract_state(recipe, rl, rl.iterations * rl.updates, trained)
    if step == "rollout":
        model = jax.eval_shape(lambda state: state.model, state)
        pairs = zip(
            jax.tree.leaves(sharded(model, shardings(model, trained))),
            jax.tree.leaves(policy(recipe, rolled)),
            strict=True,
        )
        return bytes_per_device(state) - bytes_per_device([x for x, y in pairs if x == y])  # neither cast nor moved
    copied = jax.eval_shape(lambda rest: cast(rest, rl.forward.compute_dtype), state.rest) if rolled != trained else ()
    copied = sharded(copied, shardings(copied, rolled))
    return bytes_per_device(copied) + (bytes_per_device(state.opt_state) if step == "score" else 0)


def vision_turns(network: ModelConfig) -> dict[str, float]:
    """How often the branch of full attention is taken: the share of the tower's layers that attend over a whole slice."""
    vision = network.vision
    if vision is None or vision.window_size is None:
        return {"full_attention": 1.0}
    full = len([i for i in vision.fullatt_block_indexes if i < vision.depth]) / vision.depth
    return {"full_attention": full}


def rollout_turns(recipe: Recipe, mesh: Mesh) -> dict[str, float]:
    """How often each loop of a rollout runs at most: every row makes all its calls and writes until its response is full.

    The automaton reads a token byte by byte; "tiles", "strips" and "columns" are loops of crops on a CPU.
    """
    config: RolloutConfig = recipe.config.learning.rollout
    shards = row_shards(mesh)
    shape = rollout_shape(recipe, shards)
    side = max(recipe.image_buffer[1:])
    shown = max(max(budget.buffer) for budget in budgets(config, shape))
    width = decode_loop.observation_width(recipe.tables.observations, config, shape)
    width = min(width, config.max_response)
    turns = config.max_calls + 1
    written = max(config.max_response - config.max_calls * width, 0)  # tokens that the policy can write
    prompts = recipe.config.learning.prompts
    in_flight = recipe.in_flight(shards) // shards
    waves = -(-prompts // shards // in_flight)
    chunks = -(-in_flight * config.group_size // config.observe_chunk)
    return {
        "turns": waves * turns,
        "fill": 1 / turns,
        "prompts": -(-in_flight // read_together(recipe.prompt_width, from_queue=waves > 1)),
        "tokens": min(config.max_new_tokens, written // turns),
        "tail": 0,  # rows that all write to their limits leave none behind
        "cache": (-(-config.max_response // CACHE_TILE) + 1) / 2,  # while it fills
        "observe": config.max_calls / turns,
        "readers": chunks,
        "pieces": -(-width // decode_loop.READ_CHUNK),
        "bytes": int(np.max(recipe.tables.bytes.length)),
        "tiles": tiles(side, shown),
        "strips": -(-side // ROW_BLOCK),
        "columns": -(-side // ROW_BLOCK),
    }
