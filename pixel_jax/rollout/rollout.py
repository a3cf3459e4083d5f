"""The multi-turn rollout: as one compiled program, and driven step by step from the host.

Both are made of the same functions (`machine.py`, `queue.py`) and give the same tokens.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.models.decoder import KVCache, Prefix
from pixel_jax.models.qwen2_5_vl import Qwen2_5_VL
from pixel_jax.parallel.memory import device_memory
from pixel_jax.parallel.processes import everywhere
from pixel_jax.parallel.sharding import ROWS, constrain, partition_spec, replicate, row_parts, shard_batch, share
from pixel_jax.rollout import machine
from pixel_jax.rollout.canvases import Canvases
from pixel_jax.rollout.config import RolloutConfig
from pixel_jax.rollout.drawings import Pictures, pictures_of
from pixel_jax.rollout.host import host_calls, tell
from pixel_jax.rollout.machine import DONE, WAITING, WRITING, Shape, Shared, State, budgets
from pixel_jax.rollout.queue import Queue, fill, finish, openings, start
from pixel_jax.rollout.trajectory import Prompts, Trajectories
from pixel_jax.terminal import say
from pixel_jax.tools.host import HostTools, HostToolsConfig
from pixel_jax.tools.tool import Tool, ToolError


def rollout(
    model: Qwen2_5_VL,
    prompts: Prompts,
    key: jax.Array,
    config: RolloutConfig,
    *,
    opening: Sequence[int] = (),
    pixels: bool = True,
) -> Trajectories:
    """`config.group_size` conversations from each of B prompts, R rows in all, by one XLA program.

    The rows of `config.in_flight` prompts decode together; whenever enough of them have ended a turn, those that asked for
    pixels get them (cropped and resized from the full-resolution canvas, encoded, appended to their caches) or a message, rows
    that wait take the place of those that are done, and all go on. On a mesh, rows are split over `data` and `fsdp`; the mesh
    is the one the model's weights lie on. With several processes each brings its share of the prompts, and all must have the
    same shapes; the rows that come back lie where their prompts do.

    Args:
      key: the rows' randomness: row i of prompt b draws from `fold_in(fold_in(key, prompts.uid[b]), i)` and its position.
      opening: token ids the assistant's first turn begins with, in every row. They are not the policy's choice.
      pixels: False leaves out `visual.patches` (None), most of what trajectories weigh; `sight.materialize` cuts them anew.
    """
    if any(tool.host for tool in prompts.tables.tools):
        raise ValueError(f"{_of_host(prompts.tables.tools)} run on the host: `host_rollout` carries their calls out")
    mesh, shape = layout(model, prompts, config)
    shape = shape._replace(pixels=pixels)
    config = fitting(config, model, prompts, shape, mesh)
    opening, temperature, config = traced(config, opening)
    if mesh is not None:
        key, opening, temperature = replicate((key, opening, temperature), mesh)
    prompts = place(prompts, mesh)
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        return compiled_rollout(model, prompts, key, opening, temperature, config, shape=shape, mesh=mesh)


CACHES = 3  # one part in so many of a device's memory is for what rows in flight keep


def fitting(
    config: RolloutConfig, model: Qwen2_5_VL, prompts: Prompts, shape: Shape, mesh: Mesh | None
) -> RolloutConfig:
    """`config` with as many prompts in flight as fit the memory of the devices, where it leaves that open and not all do."""
    batch, width = prompts.tokens.shape
    if config.in_flight is not None:
        return config
    text = model.config.text
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    token *= model.language_model.embed_tokens.weight.dtype.itemsize
    seen = config.max_calls * shape.views * budgets(config, shape)[1].patches * 588 if shape.pixels else 0
    group = config.group_size * (config.max_response * token + seen) + 2 * (width + OPENING_STEP) * token
    most = max(1, device_memory() // CACHES // group) * shape.shards
    return config if most >= batch * share(mesh).count else dataclasses.replace(config, in_flight=most)


OPENING_STEP = 8  # openings are padded to a multiple, to share a program


def traced(config: RolloutConfig, opening: Sequence[int]) -> tuple[jax.Array, jax.Array, RolloutConfig]:
    """Opening and temperatures as arrays, and the config without them: they do not need a program of their own."""
    padded = np.full(OPENING_STEP * max(1, -(-len(opening) // OPENING_STEP)), -1, np.int32)
    padded[: len(opening)] = opening
    later = config.temperature if config.later_temperature is None else config.later_temperature
    temperature = np.array([config.temperature, later], np.float32)
    same = dataclasses.replace(config, temperature=1.0, later_temperature=None)
    return jnp.asarray(padded), jnp.asarray(temperature), same


@functools.partial(jax.jit, static_argnames=("config", "shape", "mesh"))
def compiled_rollout(
    model, prompts, key, opening, temperature, config: RolloutConfig, *, shape: Shape, mesh: Mesh | None
) -> Trajectories:
    """The whole rollout: no host in the loop. Every predicate is global, so all shards turn equally often."""
    layers = model.unstack()
    queue, state = constrain_rows(start(model, prompts, key, opening, config, shape), mesh)

    def turn(carry: tuple[Queue, State]) -> tuple[Queue, State]:
        queue, state = carry
        # Outside the token loop: in it, the caches would be copied at every token.
        with jax.named_scope("fill"):
            queue, state = jax.lax.cond(
                jnp.any(openings(queue, state, config, shape).takes),
                lambda carry: fill(model, prompts, key, opening, *carry, config, shape),
                lambda carry: carry,
                (queue, state),
            )
        queue, state = constrain_rows((queue, state), mesh)
        shared = Shared(prompts, queue.prefix, temperature)

        def writes_on(state: State) -> jax.Array:
            return machine.writes_on(state, openings(queue, state, config, shape).takes, config, shape)

        with jax.named_scope("tokens"):
            state = jax.lax.while_loop(
                writes_on, lambda state: machine.decode(model, layers, shared, state, config), state
            )
            if config.tail_rows is not None:
                state = machine.decode_tail(model, layers, shared, state, config, shape)
        with jax.named_scope("observe"):
            state = jax.lax.cond(
                jnp.any(state.status == WAITING),
                lambda state: machine.observe(model, layers, shared, state, config, shape),
                lambda state: state,
                state,
            )
        return queue, constrain_rows(state, mesh)

    def going(carry: tuple[Queue, State]) -> jax.Array:
        queue, state = carry
        return jnp.any(state.status != DONE) | jnp.any(openings(queue, state, config, shape).takes)

    with jax.named_scope("turns"):
        queue, state = jax.lax.while_loop(going, turn, (queue, state))
    return constrain_rows(finish(prompts, queue, state, config, shape), mesh)


def host_rollout(
    model: Qwen2_5_VL,
    prompts: Prompts,
    key: jax.Array,
    config: RolloutConfig,
    *,
    opening: Sequence[int] = (),
    pixels: bool = True,
    host: HostTools | None = None,
    vocabulary: Vocabulary | None = None,
    on_token: Callable[[State], None] | None = None,
) -> Trajectories:
    """`rollout`, driven from the host: the same steps, compiled one by one, so that every state can be looked at.

    Args:
      host: carries out the calls of the tools that run on the host, those of a batch beside one another. Needs `vocabulary`.
        What a row reads then depends on them too: the same key need not give the same tokens.
      on_token: called with the state after every token.
    """
    if any(tool.host for tool in prompts.tables.tools) and (host is None or vocabulary is None):
        raise ValueError(f"{_of_host(prompts.tables.tools)} run on the host: pass `host` and `vocabulary`")
    mesh, shape = layout(model, prompts, config)
    shape, images = shape._replace(pixels=pixels), prompts.canvases
    call_format, pictures = prompts.tables.reader.language.format, None
    if any(tool.picture for tool in shape.tools):
        if not isinstance(images, Canvases):
            raise TypeError(f"what tools return is kept by Canvases (see build_prompts), not by {type(images)}")
        pictures = _pictures(images, mesh)
    prompts = place(prompts, mesh)
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        layers = _unstack(model)
        opening, temperature, config = traced(config, opening)
        queue, state = _start(model, prompts, key, opening, config, shape)
        while True:
            if np.any(np.asarray(_openings(queue, state, config, shape).takes)):
                queue, state = _fill(model, prompts, key, opening, queue, state, config, shape)
            if np.all(np.asarray(state.status) == DONE):
                return _finish(prompts, queue, state, config, shape)
            shared = Shared(prompts, queue.prefix, temperature, pictures)
            while np.any(np.asarray(state.status) == WRITING):
                state = _decode(model, layers, shared, state, config)
                if on_token is not None:
                    on_token(state)
            if host is not None:
                asked = host_calls(state, prompts, images, config, shape)
                if asked:
                    replies = host.call([call.request for call in asked])
                    told = tell(replies, asked, images, state, vocabulary, call_format, config, shape)
                    if any(reply.picture is not None for reply in replies):
                        pictures = _pictures(images, mesh)
                        shared = shared._replace(pictures=pictures)
                    state = _tell(model, layers, shared, state, told, config, shape)
            if np.any(np.asarray(state.status) == WAITING):
                state = _observe(model, layers, shared, state, config, shape)


def _pictures(images: Canvases, mesh: Mesh | None) -> Pictures:
    """What tools of the host have returned to rows of these prompts, on the devices."""
    pictures = pictures_of(images.images)
    return jax.tree.map(jnp.asarray, pictures) if mesh is None else replicate(pictures, mesh)


class HostRollouts:
    """`host_rollout` with tools that run on the host, in the place of `rollout`.

    Args:
      host: carries out their calls; vocabulary: of the model.
    """

    def __init__(self, host: HostTools, vocabulary: Vocabulary):
        self.host, self.vocabulary = host, vocabulary

    def __call__(
        self, model: Qwen2_5_VL, prompts: Prompts, key: jax.Array, config: RolloutConfig, **options
    ) -> Trajectories:
        return host_rollout(model, prompts, key, config, host=self.host, vocabulary=self.vocabulary, **options)

    def facts(self) -> dict[str, float]:
        """For metrics, of what was rolled out since the last time."""
        return self.host.facts()


@contextlib.contextmanager
def host_rollouts(
    names: Sequence[str], tools: Sequence[Tool], vocabulary: Vocabulary, config: HostToolsConfig
) -> Iterator[HostRollouts | None]:
    """Rollouts with the `tools` of these names, their workers about them; None where no tool runs on the host.

    ToolError: several processes, which would have to wait for one another's tools.
    """
    if not any(tool.host for tool in tools):
        yield None
        return
    if jax.process_count() > 1:
        raise ToolError(f"{_of_host(tools)} run on the host: with one process only, not with {jax.process_count()}")
    say(
        f"{_of_host(tools)} run on the host: this run is driven from there, and started again it need not give the same bits"
    )
    with HostTools(names, config) as host:
        yield HostRollouts(host, vocabulary)


def _of_host(tools: Sequence[Tool]) -> str:
    """The tools that run on the host, by name."""
    return ", ".join(f"{tool.name!r}" for tool in tools if tool.host)


# The steps, compiled one by one.
_unstack = jax.jit(lambda model: model.unstack())
_start = jax.jit(start, static_argnames=("config", "shape"))
_openings = jax.jit(openings, static_argnames=("config", "shape"))
_fill = jax.jit(fill, static_argnames=("config", "shape"))
_decode = jax.jit(machine.decode, static_argnames=("config",))
_observe = jax.jit(machine.observe, static_argnames=("config", "shape"))
_tell = jax.jit(machine.tell, static_argnames=("config", "shape"))
_finish = jax.jit(finish, static_argnames=("config", "shape"))


def layout(model: Qwen2_5_VL, prompts: Prompts, config: RolloutConfig) -> tuple[Mesh | None, Shape]:
    """The mesh the model lies on (None: one device) and the static shape that follows from it and from the prompts."""
    sharding = jax.tree.leaves(model)[0].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 else None
    shards = row_parts(mesh) if mesh is not None else 1
    batch = prompts.tokens.shape[0] * share(mesh).count
    if batch % shards:
        raise ValueError(f"{batch} prompts cannot be split over data x fsdp = {shards}: pad the batch")
    if config.in_flight is not None and config.in_flight < batch and config.in_flight % shards:
        raise ValueError(f"in_flight {config.in_flight} prompts cannot be split over data x fsdp = {shards}")
    return mesh, static_shape(prompts, config, mesh)


def static_shape(prompts: Prompts, config: RolloutConfig, mesh: Mesh | None) -> Shape:
    """What is static about prompts on a mesh; all processes call it, each with its own."""
    is_video = np.asarray(prompts.is_video)
    video, still = bool(np.any(is_video)), not bool(np.all(is_video))
    if mesh is not None:
        video, still = everywhere([video, still]).any(axis=0).tolist()  # of all processes
    shards = 1 if mesh is None else row_parts(mesh)
    size, tools = prompts.canvases.shape[2:4], prompts.tables.tools
    return Shape.of(size, config, tools, shards, still=still, video=video)


def place(prompts: Prompts, mesh: Mesh | None) -> Prompts:
    """The prompts on the mesh: rows split, tables everywhere."""
    if mesh is None:
        return prompts._replace(canvases=jnp.asarray(prompts.canvases))
    rows = shard_batch(prompts._replace(tables=()), mesh)
    return rows._replace(tables=replicate(prompts.tables, mesh))


def constrain_rows(tree, mesh: Mesh | None):
    """Every array of a row-wise state split by rows, keys and values by their heads too, as the layers that write them are."""
    if mesh is None:
        return tree
    is_cache = lambda x: isinstance(x, KVCache | Prefix)

    def split(x):
        if not is_cache(x):
            return constrain(x, mesh, ROWS)
        heads = partition_spec((None, "kv"), x.k[0].shape[:2], mesh)
        by_head = constrain((x.k, x.v), mesh, ROWS, *heads[1:])
        rest = constrain(x._replace(k=(), v=()), mesh, ROWS)
        return rest._replace(k=by_head[0], v=by_head[1])

    return jax.tree.map(split, tree, is_leaf=is_cache)
