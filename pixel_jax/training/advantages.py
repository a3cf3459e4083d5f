"""Advantages within a group of rollouts of one prompt (GRPO; Pixel Reasoner leaves the division by the deviation out)."""

from typing import Literal

import numpy as np


def group_advantage(
    rewards: np.ndarray,
    *,
    baseline: Literal["mean", "leave_one_out"] = "mean",
    scale_by_std: bool = False,
    eps: float = 1e-4,
) -> np.ndarray:
    """Rewards [groups, n] minus the mean of their group; with `scale_by_std` divided by (sample deviation + eps).

    The paper's code does not divide; dividing is GRPO as published. Every chosen token of a row has its row's advantage.
    `leave_one_out`: minus the mean of the others of the group (RLOO, arXiv:2402.14740, §2.3).
    """
    rewards = np.asarray(rewards, np.float32)
    n = rewards.shape[1]
    if n < 2 and (scale_by_std or baseline == "leave_one_out"):
        raise ValueError(f"a deviation, or a mean of others, needs at least two rollouts a prompt, there are {n}")
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if baseline == "leave_one_out":
        centred = centred * np.float32(n / (n - 1))
    if not scale_by_std:
        return centred
    return centred / (rewards.std(axis=1, ddof=1, keepdims=True) + eps)


def nonzero_variance(rewards: np.ndarray, *, threshold: float = 0.01) -> np.ndarray:
    """Which groups of the shaped rewards [groups, n] teach anything: mean |r - mean r| of at least `threshold`, bool [groups]."""
    rewards = np.asarray(rewards, np.float32)
    return np.abs(rewards - rewards.mean(axis=1, keepdims=True)).mean(axis=1) >= threshold
