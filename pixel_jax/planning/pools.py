"""The time of an iteration of reinforcement learning, from the plans of its steps: rollouts and training together, or apart.

Together they take turns on the same chips. Apart (`rl.staleness`) each has chips of its own, and an iteration takes as long
as the slower of the two. A plan of a rollout counts all rows as long as allowed. Where the mean row is shorter, slots are
refilled as long as prompts wait, and at the end the longest rows decide: of k prompts for a slot, the last takes the time of
the longest row and the others that of the mean one. Rows that carry over (`rl.rollout_budget`) keep the slots full to the
end, and what is not done is read again. The numbers follow from plans that were made before, so that nothing is compiled.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from rich.table import Table

from pixel_jax import terminal
from pixel_jax.files import read_json
from pixel_jax.parallel.mesh import make_mesh
from pixel_jax.planning.programs import Recipe, abstract_state
from pixel_jax.planning.search import Plan
from pixel_jax.training.cost import bytes_of
from pixel_jax.training.state import cast


class Pool(NamedTuple):
    """Chips that train, roll out, or do both in turns."""

    chips: int
    seconds: float  # in which an iteration keeps them busy


class Iteration(NamedTuple):
    """A way to run an iteration, and what it takes."""

    name: str
    training: Pool
    rollouts: Pool
    together: bool  # on the same chips, in turns

    @property
    def chips(self) -> int:
        """All chips."""
        return self.training.chips if self.together else self.training.chips + self.rollouts.chips

    @property
    def seconds(self) -> float:
        """Of an iteration, once the first rows are there."""
        busy = (self.training.seconds, self.rollouts.seconds)
        return sum(busy) if self.together else max(busy)

    @property
    def used(self) -> tuple[float, float]:
        """The shares of the time in which the chips of training and of rollouts are busy; together they are always."""
        if self.together:
            return 1.0, 1.0
        return self.training.seconds / self.seconds, self.rollouts.seconds / self.seconds


@dataclasses.dataclass(frozen=True)
class Work:
    """What an iteration does beside the programs of the plans."""

    updates: int  # of an iteration
    moved: int  # bytes of the weights that are sent to the rollouts' devices: with adapters the adapters alone
    network: float  # bytes a second that a host receives from the other pool
    mean_share: float  # of the longest row, that the mean row has; both of what rows write
    rounds: float  # prompts of an iteration for each that is in flight
    reread: float  # rows that read again what they have, of those that an update trains on, in units of its rows

    @property
    def moving(self) -> float:
        """Seconds in which the weights arrive: each host receives all of them (`training.state.Resharder`)."""
        return self.moved / self.network


def iterations(training: Mapping[str, Plan], rollout: Plan, together: Plan, work: Work) -> list[Iteration]:
    """Predicts an iteration together, apart, and with rows that carry over.

    Args:
        training: the plans of "update" and, if log-probabilities are recomputed, "score", on the chips of training.
        rollout: on the chips of rollouts.
        together: a rollout on the chips of training.
        work: what else there is to do.

    Returns:
        Together, together with rows that carry over, apart, and apart with rows that carry over.
    """
    chips, train = chips_of(training["update"]), work.updates * sum(x.predicted_seconds for x in training.values())
    others = chips_of(rollout)
    # A row reads again in one forward pass; the scores of an update are one of as many rows as it has, on the chips of training.
    forward = training["score"].predicted_seconds if "score" in training else training["update"].predicted_seconds / 4
    again = work.reread * forward

    # The share of the planned time in which all rows are written.
    ended = (work.mean_share * (work.rounds - 1) + 1) / work.rounds

    def full(plan: Plan, slower: float) -> float:
        return plan.predicted_seconds * work.mean_share + again * slower

    apart = full(rollout, chips / others) + work.moving
    return [
        Iteration("together", Pool(chips, train), Pool(chips, ended * together.predicted_seconds), True),
        Iteration("together, rows carry over", Pool(chips, train), Pool(chips, full(together, 1.0)), True),
        Iteration("apart", Pool(chips, train), Pool(others, ended * rollout.predicted_seconds + work.moving), False),
        Iteration("apart, rows carry over", Pool(chips, train), Pool(others, apart), False),
    ]


def chips_of(plan: Plan) -> int:
    """The chips of the pool that a plan is of: those of its mesh, or of its machine if a chip is several devices."""
    devices = math.prod(plan.mesh.values())
    machine = math.prod(map(int, re.findall(r"\d+", plan.topology.partition(":")[2])))
    return min(devices, machine)


def moved_bytes(recipe: Recipe) -> int:
    """The bytes of the weights that move to rollouts before an iteration: those that are trained, as rollouts read them."""
    rl = recipe.config.learning
    state = abstract_state(recipe, rl, rl.iterations * rl.updates, make_mesh({"data": 1}, jax.devices()[:1]))
    return bytes_of(jax.eval_shape(lambda weights: cast(weights, rl.forward.compute_dtype), state.trainable))


def read_plans(path: str) -> dict[str, Plan]:
    """Reads the best plan of each step of RL from a file of `pixel-jax plan --json`, of its one machine, or of `FILE@MACHINE`.

    Raises:
        ValueError: the file has no such plans.
    """
    name, _, wanted = path.partition("@")
    found = read_json(pathlib.Path(name))
    best: Mapping[str, Any] = found.get("best", {}) if isinstance(found, dict) else {}
    machines = [wanted] if wanted else list(best)
    if len(machines) != 1 or machines[0] not in best:
        raise ValueError(f"{path} has plans of {', '.join(best) or 'no machine'}: name one, as {name}@v5p:4x4x4")
    fields = {field.name for field in dataclasses.fields(Plan)}
    try:
        made = [Plan(**{key: x for key, x in plan.items() if key in fields}) for plan in found["plans"]]
        plans = {step: made[entry["plan"]] for step, entry in best[machines[0]].items()}
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{name} is no file of `pixel-jax plan --json`: {error!r}") from error
    if not {"update", "rollout"} <= plans.keys() or any(plan.seconds is None for plan in plans.values()):
        raise ValueError(f"{path} has plans of {', '.join(plans)}: an iteration needs update and rollout, which fit")
    return {step: plans[step] for step in ("update", "score", "rollout") if step in plans}


def compared(recipe: Recipe, files: Sequence[str], mean_response: float | None, gigabits: float) -> list[Iteration]:
    """Predicts the iterations of a config from files of plans: of the chips of training, and of rollouts if they are others.

    Args:
        recipe: whose plans they are.
        files: one or two (`read_plans`).
        mean_response: tokens of the mean row, observations included; None: every row is as long as allowed.
        gigabits: a second, that a host receives from the other pool.

    Raises:
        ValueError: a number cannot be, or a file has no plans.
    """
    rl = recipe.config.rl
    if rl is None:
        raise ValueError("pools are of reinforcement learning, and the config has no section rl")
    most = rl.rollout.max_response
    if mean_response is not None and not 0 < mean_response <= most:
        raise ValueError(f"a mean response of {mean_response:g} tokens: config.rl.rollout.max_response allows {most}")
    if not 0 < gigabits < math.inf:
        raise ValueError(f"{gigabits:g} Gb/s between the pools must be positive")
    if len(files) not in (1, 2):
        raise ValueError(f"{len(files)} files of plans: give one, or one of training and one of rollouts")
    ours, theirs = read_plans(files[0]), read_plans(files[-1])
    share = 1.0 if mean_response is None else mean_response / most
    flying = min(theirs["rollout"].sharding.get("in_flight") or rl.rollout.in_flight or rl.prompts, rl.prompts)
    # When a rollout ends, at most the rows in its slots are not done; if rows are equally long, none would be.
    carried = 0 if share == 1 else flying * rl.rollout.group_size
    work = Work(
        rl.updates, moved_bytes(recipe), gigabits * 1e9 / 8, share, rl.prompts / flying, carried / rl.train_batch
    )
    training = {step: plan for step, plan in ours.items() if step != "rollout"}
    return iterations(training, theirs["rollout"], ours["rollout"], work)


def table(found: Sequence[Iteration], moved: int) -> Table:
    """Makes the table of iterations."""
    rows = [
        (
            x.name,
            str(x.chips),
            f"{x.training.seconds:.4g}",
            f"{x.rollouts.seconds:.4g}",
            f"{x.seconds:.4g}",
            f"{x.chips * x.seconds:.4g}",
            *(f"{share:.0%}" for share in x.used),
        )
        for x in found
    ]
    seconds = ("training s", "rollouts s", "iteration s", "chip seconds")
    head = ("pools", "chips", *seconds, "training busy", "rollouts busy")
    caption = (
        f"Apart, {moved / 1e9:.4g} GB of weights move to the rollouts before an iteration. Rows that carry over read at most "
        "all that they have again."
    )
    return terminal.table(head, rows, words=1, title="An iteration, predicted from plans", caption=caption)
