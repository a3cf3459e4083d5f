"""Advantages within a group of rollouts of one prompt, and policy-gradient algorithms as settings by name.

The recipe's own (`pixel_jax.recipe`) is Dr. GRPO's advantage and normaliser with DAPO's clip-higher and replay.
"""

from typing import Any, Literal

import numpy as np


def group_advantage(
    rewards: np.ndarray,
    *,
    baseline: Literal["mean", "leave_one_out"] = "mean",
    scale_by_std: bool = False,
    eps: float = 1e-4,
) -> np.ndarray:
    """Computes the advantage of each row in its group (GRPO), float32 [groups, n].

    It is the reward minus the mean reward of its group. Every token of a row's loss mask has the row's advantage.

    Args:
        rewards: [groups, n].
        baseline: `leave_one_out` subtracts the mean of the other rows of the group (RLOO, arXiv:2402.14740, §2.3).
        scale_by_std: whether to divide by the sample standard deviation of the group + `eps`, as GRPO does; Pixel Reasoner
            does not.
        eps: added to the standard deviation.
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
    """Says of each group of rewards [groups, n] whether they differ: mean |r - mean r| >= `threshold`, bool [groups].

    In all other groups the advantages are zero or nearly so, and nothing is learned from them.
    """
    rewards = np.asarray(rewards, np.float32)
    return np.abs(rewards - rewards.mean(axis=1, keepdims=True)).mean(axis=1) >= threshold


OVERLONG = 4096 / 20_480  # share of the longest response's tokens over which DAPO's penalty grows


def algorithm(name: str, *, longest: int) -> dict[str, Any]:
    """Returns the settings of `RLConfig` for the algorithm called `name`, nested as in a config file.

    Args:
        name: of the algorithm.
        longest: tokens that the policy may write in one response.

    Raises:
        ValueError: no algorithm has this name.
    """
    none = {"kind": "none"}
    algorithms = {
        # Shao et al. 2024, DeepSeekMath, arXiv:2402.03300, §4.1.1, eq. 3; `loss.kl` adds its KL term
        "grpo": {
            "baseline": "mean",
            "scale_by_std": True,
            "replay": none,
            "loss": {"ratio": "token", "clip_low": 0.2, "clip_high": 0.2, "normalizer": "row"},
        },
        # Liu et al. 2025, Understanding R1-Zero-Like Training, arXiv:2503.20783, §3.2: no division by deviation or length
        "dr_grpo": {
            "baseline": "mean",
            "scale_by_std": False,
            "replay": none,
            "loss": {
                "ratio": "token",
                "clip_low": 0.2,
                "clip_high": 0.2,
                "normalizer": "constant",
                "constant": float(longest),
            },
        },
        # Yu et al. 2025, DAPO, arXiv:2503.14476, §3, §4.1: clip-higher, dynamic sampling, token-level loss, overlong shaping
        "dapo": {
            "baseline": "mean",
            "scale_by_std": True,
            "replay": {"kind": "dynamic"},
            "loss": {"ratio": "token", "clip_low": 0.2, "clip_high": 0.28, "normalizer": "token"},
            "reward": {"length_limit": longest, "length_buffer": round(longest * OVERLONG)},
        },
        # Zheng et al. 2025, Group Sequence Policy Optimization, arXiv:2507.18071, §4.1, eq. 5 to 7; clipping of its §5.1
        "gspo": {
            "baseline": "mean",
            "scale_by_std": True,
            "replay": none,
            "loss": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "normalizer": "row"},
        },
        # Ahmadian et al. 2024, Back to Basics, arXiv:2402.14740, §2.3: a response is one action; clipped as in TRL
        "rloo": {
            "baseline": "leave_one_out",
            "scale_by_std": False,
            "replay": none,
            "loss": {"ratio": "product", "clip_low": 0.2, "clip_high": 0.2, "normalizer": "row"},
        },
    }
    if name not in algorithms:
        raise ValueError(f"no algorithm is called {name!r}; known are {', '.join(algorithms)}")
    return algorithms[name]
