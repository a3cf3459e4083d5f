"""Which rows an update trains on: zero-variance groups out, selective sample replay in (VL-Rethinker, Alg. 1)."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import safetensors.numpy

from pixel_jax.models.inputs import Visual
from pixel_jax.parallel.processes import exchange
from pixel_jax.parallel.sharding import WHOLE, Share, all_rows
from pixel_jax.training.batch import Batch, take


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """`ssr`: vacant places are filled from the buffer. `repeat`: with the informative rows themselves, again (the released
    code's default). `none`: every row is trained on, informative or not. `dynamic`: rollouts go on, without updates, until
    informative rows fill all places (DAPO's dynamic sampling, arXiv:2503.14476, §3.2)."""

    kind: Literal["ssr", "repeat", "none", "dynamic"] = "ssr"
    exponent: float = 1.0  # a row is drawn with probability proportional to |advantage| ** exponent
    capacity: int = 4096  # rows; the oldest leave first
    life: Literal["episode", "run"] = (
        "episode"  # VL-Rethinker empties the buffer after each episode, the released code never
    )
    episode: int = 2  # rollouts of an episode (1024 queries, 512 at a time)
    threshold: float = 0.01  # a group is informative if its shaped rewards deviate by at least this much on average


class Entry(NamedTuple):
    """A row that can be trained on."""

    advantage: float
    owner: int  # which share of the processes has it
    room: tuple[int, ...]  # of its rollout; rows of one update are of one
    row: Batch | None  # None: it lies with others


class Replay:
    """Rows with their advantages and the log-probabilities they were sampled with, on the host, and what to draw from them.

    Rows keep only the patches they use: most of a padded row's bytes are empty. Everything is drawn from one NumPy
    generator, whose state is part of `get_state`. With several processes (`part` is what each has of a batch) every process
    draws the same, each keeps the rows that it rolled out, and those that another is to train on are sent there.
    """

    def __init__(self, config: ReplayConfig, seed: int, part: Share = WHOLE):
        self.config, self.part = config, part
        self.random = np.random.default_rng(seed)
        self.rows: collections.deque[Entry] = collections.deque(maxlen=config.capacity)
        self.rollouts = 0

    def probabilities(self, room: tuple[int, ...]) -> np.ndarray:
        """Of each row of the buffer to be drawn, float64 [rows]: |A|^exponent, normalised; zero for those of another room.
        All zero if no row has any."""
        weights = np.abs(np.array([row.advantage for row in self.rows], np.float64)) ** self.config.exponent
        weights = weights * np.array([row.room == room for row in self.rows], bool)
        return weights / max(weights.sum(), np.finfo(np.float64).tiny)

    def select(self, rows: Batch, informative: np.ndarray) -> list[Entry] | None:
        """As many rows as were rolled out (so that the number of steps is constant), in random order.

        `rows` is this process's share of a host batch of R rows, `informative` bool [R] tells of all. All informative rows
        are in; the rest is drawn with replacement. None when nothing is informative and nothing can be replayed: there is
        nothing to learn from.
        """
        wanted, mine = len(informative), rows.tokens.shape[0]
        advantage, room = all_rows(np.asarray(rows.advantage), self.part), room_of(rows)

        def entry(i: int, keep=lambda row: row) -> Entry:
            owner, at = divmod(int(i), mine)
            return Entry(advantage[i], owner, room, keep(take(rows, at)) if owner == self.part.index else None)

        if self.config.kind == "none":
            return [entry(i) for i in self.random.permutation(wanted)]
        if self.config.kind != "dynamic" and self.config.life == "episode" and self.rollouts % self.config.episode == 0:
            self.rows.clear()
        self.rollouts += 1
        current = np.flatnonzero(informative)
        if self.config.kind == "repeat":
            if not current.size:
                return None
            return [entry(i) for i in np.resize(self.random.permutation(current), wanted)]
        self.rows.extend(entry(i, trim) for i in current)
        if self.config.kind == "dynamic":
            fitting = [row for row in self.rows if row.room == room]
            if len(fitting) < wanted:
                return None
            self.rows.clear()  # what is left over was sampled by the policy that is about to change
            return [fitting[i] for i in self.random.permutation(wanted)]
        vacant, drawn = wanted - current.size, []
        probabilities = self.probabilities(room)
        if vacant and probabilities.sum() > 0:
            picks = self.random.choice(len(self.rows), vacant, p=probabilities / probabilities.sum())
            drawn = [self.rows[i] for i in picks]
        if not current.size and not drawn:
            return None
        chosen = [entry(i) for i in current] + drawn
        return [chosen[i] for i in np.resize(self.random.permutation(len(chosen)), wanted)]

    def batch(self, entries: Sequence[Entry], like: Batch) -> Batch:
        """The rows themselves, patches as wide as those of `like`; of several processes, each gets its share of them."""
        size, part = len(entries) // self.part.count, self.part
        wanted = range(part.index * size, (part.index + 1) * size)
        found = {i: entries[i].row for i in wanted if entries[i].owner == part.index}
        if part.count > 1:
            # Of processes with the same rows, the one of the same rank sends.
            rank = part.processes[part.index].index(jax.process_index())
            parcels = [b""] * jax.process_count()
            for to, processes in enumerate(part.processes):
                theirs = range(to * size, (to + 1) * size) if to != part.index else ()
                parcels[processes[rank]] = pack({i: entries[i].row for i in theirs if entries[i].owner == part.index})
            for parcel in exchange(parcels):
                found |= unpack(parcel, like)
        shape = like.visual.patches.shape[1:]
        return jax.tree.map(lambda *xs: np.stack(xs), *[widen(found[i], shape) for i in wanted])

    def get_state(self) -> dict[str, Any]:
        """Everything as JSON values and arrays; the patches of the rows kept here in one flat array beside their shapes."""
        state = {"random": self.random.bit_generator.state, "rollouts": self.rollouts, "part": self.part.index}
        state["advantages"] = np.array([entry.advantage for entry in self.rows], np.float32)
        state["owners"] = np.array([entry.owner for entry in self.rows], np.int32)
        state["rooms"] = [list(entry.room) for entry in self.rows]
        kept = collections.defaultdict(list)  # by room
        for entry in self.rows:
            if entry.row is not None:
                kept[entry.room].append(entry.row)
        state["kept"] = {str(list(room)): stacked(rows) for room, rows in kept.items()}
        return state

    def set_state(self, *states: dict[str, Any]) -> None:
        """Back to a state of `get_state`; with those of all processes, however many there were and are."""
        kept = {(state["part"], room): unstacked(x) for state in states for room, x in state["kept"].items()}
        self.random.bit_generator.state = states[0]["random"]
        self.rollouts = states[0]["rollouts"]
        self.rows.clear()
        facts = (states[0][name] for name in ("advantages", "owners", "rooms"))
        for i, (advantage, owner, room) in enumerate(zip(*facts, strict=True)):
            row, now = next(kept[int(owner), str(list(room))]), i % self.part.count
            self.rows.append(Entry(advantage, now, tuple(room), row if now == self.part.index else None))


def room_of(rows: Batch) -> tuple[int, ...]:
    """What tells the shapes of one rollout's rows from those of another: tokens, frames, patches of a frame."""
    return rows.tokens.shape[1], *rows.visual.patches.shape[1:3]


def stacked(rows: Sequence[Batch]) -> dict[str, Any]:
    """Rows of one room as arrays; their patches, as many as each has, in one flat array beside their shapes."""
    patches = [row.visual.patches for row in rows]
    rest = [row._replace(visual=row.visual._replace(patches=np.zeros(0, np.uint8))) for row in rows]
    whole = jax.tree.map(lambda *xs: np.stack(xs), *rest)
    return {
        "patches": np.concatenate([x.ravel() for x in patches]),
        "patch_shapes": np.array([x.shape for x in patches], np.int32),
        "rows": whole._replace(visual=whole.visual._asdict())._asdict(),
    }


def unstacked(state: dict[str, Any]) -> Iterator[Batch]:
    """The inverse of `stacked`, one row after the other."""
    rows = Batch(**(state["rows"] | {"visual": Visual(**state["rows"]["visual"])}))
    ends = np.cumsum(np.prod(state["patch_shapes"].astype(np.int64), axis=1))
    for i, (shape, end) in enumerate(zip(state["patch_shapes"], ends, strict=True)):
        row = take(rows, i)
        patches = state["patches"][end - int(np.prod(shape, dtype=np.int64)) : end].reshape(shape)
        yield row._replace(visual=row.visual._replace(patches=patches))


def pack(rows: dict[int, Batch]) -> bytes:
    """Rows by number, their patches trimmed, as safetensors."""
    leaves = {f"{i}.{j}": x for i, row in rows.items() for j, x in enumerate(jax.tree.leaves(trim(row)))}
    return safetensors.numpy.save(leaves) if leaves else b""


def unpack(parcel: bytes, like: Batch) -> dict[int, Batch]:
    """The inverse of `pack`; `like` has the structure of the rows."""
    leaves = safetensors.numpy.load(parcel) if parcel else {}
    structure = jax.tree.structure(like)
    numbers = {int(name.split(".")[0]) for name in leaves}
    return {i: structure.unflatten([leaves[f"{i}.{j}"] for j in range(structure.num_leaves)]) for i in numbers}


def trim(row: Batch) -> Batch:
    """One row with copies of its arrays, its patches cut to the frames and to the patches a frame that it uses."""
    row = jax.tree.map(np.array, row)
    frames = int(row.visual.slices.max(initial=-1)) + 1
    patches = int((row.visual.grids[:, 1] * row.visual.grids[:, 2]).max(initial=0))
    return row._replace(visual=row.visual._replace(patches=row.visual.patches[:frames, :patches].copy()))


def widen(row: Batch, shape: tuple[int, int, int]) -> Batch:
    """The inverse of `trim`, to patches of `shape` [F, P, 588]."""
    patches = row.visual.patches
    if patches.shape == tuple(shape):
        return row
    if any(have > room for have, room in zip(patches.shape, shape, strict=True)):
        raise ValueError(f"a replayed row has patches {patches.shape}, this batch has room for {shape}")
    padding = [(0, room - have) for have, room in zip(patches.shape, shape, strict=True)]
    return row._replace(visual=row.visual._replace(patches=np.pad(patches, padding)))
