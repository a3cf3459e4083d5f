"""Chooses the rows that updates train on: groups of differing rewards, and selective sample replay (VL-Rethinker, Alg. 1)."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

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
from pixel_jax.training.checkpoint import from_bytes, to_bytes


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """The replacement of rows in groups of equal rewards, from which nothing is learned.

    `ssr`: rows of the buffer. `repeat`: the other rows again (the released code's default). `none`: they are not replaced, and
    every row is trained on. `dynamic`: rows of further rollouts, without updates in between (DAPO's dynamic sampling,
    arXiv:2503.14476, §3.2).
    """

    kind: Literal["ssr", "repeat", "none", "dynamic"] = "ssr"  # the replacement, see above
    exponent: float = 1.0  # a row is drawn with probability proportional to |advantage| ** exponent
    capacity: int = 4096  # rows of the buffer; the oldest are dropped first
    # VL-Rethinker empties the buffer after each episode, the released code never.
    life: Literal["episode", "run"] = "episode"
    episode: int = 2  # rollouts of an episode (1024 queries, 512 at a time)
    threshold: float = 0.01  # rewards of a group count as equal if they deviate by less than this on average

    def __post_init__(self):
        positive(self, "capacity", "episode")
        for name in ("exponent", "threshold"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative: {getattr(self, name)}")


class Entry(NamedTuple):
    """A row of the buffer."""

    advantage: float
    owner: int  # the process shard that has the row
    shape: BatchShape
    row: Rows | None  # a single row; None: other processes have it


class Replay:
    """A buffer of rows on the host, with their advantages and the log-probabilities with which they were sampled.

    Rows have no pixels, and those of one prompt share its images. All draws are from one NumPy generator, whose state is part of
    `get_state`. With several processes (`shard` is this one's of a batch) all draw the same rows; each keeps the rows that it
    rolled out, and sends them to the processes that train on them.
    """

    def __init__(self, config: ReplayConfig, seed: int, shard: ProcessShard = WHOLE):
        self.config, self.shard = config, shard
        self.random = np.random.default_rng(seed)
        self.rows: collections.deque[Entry] = collections.deque(maxlen=config.capacity)
        self.rollouts = 0

    def probabilities(self, shape: BatchShape) -> np.ndarray:
        """The probability that each row of the buffer is drawn, float64 [rows]: |A|^exponent, normalised.

        It is zero for rows of another shape, and for all rows if every advantage is zero.
        """
        weights = np.abs(np.array([row.advantage for row in self.rows], np.float64)) ** self.config.exponent
        weights = weights * np.array([row.shape == shape for row in self.rows], bool)
        return weights / max(weights.sum(), np.finfo(np.float64).tiny)

    def select(self, rows: Rows, nonzero_variance: np.ndarray, shape: BatchShape) -> list[Entry] | None:
        """Chooses as many rows as were rolled out (so that the number of steps is constant), in random order.

        All rows of groups whose rewards differ are chosen; the others are drawn with replacement.

        Args:
            rows: this process's shard of a host batch of R rows.
            nonzero_variance: bool [R] of all processes, whether the rewards of a row's group differ.
            shape: of the rows; only rows of the same shape are replayed.

        Returns:
            The entries; None if nothing can be learned: the rewards of every group are equal, and nothing can be replayed.
        """
        chosen = self._select(rows, nonzero_variance, shape)
        self.rollouts += 1
        if self.config.kind == "ssr" and self.config.life == "episode" and self.rollouts % self.config.episode == 0:
            self.rows.clear()  # before the next rollout, which needs the memory
        return chosen

    def entries(self, rows: Rows, which: Iterable[int], shape: BatchShape) -> list[Entry]:
        """Makes entries of the rows `which`, numbered over all processes; `rows` is this process's shard."""
        advantage = all_rows(np.asarray(rows.batch.advantage), self.shard)
        return [self._entry(rows, i, advantage, shape) for i in which]

    def _entry(
        self,
        rows: Rows,
        i: int | np.integer,
        advantage: np.ndarray,
        shape: BatchShape,
        keep: Callable[[Rows], Rows] = lambda row: row,
    ) -> Entry:
        owner, at = divmod(int(i), len(rows.images))
        return Entry(advantage[i], owner, shape, keep(take(rows, at)) if owner == self.shard.index else None)

    def _select(self, rows: Rows, nonzero_variance: np.ndarray, shape: BatchShape) -> list[Entry] | None:
        wanted = len(nonzero_variance)
        advantage = all_rows(np.asarray(rows.batch.advantage), self.shard)

        def entry(i: int | np.integer) -> Entry:
            return self._entry(rows, i, advantage, shape)

        if self.config.kind == "none":
            return [entry(i) for i in self.random.permutation(wanted)]
        current = np.flatnonzero(nonzero_variance)
        if self.config.kind == "repeat":
            if not current.size:
                return None
            return [entry(i) for i in np.resize(self.random.permutation(current), wanted)]
        self.rows.extend(self._entry(rows, i, advantage, shape, keep=copied) for i in current)
        if self.config.kind == "dynamic":
            fitting = [row for row in self.rows if row.shape == shape]
            if len(fitting) < wanted:
                return None
            self.rows.clear()  # the remaining rows were sampled by the policy that is about to change
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
        """Returns this process's shard of the rows of `entries`."""
        size, shard = len(entries) // self.shard.count, self.shard
        wanted = range(shard.index * size, (shard.index + 1) * size)

        def own(numbers: Iterable[int]) -> dict[int, Rows]:
            """The rows with these indices that this process has."""
            return {i: row for i in numbers if (row := entries[i].row) is not None}

        rows = own(wanted)
        if shard.count > 1:
            # Of the processes with the same rows, each sends to the process of its rank in another shard.
            rank = shard.processes[shard.index].index(jax.process_index())
            parcels = [b""] * jax.process_count()
            for to, processes in enumerate(shard.processes):
                others = range(to * size, (to + 1) * size) if to != shard.index else ()
                parcels[processes[rank]] = pack(own(others))
            for parcel in all_to_all(parcels):
                rows |= unpack(parcel)
        return side_by_side([rows[i] for i in wanted])

    def get_state(self) -> dict[str, Any]:
        """Returns the whole buffer as JSON values and arrays."""
        state = {"random": self.random.bit_generator.state, "rollouts": self.rollouts, "shard": self.shard.index}
        state["advantages"] = np.array([entry.advantage for entry in self.rows], np.float32)
        state["owners"] = np.array([entry.owner for entry in self.rows], np.int32)
        state["shapes"] = [list(entry.shape) for entry in self.rows]
        by_shape = collections.defaultdict(list)  # by shape
        for entry in self.rows:
            if entry.row is not None:
                by_shape[entry.shape].append(entry.row)
        state["kept"] = {str(list(shape)): stacked(rows) for shape, rows in by_shape.items()}
        return state

    def set_state(self, *states: dict[str, Any]) -> None:
        """Restores the states of all processes that saved; the number of processes may have changed."""
        kept = {(state["shard"], shape): unstacked(x) for state in states for shape, x in state["kept"].items()}
        self.random.bit_generator.state = states[0]["random"]
        self.rollouts = states[0]["rollouts"]
        self.rows.clear()
        columns = (states[0][name] for name in ("advantages", "owners", "shapes"))
        for i, (advantage, owner, shape) in enumerate(zip(*columns, strict=True)):
            row, now = next(kept[int(owner), str(list(shape))]), i % self.shard.count
            self.rows.append(Entry(advantage, now, BatchShape(*shape), row if now == self.shard.index else None))


def side_by_side(rows: Sequence[Rows]) -> Rows:
    """Stacks single rows."""
    return jax.tree.map(lambda *xs: np.stack(xs), *rows)


def copied(row: Rows) -> Rows:
    """Copies the arrays of a row, so that the memory of its batch can be freed; its images are shared."""
    return row._replace(batch=jax.tree.map(np.array, row.batch))


def stacked(rows: Sequence[Rows]) -> dict[str, Any]:
    """Converts rows of one shape to arrays; images that they share are stored once, in one flat array of all pixels.

    The images of a prompt come first, and then those that host tools returned.
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
    """Converts a named tuple, and those within it, to dictionaries."""
    return {name: as_dicts(x) for name, x in tree._asdict().items()} if hasattr(tree, "_asdict") else tree


def visual_record(state: dict[str, Any]) -> VisualRecord:
    """The inverse of `as_dicts`, for a record of images."""
    views, drawings = Views(**state["source"]["views"]), state["source"]["drawings"]
    if drawings is not None:
        drawings = Drawings(**drawings | {"values": Values(**drawings["values"])})
    fields: Any = {**state, "source": PatchSource(views, drawings)}
    return VisualRecord(**fields)


def unstacked(state: dict[str, Any]) -> Iterator[Rows]:
    """Yields the rows of `stacked`, whose inverse it is."""
    record = visual_record(state["rows"]["visual"])
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
    """Serialises rows by number."""
    return to_bytes({"numbers": list(rows), **stacked(list(rows.values()))}) if rows else b""


def unpack(parcel: bytes) -> dict[int, Rows]:
    """The inverse of `pack`."""
    if not parcel:
        return {}
    state = from_bytes(parcel)
    return dict(zip(state["numbers"], unstacked(state), strict=True))
