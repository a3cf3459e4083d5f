"""Whether an iteration of reinforcement learning teaches anything, and in words why it does not.

A row is pushed by how its reward differs from those of its group: groups whose rewards are all equal push nothing.
"""

from collections.abc import Mapping

import numpy as np

from pixel_jax.parallel.sharding import ProcessShard, all_rows
from pixel_jax.terminal import warn
from pixel_jax.training.answers import given_answer
from pixel_jax.training.stages import Scored

PATIENCE = 3  # iterations in a row without a lesson, after which causes are looked for; then twice as many, and so on
MANY = 0.5  # a share from which on it is a cause
FEW_ROWS = 4  # of a group
COLD = 0.5  # a temperature at which rows of a group are much alike


def outcome_metrics(scored: Scored, shard: ProcessShard) -> dict[str, float]:
    """Of an iteration: the share of rows that give no answer in a box or tag, "unboxed", where it is known what they wrote;
    and, where answers are scored, of groups "all_right" and "all_wrong".

    With several processes, all call it; `shard` is what each has of the rows.
    """
    metrics = {}
    if scored.rows:  # a scoring of one's own may go without
        boxed = all_rows(np.array([given_answer(row.response) is not None for row in scored.rows]), shard)
        metrics["unboxed"] = float(np.mean(~boxed))
    if scored.correct is not None:
        right = scored.correct > 0.5
        metrics["all_right"] = float(np.mean(np.all(right, axis=1)))
        metrics["all_wrong"] = float(np.mean(np.all(~right, axis=1)))
    return metrics


def remark(metrics: Mapping[str, float]) -> str:
    """What the line of progress says of an iteration beside its numbers: nothing, if any group taught something."""
    if metrics["nonzero_variance"] > 0:
        return ""
    found = {"all right": metrics.get("all_right", 0.0), "all wrong": metrics.get("all_wrong", 0.0)}
    found["of equal rewards"] = 1 - sum(found.values())
    shares = [f"{share:.0%} {name}" for name, share in found.items() if share > 1e-6]
    return f"no group taught anything ({', '.join(shares)})"


def causes(metrics: Mapping[str, float], rows: int, temperature: float) -> list[str]:
    """Likely causes of iterations like this one, the likeliest first, each with what helps.

    Args:
        metrics: of an iteration: those of `outcome_metrics`, and "finished", the share of rows that ended with an answer.
        rows: of a group.
    """
    found = []
    if metrics["finished"] < 1 - MANY:
        found.append(
            f"{1 - metrics['finished']:.0%} of the rows ran out of room before they answered: raise max_new_tokens, "
            "max_response or max_calls in config.rl.rollout, or tune the model first"
        )
    if metrics.get("unboxed", 0.0) > MANY:
        found.append(
            f"{metrics['unboxed']:.0%} of the rows give no answer in \\boxed{{}} or <answer>: tune the model on traces that do"
        )
    elif metrics.get("all_wrong", 0.0) > MANY:
        found.append(
            f"in {metrics['all_wrong']:.0%} of the groups all answers are wrong: the questions are too hard for this model, or the "
            "references are written in another way than it answers; traces/rollouts in the run's directory show which"
        )
    if metrics.get("all_right", 0.0) > MANY:
        found.append(f"in {metrics['all_right']:.0%} of the groups all answers are right: the questions are too easy")
    if rows < FEW_ROWS:
        found.append(f"{rows} rows a group seldom differ: raise config.rl.rollout.group_size")
    if temperature < COLD:
        found.append(f"at temperature {temperature:g} rows are much alike: raise config.rl.rollout.temperature")
    return found or ["rewards of a group are all equal: raise config.rl.rollout.group_size or temperature"]


class Diagnosis:
    """Iterations one after another; a run of them in which nothing is taught is warned of."""

    def __init__(self, rows: int, temperature: float):
        self.rows, self.temperature = rows, temperature
        self.without, self.next = 0, PATIENCE

    def __call__(self, metrics: Mapping[str, float]) -> str:
        """The `remark` on an iteration."""
        said = remark(metrics)
        if not said:
            self.without, self.next = 0, PATIENCE
            return ""
        self.without += 1
        if self.without == self.next:
            self.next *= 2
            likely = "; ".join(causes(metrics, self.rows, self.temperature))
            warn(
                f"In {self.without} iterations in a row no group taught anything, so nothing is learned. Likely: {likely}."
            )
        return said
