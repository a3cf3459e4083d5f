"""Diagnoses iterations of reinforcement learning in which nothing is learned, and names likely causes.

A row is reinforced by the difference of its reward from the others of its group: nothing is learned from groups of equal rewards.
"""

from collections.abc import Mapping

import numpy as np

from pixel_jax.parallel.sharding import ProcessShard, all_rows
from pixel_jax.terminal import warn
from pixel_jax.training.answers import given_answer
from pixel_jax.training.stages import Scored

# The number of consecutive iterations without learning after which causes are named. It doubles with every warning.
PATIENCE = 3
MANY = 0.5  # a share above which it counts as a cause
FEW_ROWS = 4  # groups of fewer rows seldom have different rewards
COLD = 0.5  # a temperature below which the rows of a group are much alike


def outcome_metrics(scored: Scored, shard: ProcessShard) -> dict[str, float]:
    """Computes the shares of rows without an answer, and of groups of only right or only wrong answers.

    "unboxed" is the share of rows without an answer in a box or tag, if the rows' texts are known; "all_right" and "all_wrong"
    are shares of groups, if answers are scored. All processes must call it together; `shard` is this process's rows.
    """
    metrics = {}
    if scored.rows:  # a user's stage `score` may leave them out
        boxed = all_rows(np.array([given_answer(row.response) is not None for row in scored.rows]), shard)
        metrics["unboxed"] = float(np.mean(~boxed))
    if scored.correct is not None:
        right = scored.correct > 0.5
        metrics["all_right"] = float(np.mean(np.all(right, axis=1)))
        metrics["all_wrong"] = float(np.mean(np.all(~right, axis=1)))
    return metrics


def remark(metrics: Mapping[str, float]) -> str:
    """The remark of the progress line about an iteration; empty if rewards differ in any group."""
    if metrics["nonzero_variance"] > 0:
        return ""
    kinds = {"all right": metrics.get("all_right", 0.0), "all wrong": metrics.get("all_wrong", 0.0)}
    kinds["of equal rewards"] = 1 - sum(kinds.values())
    shares = [f"{share:.0%} {name}" for name, share in kinds.items() if share > 1e-6]
    return f"no group taught anything ({', '.join(shares)})"


def causes(metrics: Mapping[str, float], rows: int, temperature: float) -> list[str]:
    """Names likely causes of an iteration from which nothing is learned, the likeliest first, each with a remedy.

    Args:
        metrics: those of `outcome_metrics`, and "finished", the share of rows that ended with an answer.
        rows: the number of rows of a group.
        temperature: of sampling.
    """
    reasons = []
    if metrics["finished"] < 1 - MANY:
        reasons.append(
            f"{1 - metrics['finished']:.0%} of the rows reached a limit before they answered: raise max_new_tokens, "
            "max_response or max_calls in config.rl.rollout, or tune the model first"
        )
    if metrics.get("unboxed", 0.0) > MANY:
        reasons.append(
            f"{metrics['unboxed']:.0%} of the rows give no answer in \\boxed{{}} or <answer>: tune the model on traces that do"
        )
    elif metrics.get("all_wrong", 0.0) > MANY:
        reasons.append(
            f"in {metrics['all_wrong']:.0%} of the groups all answers are wrong: the questions are too hard for this model, or "
            "the references are written in another way than it answers; traces/rollouts in the run's directory show which"
        )
    if metrics.get("all_right", 0.0) > MANY:
        reasons.append(f"in {metrics['all_right']:.0%} of the groups all answers are right: the questions are too easy")
    if rows < FEW_ROWS:
        reasons.append(f"{rows} rows a group seldom differ: raise config.rl.rollout.group_size")
    if temperature < COLD:
        reasons.append(f"at temperature {temperature:g} rows are much alike: raise config.rl.rollout.temperature")
    return reasons or ["rewards of a group are all equal: raise config.rl.rollout.group_size or temperature"]


class Diagnosis:
    """Makes remarks on iterations, and warns of several consecutive ones from which nothing is learned."""

    def __init__(self, rows: int, temperature: float):
        self.rows, self.temperature = rows, temperature
        self.without, self.next = 0, PATIENCE

    def __call__(self, metrics: Mapping[str, float]) -> str:
        """The `remark` on an iteration."""
        comment = remark(metrics)
        if not comment:
            self.without, self.next = 0, PATIENCE
            return ""
        self.without += 1
        if self.without == self.next:
            self.next *= 2
            likely = "; ".join(causes(metrics, self.rows, self.temperature))
            warn(
                f"In {self.without} iterations in a row no group taught anything, so nothing is learned. Likely: {likely}."
            )
        return comment
