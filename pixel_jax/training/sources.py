"""Where the rows of an iteration come from, and when they are rolled out.

`WholeBatches` rolls out every row of a batch of questions, to its end. `CarriedRows` ends a rollout by a budget: rows that are
not done carry over to the next. Each has `roll(actor, i, number)`, which returns the rows of iteration i, written by `actor`, the
policy after `number` iterations.

`Together` calls it when the rows are wanted. `Ahead` calls it in a thread, up to `staleness` iterations before, on devices of its
own: while iteration i is trained on, the rows of later ones are written. The loop only takes from one of these two, a `Source`.

A checkpoint holds tokens and their records, but no images or examples: questions are read again from the data.

With several processes each reads all questions of these sources, and rolls out its own (`own_part`); the rows are known to all,
so that all choose the same, as one process would, and the main process saves them. Where training has processes of its own,
these only read the questions, and are sent the rows (`Ahead`).
"""

import collections
import concurrent.futures
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import numpy as np

from pixel_jax.arrays import AnyArray
from pixel_jax.models.model import Model
from pixel_jax.parallel.processes import among, barrier, gather_bytes, is_main_process, members
from pixel_jax.parallel.sharding import NONE, ProcessShard, all_rows, local_rows, process_shard
from pixel_jax.rollouts.partial import no_records, partial_rollout
from pixel_jax.rollouts.queue import RowRecord
from pixel_jax.rollouts.rollout import check_records, static_shape
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.rollouts.timing import seconds_of_operations
from pixel_jax.rollouts.trajectory import Calls, HostPrompts, Trajectories, Views, take_prompts, take_rows
from pixel_jax.terminal import say
from pixel_jax.tools.calls import Values
from pixel_jax.training.checkpoint import from_bytes, to_bytes
from pixel_jax.training.loop import Local, Stateful, Timer
from pixel_jax.training.preemption import NoNotice
from pixel_jax.training.replay import as_dicts, visual_record
from pixel_jax.training.stages import Collected, Questions, collect, concatenated
from pixel_jax.training.state import TrainState

if TYPE_CHECKING:
    from pixel_jax.training.rl import Learner


class Source(Protocol):
    """What the loop takes the rows of an iteration from."""

    host: Mapping[str, Stateful]  # objects whose state is saved, as in `RunSteps`
    local: Mapping[str, Local]

    def take(self, state: TrainState, i: int) -> Collected:
        """Returns the rows of iteration i, whose training begins from `state`."""
        ...

    def wait(self) -> None:
        """Waits for the rollouts that were begun."""

    def done(self) -> None:
        """Says that the rows that were taken last have been trained on: they are not needed after a restart."""

    def close(self) -> None:
        """Ends the source."""


class Roller(Protocol):
    """What rolls out the rows of an iteration."""

    def roll(self, actor: Model, i: int, number: int) -> Collected:
        """Returns the rows of iteration i, written by `actor`, the policy after `number` iterations."""
        ...

    def get_state(self) -> Any:
        """Returns the state, with which rolling out goes on after a restart. It does not change afterwards."""

    def set_state(self, state: Any, batches: Mapping[int, Questions]) -> None:
        """Restores a state; `batches` are the questions that it names."""

    def close(self) -> None:
        """Says what is dropped at the end of a run."""


class QuestionLog:
    """The questions of a run: batches by number, in the order in which they are asked.

    Its state is small: the states of the data before the batches that a restart needs, which are then read again.
    """

    def __init__(self, data: Stateful, ask: Callable[[int], Questions]):
        self.data, self.ask_for = data, ask
        self.asked = 0
        self.before: dict[int, Any] = {}  # batch -> the state of the data before it

    def ask(self, iteration: int) -> Questions:
        """Reads the next batch; each prompt's `uid` are the number of its batch and its index there."""
        number, self.asked = self.asked, self.asked + 1
        self.before = {**self.before, number: self.data.get_state()}
        questions = self.ask_for(iteration)
        index = np.arange(len(questions.examples), dtype=np.int32)
        uid = np.stack([np.full_like(index, number), index], axis=1)
        return questions._replace(prompts=questions.prompts._replace(uid=uid))

    def get_state(self, needed: set[int]) -> dict[str, Any]:
        """Returns the state with which the batches `needed`, by number, can be read again. It forgets the others."""
        self.before = {number: state for number, state in self.before.items() if number in needed}
        before = {str(number): state for number, state in self.before.items()}
        return {"asked": self.asked, "data": self.data.get_state(), "before": before}

    def set_state(self, state: Mapping[str, Any]) -> dict[int, Questions]:
        """Restores a state, and returns its batches, by number."""
        batches = {}
        for number, before in state["before"].items():
            self.data.set_state(before)
            self.asked = int(number)
            batches[int(number)] = self.ask(0)
        self.data.set_state(state["data"])
        self.asked, self.before = state["asked"], {int(number): x for number, x in state["before"].items()}
        return batches


class WholeBatches:
    """Rolls out all rows of a batch of questions an iteration, by the stage `collect`."""

    def __init__(self, learner: "Learner", ask: Callable[[int], Questions]):
        self.learner, self.ask = learner, ask

    def roll(self, actor: Model, i: int, number: int) -> Collected:
        """See `Roller`."""
        learner, questions = self.learner, self.ask(i)
        learner.timer.lap("input")
        whole = learner.reads.count < learner.shard.count  # each process has all questions, and rolls out its own
        collected = learner.stages.collect(learner, actor, part_of(questions, learner.shard) if whole else questions)
        if whole:
            uid = np.arange(len(questions.examples), dtype=np.int32)
            questions = questions._replace(prompts=questions.prompts._replace(uid=uid))
            collected = collected._replace(questions=questions, trajectories=collected.records)
        if number == i:  # the policy that is trained next, so that there is nothing to note
            return collected
        written = lambda t: t._replace(policy=np.where(t.loss_mask, number, -1).astype(np.int32))
        return collected._replace(trajectories=written(collected.trajectories), records=written(collected.records))

    def get_state(self) -> dict[str, Any]:
        """See `Roller`."""
        return {}

    def set_state(self, state: Any, batches: Mapping[int, Questions]) -> None:
        """See `Roller`."""

    def close(self) -> None:
        """See `Roller`."""


class Waiting(NamedTuple):
    """G prompts of one shape, some of whose rows are not done, or which wait for others to fill an update: on the host."""

    prompts: HostPrompts
    examples: Sequence[Any]
    sizes: Sequence[Any] | None
    records: RowRecord  # [G * n]
    policy: np.ndarray  # int32 [G * n, L], as `Trajectories.policy`, of responses

    @classmethod
    def of(cls, questions: Questions, records: RowRecord, policy: np.ndarray | None = None) -> "Waiting":
        """Makes the value of `questions` with the records of their rows."""
        policy = np.full(records.tokens.shape, -1, np.int32) if policy is None else policy
        return cls(questions.prompts, list(questions.examples), questions.sizes, records, policy)

    @property
    def prompt_count(self) -> int:
        """G."""
        return len(self.examples)

    @property
    def unfinished(self) -> int:
        """The number of rows that were begun and are not done."""
        return int(np.sum((self.records.length > 0) & (self.records.stop < 0)))

    def take(self, which: np.ndarray) -> "Waiting":
        """Takes prompts by their indices, int [k], with all their rows."""
        rows = rows_of(which, len(self.policy) // max(self.prompt_count, 1))
        of_rows = lambda tree: jax.tree.map(lambda x: np.asarray(x)[rows], tree)
        sizes = None if self.sizes is None else [self.sizes[i] for i in which]
        examples = [self.examples[i] for i in which]
        return Waiting(take_prompts(self.prompts, which), examples, sizes, of_rows(self.records), of_rows(self.policy))

    def join(self, other: "Waiting") -> "Waiting":
        """Appends the prompts of `other`."""
        questions = concatenated([x.questions(0) for x in (self, other)])
        records = jax.tree.map(lambda x, y: np.concatenate([x, y]), self.records, other.records)
        return Waiting.of(questions, records, np.concatenate([self.policy, other.policy]))

    def questions(self, iteration: int) -> Questions:
        """Returns the questions, as those of an iteration."""
        return Questions(iteration, self.prompts, self.examples, self.sizes)


def rows_of(prompts: np.ndarray, group: int) -> np.ndarray:
    """Returns the indices of the rows of prompts, `group` of each."""
    return (np.asarray(prompts, np.int64)[:, None] * group + np.arange(group)).reshape(-1)


class CarriedRows:
    """Rolls out until `config.rollout_budget` is spent; rows that are not done carry over to the next rollout.

    A rollout goes on with the prompts that wait, the oldest first, and fills up with new questions. An advantage is a comparison
    in a group. So a prompt is handed on when all its rows are done; and only as many as fill whole updates, the others wait. If
    they fill none, rolling out goes on. Batches of questions differ in shape, and a rollout has one: that of which most prompts
    wait, or else of the oldest.
    """

    def __init__(self, learner: "Learner", log: QuestionLog):
        self.learner, self.log = learner, log
        self.waiting: dict[BatchShape, Waiting] = {}

    def roll(self, actor: Model, i: int, number: int) -> Collected:
        """See `Roller`."""
        learner, config = self.learner, self.learner.config
        group = config.rollout.group_size
        # Prompts that fill whole updates, with as many of each process.
        unit = np.lcm(config.train_batch // np.gcd(config.train_batch, group), learner.trains.count)
        resumed, calls = None, 0
        while True:
            now = self._next(i)
            resumed = now.unfinished if resumed is None else resumed
            learner.timer.lap("input")
            trajectories, now = self._write(actor, now, number)
            learner.timer.lap("rollout")
            ended, calls = np.flatnonzero(np.all(now.records.stop.reshape(-1, group) >= 0, axis=1)), calls + 1
            ready = ended[: len(ended) // unit * unit]
            rest, shape = now.take(np.setdiff1d(np.arange(now.prompt_count), ready)), now.prompts.shape
            self.waiting[shape] = rest.join(self.waiting[shape])
            if ready.size:
                break
        metrics: dict[str, float] = {
            "rollout_calls": calls,
            "rows_resumed": resumed,  # rows that were begun in an earlier iteration
            "rows_carried": rest.unfinished,
            "prompts_waiting": sum(x.prompt_count for x in self.waiting.values()),
        }
        if config.time_operations and i % config.time_operations == 0:  # of all rows, also what they were shown before
            mine = own_part(now.prompt_count, learner.shard)
            prompts, own = take_prompts(now.prompts, mine), take_rows(trajectories, rows_of(mine, group))
            metrics["seconds_operations"] = seconds_of_operations(actor, prompts, own, config.rollout)
            learner.timer.lap("timing")
        questions = now.take(ready).questions(i)
        rows = take_rows(trajectories, rows_of(ready, group))
        rows = rows._replace(prompt=np.repeat(np.arange(len(ready), dtype=np.int32), group))
        return Collected(questions, rows, rows, static_shape(questions.prompts, config.rollout, learner.mesh), metrics)

    def _write(self, actor: Model, now: Waiting, number: int) -> tuple[Trajectories, Waiting]:
        """Goes on with rows until the budget is spent, and notes the policy of new tokens: on the host, of all processes."""
        config, key, shard = self.learner.config, jax.random.key(self.learner.config.seed), self.learner.shard
        mine = now.take(own_part(now.prompt_count, shard)) if shard.count > 1 else now
        written = partial_rollout(actor, mine.prompts, mine.records, key, config.rollout, config.rollout_budget)
        trajectories, records = all_rows(jax.tree.map(local_rows, written), shard)
        policy = np.where(now.policy < 0, number, now.policy)
        policy = np.where(records.loss_mask, policy, -1).astype(np.int32)
        prompt_width = trajectories.tokens.shape[1] - policy.shape[1]
        whole = np.pad(policy, ((0, 0), (prompt_width, 0)), constant_values=-1)
        return trajectories._replace(policy=whole), now._replace(records=records, policy=policy)

    def _next(self, i: int) -> Waiting:
        """Takes as many prompts as an iteration has from those that wait, after asking for as many as are missing."""
        count = self.learner.config.prompts
        self.waiting = {shape: x for shape, x in self.waiting.items() if x.prompt_count}
        while max((x.prompt_count for x in self.waiting.values()), default=0) < count:
            questions = self.log.ask(i)
            new = Waiting.of(questions, no_records(questions.prompts, self.learner.config.rollout))
            shape = questions.prompts.shape
            self.waiting[shape] = self.waiting[shape].join(new) if shape in self.waiting else new
        shape, chosen = max(self.waiting.items(), key=lambda item: (item[1].prompt_count, *-item[1].prompts.uid[0]))
        self.waiting[shape] = chosen.take(np.arange(count, chosen.prompt_count))
        return chosen.take(np.arange(count))

    def get_state(self) -> dict[str, Any]:
        """See `Roller`."""
        return {
            "waiting": [
                {"uid": x.prompts.uid, "records": jax.tree.leaves(x.records), "policy": x.policy}
                for x in self.waiting.values()
                if x.prompt_count
            ]
        }

    def set_state(self, state: Any, batches: Mapping[int, Questions]) -> None:
        """See `Roller`. ValueError: the rows are of other shapes than this run's."""
        self.waiting = {}
        for saved in state["waiting"]:
            questions = named(batches, saved["uid"])
            empty = no_records(questions.prompts, self.learner.config.rollout)
            if len(saved["records"]) != len(jax.tree.leaves(empty)):
                raise ValueError(
                    f"rows that carry over have {len(saved['records'])} arrays, this rollout needs "
                    f"{len(jax.tree.leaves(empty))}: go on with the tools that the run was begun with"
                )
            records = jax.tree.unflatten(jax.tree.structure(empty), saved["records"])
            check_records(records, questions.prompts, self.learner.config.rollout)
            self.waiting[questions.prompts.shape] = Waiting.of(questions, records, saved["policy"])

    def close(self) -> None:
        """See `Roller`."""
        waiting = self.waiting.values()
        if begun := sum(x.unfinished for x in waiting):
            prompts = sum(x.prompt_count for x in waiting)
            say(f"{begun} rows of {prompts} prompts were not done when the run ended, and are not trained on")


def named(batches: Mapping[int, Questions], uid: np.ndarray) -> Questions:
    """Returns the questions with these `uid`, int32 [G, 2]: the number of a batch, and the index there."""
    parts = [(batches[int(number)], [int(index)]) for number, index in uid]
    one = lambda batch, at: Questions(
        0,
        take_prompts(batch.prompts, at),
        [batch.examples[at[0]]],
        None if batch.sizes is None else [batch.sizes[at[0]]],
    )
    return concatenated([one(batch, at) for batch, at in parts])


def own_part(count: int, shard: ProcessShard) -> np.ndarray:
    """Returns the indices of a shard's part of `count` prompts, of which each shard has as many."""
    size = count // shard.count
    return np.arange(shard.index * size, (shard.index + 1) * size)


def part_of(questions: Questions, shard: ProcessShard) -> Questions:
    """Returns a shard's part of the questions of all processes."""
    if shard.count == 1:
        return questions
    mine = own_part(len(questions.examples), shard)
    sizes = None if questions.sizes is None else [questions.sizes[i] for i in mine]
    return Questions(
        questions.iteration, take_prompts(questions.prompts, mine), [questions.examples[i] for i in mine], sizes
    )


def shared(collected: Collected, shard: ProcessShard) -> Collected:
    """Returns the rows of all processes as those of one that trains on the part `shard` of them."""
    if shard.count == 1:
        return collected
    group = len(collected.records.stop) // len(collected.questions.examples)
    mine = rows_of(own_part(len(collected.questions.examples), shard), group)
    return collected._replace(
        questions=part_of(collected.questions, shard), trajectories=take_rows(collected.records, mine)
    )


class Together:
    """Rolls out when the rows are wanted: rollouts and training take turns."""

    def __init__(self, roller: Roller, learner: "Learner", log: QuestionLog | None = None):
        """`log`: of the questions; None: the state of the data is all that there is to save."""
        self.roller, self.learner, self.log = roller, learner, log
        self.before: dict[str, Any] | None = None  # the state before the rows that were taken last
        self.host: Mapping[str, Stateful] = {"data": learner.data} if log is None else {}
        self.local: Mapping[str, Local] = {} if log is None else {"rollouts": self}

    def take(self, state: TrainState, i: int) -> Collected:
        """See `Source`."""
        self.before = None if self.log is None else self._state()
        # The actor is not bound to a name here: if it is a copy, its memory is free for the updates.
        collected = self.roller.roll(self.learner.policy(state), i, i)
        return collected if self.log is None else shared(collected, self.learner.trains)

    def wait(self) -> None:
        """See `Source`: there are none."""

    def done(self) -> None:
        """See `Source`."""
        self.before = None

    def get_state(self) -> dict[str, Any]:
        """Returns the questions and the rows that carry over; those before the current iteration, while it may be abandoned.

        They are the same in all processes, so that the main process alone has a state.
        """
        state = self._state() if self.before is None else self.before
        return state if is_main_process() else {}

    def _state(self) -> dict[str, Any]:
        assert self.log is not None
        state = self.roller.get_state()
        return {"roller": state, "log": self.log.get_state(numbers_in(state.get("waiting", ())))}

    def set_state(self, *states: Any) -> None:
        """Restores the states of `get_state` of all processes."""
        assert self.log is not None
        state = states[0]
        self.roller.set_state(state["roller"], self.log.set_state(state["log"]))

    def close(self) -> None:
        """See `Source`."""
        self.roller.close()


def numbers_in(saved: Sequence[Mapping[str, Any]]) -> set[int]:
    """Returns the numbers of the batches whose prompts are in `saved`."""
    return {int(number) for x in saved for number in x["uid"][:, 0]}


class Ahead:
    """Rolls out in a thread, on devices of its own, so that rollouts and training overlap.

    The rows of iteration i are written by the policy after max(0, i - staleness) iterations: they are begun when that many are
    done, whatever takes longer. A rollout that was begun is not abandoned, because the weights that it was begun with are gone
    after a restart: a checkpoint waits for it, and holds its rows.

    With several processes, either each has devices of both pools, or each pool has processes of its own (`across`). Then those of
    rollouts send the rows to those of training, and all meet at the beginning and at the end of an iteration; what was begun is
    written by its end. In each process the two pools exchange arrays by their own devices (`among`), so that neither waits for
    the other.
    """

    host: Mapping[str, Stateful] = {}

    def __init__(self, roller: Roller, learner: "Learner", log: QuestionLog):
        """`learner`: that of the rollouts, whose timer is started anew for each."""
        self.roller, self.learner, self.log = roller, learner, log
        self.begun = 0  # iterations whose rollout was begun
        self.jobs: collections.OrderedDict[int, concurrent.futures.Future[Collected]] = collections.OrderedDict()
        self.taken: int | None = None
        self.idle_since = time.monotonic()  # when the last rollout ended
        self.pool = concurrent.futures.ThreadPoolExecutor(1, "rollouts")
        self.local: Mapping[str, Local] = {"rollouts": self}
        self.across = learner.pools.across
        self.read = ReadAlong(log)  # the questions, in a process that does not roll out

    def take(self, state: TrainState, i: int) -> Collected:
        """See `Source`. It waits for the rows, which the metric `seconds_waiting` shows."""
        learner, self.begun, self.taken = self.learner, max(self.begun, i), i
        last = min(i + learner.config.staleness, learner.config.iterations - 1)
        actor = None
        if self.begun <= last:
            if self.across:
                barrier(f"weights for iteration {self.begun}")  # which waits longer than a collective does
            actor = learner.policy(state)
        # Between processes the rows are sent before later rollouts begin, for which the sending would wait.
        self._begin(actor, i, i if self.across else last)
        collected = self._sent(i) if self.across else self.jobs[i].result()
        self._begin(actor, i, last)
        return shared(collected, learner.trains)

    def _begin(self, actor: Model | None, number: int, last: int) -> None:
        """Begins the rollouts up to that of iteration `last`, in a process that rolls out."""
        while self.begun <= last:
            if self.learner.pools.rolls:
                assert actor is not None
                self.jobs[self.begun] = self.pool.submit(self._roll, actor, self.begun, number)
            self.begun += 1

    def _sent(self, i: int) -> Collected:
        """Sends the rows of iteration i to the processes of training, and returns them."""
        job = self.jobs.get(i)
        collected = None if job is None else job.result()
        barrier(f"rows of iteration {i}")
        state = self._of_rollouts({} if collected is None else saved(collected))
        if collected is None:
            collected = restored(state, self.read.batches_of(state["uid"]), self.learner)
            self.read.forget(state["uid"])
        return collected

    def _of_rollouts(self, state: dict[str, Any]) -> dict[str, Any]:
        """Sends a state, of JSON values and arrays, from the first process of rollouts to those that have none."""
        source = self.learner.pools.writers[0]
        parcel = to_bytes(state) if jax.process_index() == source else b""
        parcels = gather_bytes(parcel)
        return state if self.learner.pools.rolls else from_bytes(parcels[members().index(source)])

    def _roll(self, actor: Model, i: int, number: int) -> Collected:
        """Rolls out in the thread, with the times of the rollout's devices as metrics."""
        waited = time.monotonic() - self.idle_since
        self.learner.timer = Timer()
        with among(self.learner.rollout_mesh):
            collected = self.roller.roll(actor, i, number)
        jax.block_until_ready(actor)
        self.idle_since = time.monotonic()
        times = {f"rollouts_{name}": x for name, x in self.learner.timer.metrics.items()}
        return collected._replace(metrics={**collected.metrics, **times, "rollouts_seconds_waiting": waited})

    def wait(self) -> None:
        """See `Source`."""
        concurrent.futures.wait(self.jobs.values())

    def done(self) -> None:
        """See `Source`."""
        assert self.taken is not None
        self.jobs.pop(self.taken, None)
        self.taken = None

    def get_state(self) -> dict[str, Any]:
        """Waits for the rollouts that were begun, and returns their rows and the state of the roller, in the main process."""
        state: dict[str, Any] = {}
        if self.learner.pools.rolls:
            rows = [saved(job.result()) for job in self.jobs.values()]
            roller = self.roller.get_state()
            log = self.log.get_state(numbers_in([*rows, *roller.get("waiting", ())]))
            state = {"roller": roller, "log": log, "rows": rows}
        if self.across:
            barrier("rows that are saved")
            state = self._of_rollouts(state)
        return state if is_main_process() else {}

    def set_state(self, *states: Any) -> None:
        """Restores the states of `get_state` of all processes."""
        state = states[0]
        batches = self.log.set_state(state["log"])
        rows = {x["iteration"]: restored(x, batches, self.learner) for x in state["rows"]}
        if self.learner.pools.rolls:
            self.roller.set_state(state["roller"], batches)
            self.jobs.clear()
            for iteration, collected in rows.items():
                job: concurrent.futures.Future[Collected] = concurrent.futures.Future()
                job.set_result(collected)
                self.jobs[iteration] = job
        else:
            waiting = state["roller"].get("waiting", ())
            self.read.begin(batches, [x["uid"] for x in (*state["rows"], *waiting)])
        self.begun = 1 + max(rows, default=-1)

    def close(self) -> None:
        """Waits for the rollout that runs."""
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.roller.close()


class ReadAlong:
    """The questions whose rows other processes roll out: they are read in the same order, and kept until the rows are there."""

    def __init__(self, log: QuestionLog):
        self.log = log
        self.batches: dict[int, Questions] = {}
        self.left: collections.Counter[int] = collections.Counter()  # batch -> prompts whose rows are not there yet

    def begin(self, batches: Mapping[int, Questions], uids: Sequence[np.ndarray]) -> None:
        """Restores the `batches`, of which the rows of the prompts `uids` (int32 [G, 2] each) are to come."""
        self.batches = dict(batches)
        self.left = collections.Counter(int(number) for uid in uids for number in uid[:, 0])

    def batches_of(self, uid: np.ndarray) -> Mapping[int, Questions]:
        """Returns the batches of prompts, int32 [G, 2]."""
        while self.log.asked <= int(uid[:, 0].max()):
            number = self.log.asked
            self.batches[number] = self.log.ask(0)
            self.left[number] = len(self.batches[number].examples)
        return self.batches

    def forget(self, uid: np.ndarray) -> None:
        """Says that the rows of these prompts have arrived."""
        self.left -= collections.Counter(uid[:, 0].tolist())  # without those of which none are left
        self.batches = {number: batch for number, batch in self.batches.items() if number in self.left}
        self.log.get_state(set())  # the other pool's log is the one that is saved


def saved(collected: Collected) -> dict[str, Any]:
    """Converts rows to JSON values and arrays, without their images and examples."""
    rows = jax.tree.map(np.asarray, as_dicts(collected.records))
    uid = collected.questions.prompts.uid
    if uid.ndim == 1:  # of `WholeBatches`, which asks for one batch an iteration
        uid = np.stack([np.full_like(uid, collected.questions.iteration), np.arange(len(uid), dtype=uid.dtype)], axis=1)
    return {"iteration": collected.questions.iteration, "uid": uid, "rows": rows, "metrics": dict(collected.metrics)}


def restored(state: Mapping[str, Any], batches: Mapping[int, Questions], learner: "Learner") -> Collected:
    """The inverse of `saved`."""
    questions = named(batches, state["uid"])._replace(iteration=state["iteration"])
    rows = state["rows"]
    calls = rows["calls"] | {"values": Values(**rows["calls"]["values"]), "source": Views(**rows["calls"]["source"])}
    fields = rows | {"calls": Calls(**calls), "visual": visual_record(rows["visual"])}
    trajectories: Trajectories = Trajectories(**fields)
    shape = static_shape(questions.prompts, learner.config.rollout, learner.mesh)
    return Collected(questions, trajectories, trajectories, shape, state["metrics"])


def source_of(learner: "Learner") -> Source:
    """Makes the source that the configuration says.

    Raises:
        ValueError: rows are to carry over with a stage `collect` of the user's own.
    """
    config = learner.config
    if config.rollout_budget.limits and learner.stages.collect is not collect:
        raise ValueError(
            "a rollout_budget with a `collect` of one's own: with a budget rows are collected without that stage"
        )
    if config.staleness:
        # What runs in the thread has a timer and a part of the rows of its own, and is not abandoned.
        learner = copy.copy(learner)
        learner.notice = NoNotice()
        learner.shard = process_shard(learner.rollout_mesh) if learner.pools.rolls else NONE
    log = QuestionLog(learner.data, learner.ask)
    if config.rollout_budget.limits:
        roller: CarriedRows | WholeBatches = CarriedRows(learner, log)
    else:
        roller = WholeBatches(learner, log.ask if config.staleness else learner.ask)
    if not config.staleness:
        return Together(roller, learner, log if config.rollout_budget.limits else None)

    return Ahead(roller, learner, log)


def token_ages(trajectories: Trajectories, i: int) -> dict[str, float]:
    """Computes how many iterations before `i` the policies were that wrote the tokens, as metrics; none if all are of i."""
    if trajectories.policy is None:
        return {}
    mask = np.asarray(trajectories.loss_mask)
    ages: AnyArray = i - np.asarray(trajectories.policy)[mask]
    return {"token_age": float(np.mean(ages)), "token_age_max": float(np.max(ages))}
