"""Which rows an update trains on: zero-variance groups out, selective sample replay in (VL-Rethinker, Alg. 1)."""

import collections
import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import safetensors.numpy

from pixel_jax.config import positive
from pixel_jax.parallel.processes import all_to_all
from pixel_jax.parallel.sharding import WHOLE, ProcessShard, all_rows
from pixel_jax.rollouts.drawings import Drawings
from pixel_jax.rollouts.images import Images
from pixel_jax.rollouts.materialize import PatchSource, VisualRecord
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.rollouts.trajectory import Views
from pixel_jax.tools.calls import Values
from pixel_jax.training.batch import Batch, Rows, take
from pixel_jax.training.checkpoint import rejoin, separate


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """`ssr`: vacant places are filled from the buffer. `repeat`: with the informative rows themselves, again (the released
    code's default). `none`: every row is trained on, informative or not. `dynamic`: rollouts go on, without updates, until
    informative rows fill all places (DAPO's dynamic sampling, arXiv:2503.14476, §3.2).
    """

    kind: Literal["ssr", "repeat", "none", "dynamic"] = "ssr"  # what fills the places of rows that teach nothing
    exponent: float = 1.0  # a row is drawn with probability proportional to |advantage| ** exponent
    capacity: int = 4096  # rows; the oldest leave first
    life: Literal["episode", "run"] = (
        "episode"  # VL-Rethinker empties the buffer after each episode, the released code never
    )
    episode: int = 2  # rollouts of an episode (1024 queries, 512 at a time)
    threshold: float = 0.01  # a group is informative if its shaped rewards deviate by at least this much on average

    def __post_init__(self):
        positive(self, "capacity", "episode")
        for name in ("exponent", "threshold"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative: {getattr(self, name)}")


class Entry(NamedTuple):
    """A row that can be trained on."""

    advantage: float
    owner: int  # which share of the processes has it
    shape: BatchShape
    row: Rows | None  # a single one; None: it lies with others


class Replay:
    """Rows with their advantages and the log-probabilities they were sampled with, on the host, and what to draw from them.

    Rows have no pixels, and those of one prompt share its images. Everything is drawn from one NumPy generator,
    whose state is part of `get_state`. With several processes (`shard` is what each has of a batch) every process
    draws the same, each keeps the rows that it rolled out, and those that another is to train on are sent there.
    """

    def __init__(self, config: ReplayConfig, seed: int, shard: ProcessShard = WHOLE):
        self.config, self.shard = config, shard
        self.random = np.random.default_rng(seed)
        self.rows: collections.deque[Entry] = collections.deque(maxlen=config.capacity)
        self.rollouts = 0

    def probabilities(self, shape: BatchShape) -> np.ndarray:
        """Of each row of the buffer to be drawn, float64 [rows]: |A|^exponent, normalised; zero for those of another shape.
        All zero if no row has any.
        """
        weights = np.abs(np.array([row.advantage for row in self.rows], np.float64)) ** self.config.exponent
        weights = weights * np.array([row.shape == shape for row in self.rows], bool)
        return weights / max(weights.sum(), np.finfo(np.float64).tiny)

    def select(self, rows: Rows, informative: np.ndarray, shape: BatchShape) -> list[Entry] | None:
        """As many rows as were rolled out (so that the number of steps is constant), in random order.

        `rows` is this process's share of a host batch of R rows, `informative` bool [R] tells of all. All informative rows
        are in; the rest is drawn with replacement. None when nothing is informative and nothing can be replayed: there is
        nothing to learn from.
        """
        chosen = self._select(rows, informative, shape)
        self.rollouts += 1
        if self.config.kind == "ssr" and self.config.life == "episode" and self.rollouts % self.config.episode == 0:
            self.rows.clear()  # at once: the next rollout needs the memory
        return chosen

    def entries(self, rows: Rows, which: Iterable[int], shape: BatchShape) -> list[Entry]:
        """The rows `which` (numbers among those of all processes) of `rows`, this process's share, to be trained on."""
        advantage = all_rows(np.asarray(rows.batch.advantage), self.shard)
        return [self._entry(rows, i, advantage, shape) for i in which]

    def _entry(self, rows: Rows, i: int, advantage: np.ndarray, shape: BatchShape, keep=lambda row: row) -> Entry:
        owner, at = divmod(int(i), len(rows.images))
        return Entry(advantage[i], owner, shape, keep(take(rows, at)) if owner == self.shard.index else None)

    def _select(self, rows: Rows, informative: np.ndarray, shape: BatchShape) -> list[Entry] | None:
        wanted = len(informative)
        advantage = all_rows(np.asarray(rows.batch.advantage), self.shard)

        def entry(i: int, **options) -> Entry:
            return self._entry(rows, i, advantage, shape, **options)

        if self.config.kind == "none":
            return [entry(i) for i in self.random.permutation(wanted)]
        current = np.flatnonzero(informative)
        if self.config.kind == "repeat":
            if not current.size:
                return None
            return [entry(i) for i in np.resize(self.random.permutation(current), wanted)]
        self.rows.extend(entry(i, keep=copied) for i in current)
        if self.config.kind == "dynamic":
            fitting = [row for row in self.rows if row.shape == shape]
            if len(fitting) < wanted:
                return None
            self.rows.clear()  # what is left over was sampled by the policy that is about to change
            return [fitting[i] for i in self.random.permutation(wanted)]
        vacant, drawn = wanted - current.size, []
        probabilities = self.probabilities(shape)
        if vacant and probabilities.sum() > 0:
            picks = self.random.choice(len(self.rows), vacant, p=probabilities / probabilities.sum())
            drawn = [self.rows[i] for i in picks]
        if not current.size and not drawn:
            return None
        chosen = [entry(i) for i in current] + drawn
        return [chosen[i] for i in np.resize(self.random.permutation(len(chosen)), wanted)]

    def batch(self, entries: Sequence[Entry]) -> Rows:
        """The rows themselves; of several processes, each gets its share of them."""
        size, shard = len(entries) // self.shard.count, self.shard
        wanted = range(shard.index * size, (shard.index + 1) * size)
        found = {i: entries[i].row for i in wanted if entries[i].owner == shard.index}
        if shard.count > 1:
            # Of processes with the same rows, the one of the same rank sends.
            rank = shard.processes[shard.index].index(jax.process_index())
            parcels = [b""] * jax.process_count()
            for to, processes in enumerate(shard.processes):
                theirs = range(to * size, (to + 1) * size) if to != shard.index else ()
                parcels[processes[rank]] = pack({i: entries[i].row for i in theirs if entries[i].owner == shard.index})
            for parcel in all_to_all(parcels):
                found |= unpack(parcel)
        return side_by_side([found[i] for i in wanted])

    def get_state(self) -> dict[str, Any]:
        """Everything as JSON values and arrays."""
        state = {"random": self.random.bit_generator.state, "rollouts": self.rollouts, "shard": self.shard.index}
        state["advantages"] = np.array([entry.advantage for entry in self.rows], np.float32)
        state["owners"] = np.array([entry.owner for entry in self.rows], np.int32)
        state["shapes"] = [list(entry.shape) for entry in self.rows]
        kept = collections.defaultdict(list)  # by shape
        for entry in self.rows:
            if entry.row is not None:
                kept[entry.shape].append(entry.row)
        state["kept"] = {str(list(shape)): stacked(rows) for shape, rows in kept.items()}
        return state

    def set_state(self, *states: dict[str, Any]) -> None:
        """Back to a state of `get_state`; with those of all processes, however many there were and are."""
        kept = {(state["shard"], shape): unstacked(x) for state in states for shape, x in state["kept"].items()}
        self.random.bit_generator.state = states[0]["random"]
        self.rollouts = states[0]["rollouts"]
        self.rows.clear()
        columns = (states[0][name] for name in ("advantages", "owners", "shapes"))
        for i, (advantage, owner, shape) in enumerate(zip(*columns, strict=True)):
            row, now = next(kept[int(owner), str(list(shape))]), i % self.shard.count
            self.rows.append(Entry(advantage, now, BatchShape(*shape), row if now == self.shard.index else None))


def side_by_side(rows: Sequence[Rows]) -> Rows:
    return jax.tree.map(lambda *xs: np.stack(xs), *rows)


def copied(row: Rows) -> Rows:
    """One row with copies of its arrays, so that the rows around it can go; its images are shared."""
    return row._replace(batch=jax.tree.map(np.array, row.batch))


def stacked(rows: Sequence[Rows]) -> dict[str, Any]:
    """Rows of one shape as arrays, the images that they share once: all pixels in one flat array beside their shapes. Of every
    prompt its own come first, then those that tools of the host returned.
    """
    together = side_by_side(rows)
    prompts = list({id(images): images for images in together.images}.values())
    number = {id(images): i for i, images in enumerate(prompts)}
    arrays = [x for images in prompts for x in (*images.arrays, *images.returned.values())]
    return {
        "pixels": np.concatenate([x.ravel() for x in arrays]),
        "shapes": np.array([x.shape for x in arrays], np.int32),
        "images": np.array([len(images.arrays) for images in prompts], np.int32),  # of each prompt
        "returned": np.array([len(images.returned) for images in prompts], np.int32),
        "prompt": np.array([number[id(images)] for images in together.images], np.int32),  # of each row
        "rows": as_dicts(together.batch),
    }


def as_dicts(tree: Any) -> Any:
    """A named tuple, and those in it, as dictionaries."""
    return {name: as_dicts(x) for name, x in tree._asdict().items()} if hasattr(tree, "_asdict") else tree


def unstacked(state: dict[str, Any]) -> Iterator[Rows]:
    """The inverse of `stacked`, one row after the other."""
    visual = state["rows"]["visual"]
    views, drawings = Views(**visual["source"]["views"]), visual["source"]["drawings"]
    if drawings is not None:
        drawings = Drawings(**drawings | {"values": Values(**drawings["values"])})
    record = VisualRecord(**visual | {"source": PatchSource(views, drawings)})
    ends = np.cumsum(np.prod(state["shapes"].astype(np.int64), axis=1))
    arrays = (
        state["pixels"][end - int(np.prod(shape, dtype=np.int64)) : end].reshape(shape)
        for shape, end in zip(state["shapes"], ends, strict=True)
    )
    prompts = np.empty(len(state["images"]), object)
    for i, (own, returned) in enumerate(zip(state["images"], state["returned"], strict=True)):
        prompts[i] = Images(tuple(next(arrays) for _ in range(own)))
        for _ in range(returned):
            prompts[i].keep(next(arrays))
    rows = Rows(Batch(**state["rows"] | {"visual": record}), prompts[state["prompt"]])
    yield from (take(rows, i) for i in range(len(rows.images)))


def pack(rows: dict[int, Rows]) -> bytes:
    """Rows by number, as safetensors."""
    if not rows:
        return b""
    arrays: dict[str, np.ndarray] = {}
    document = separate({"numbers": list(rows), **stacked(list(rows.values()))}, arrays, "")
    return safetensors.numpy.save(arrays | {"document": np.frombuffer(json.dumps(document).encode(), np.uint8)})


def unpack(parcel: bytes) -> dict[int, Rows]:
    """The inverse of `pack`."""
    if not parcel:
        return {}
    arrays = safetensors.numpy.load(parcel)
    state = rejoin(json.loads(arrays["document"].tobytes()), arrays)
    return dict(zip(state["numbers"], unstacked(state), strict=True))
