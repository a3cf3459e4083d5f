"""What operations gain and what they cost, question by question: the same model asked twice, with them and otherwise.

A question that is wrong without and right with them is a gain, the opposite is a harm; the difference of the scores is the one
minus the other, and hides both. With several answers to a question (Avg@k) a and b are the shares of right answers, and each of
the four cases has the share that two independent answers would have: the gain is (1 - a) b.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pixel_jax.evaluation.evidence import HELD
from pixel_jax.evaluation.stats import bootstrap

Record = Mapping[str, Any]
ALL = "all"
CASES = ("gain", "harm", "both", "neither")  # right with only, right otherwise only, right twice, wrong twice


def exchange(without: Sequence[Record], used: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """The four cases, by category, each {"mean", "low", "high"} with 95 % bootstrap intervals over questions.

    Args:
        without: the records of the mode that is compared.
        used: those with operations, about the same questions.

    Returns:
        {category: {"questions", *CASES, "gain_held"}}; the first category is "all". "gain_held" is the share of the gain in
        which a crop held the evidence, None where no question has a reference, or nothing is gained.
    """
    other = {record["id"]: record for record in without}
    pairs = [(record, other[record["id"]]) for record in used]
    groups = {ALL: pairs}
    names = sorted({record["category"] for record in used})
    if len(names) > 1:
        for name in names:
            groups[f"{ALL} (category)" if name == ALL else name] = [x for x in pairs if x[0]["category"] == name]
    return {name: _cases(group) for name, group in groups.items()}


def _cases(pairs: Sequence[tuple[Record, Record]]) -> dict[str, Any]:
    b, a = (np.array([np.mean(pair[i]["score"]) for pair in pairs]) for i in (0, 1))
    shares = dict(zip(CASES, ((1 - a) * b, a * (1 - b), a * b, (1 - a) * (1 - b)), strict=True))
    known = np.array(["evidence" in record for record, _ in pairs])
    # Of the right answers to a question, the share that had the evidence before it.
    right_and_held = np.array(
        [_right_and_held(record) if know else 0.0 for (record, _), know in zip(pairs, known, strict=True)]
    )
    gain = {
        "values": ((1 - a) * right_and_held)[known],
        "weights": shares["gain"][known],
    }
    return {
        "questions": len(pairs),
        **{name: _interval(values) for name, values in shares.items()},
        "gain_held": _interval(**gain) if gain["weights"].sum() > 0 else None,
    }


def _right_and_held(record: Record) -> float:
    return float(
        np.mean([score * (share >= HELD) for score, share in zip(record["score"], record["evidence"], strict=True)])
    )


def _interval(values: np.ndarray, weights: np.ndarray | None = None) -> dict[str, float]:
    found = bootstrap(values, weights, bounds=(0, 1))
    return {name: found[name] for name in ("mean", "low", "high")}
