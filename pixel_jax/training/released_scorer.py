"""Pixel Reasoner's released scorer, for scores that can be compared with its own.

It is `rule_reward` (openrlhf/trainer/ppo_utils/experience_maker.py): the last box, the first <answer> on one line, and then the
whole response are given to math-verify unchanged. Its known faults are kept: "0 to 5" answers "0", "1/2" answers "1, 2",
"B. blue" does not answer B, and after a wrong box the rest of the text is tried. There is one difference: formulas that are too
expensive to evaluate count as wrong at once, where the released code would never end.
"""

import functools
import re
from collections.abc import Iterator, Sequence

from pixel_jax.training import algebra


def released_score(response: str, references: Sequence[str]) -> float | None:
    """Scores a response as 1 or 0, or None where the released code gives -1 (nothing parses). References are box contents."""
    text = response.lower()
    golds = [f"\\boxed{{{reference}}}".lower() for reference in references]
    percent = next((gold.replace("%", "") for gold in golds if "%" in gold), None)
    if percent is not None and percent not in golds:
        golds.insert(0, percent)
    score = None
    for gold in golds:
        score = _against(text, gold)
        if score == 1.0:
            break
        if "," in gold and "boxed" in text:
            spans = [span.strip() for span in gold.removeprefix("\\boxed{")[:-1].split(",")]
            if all(span in text[text.rindex("boxed") :] for span in spans):
                return 1.0
    return score


def _against(text: str, gold: str) -> float | None:
    """Scores a whole response against one reference, both in lower case."""
    with algebra.charged() as allowed:
        if not allowed:
            return 0.0
        wanted = _wanted(_tidy(gold))
        if not wanted:
            return None
        score: float | None = None
        for candidate in _candidates(text):
            score = _verdict(_tidy(candidate), wanted)
            if score == 1.0:
                break
        return score


def _candidates(text: str) -> Iterator[str]:
    """Yields the texts that are tried in turn; the first right one counts, or else the last."""
    if "\\boxed" in text:
        yield text[text.rindex("\\boxed") :].strip()
    if "<answer>" in text and (tagged := re.search("<answer>(.*?)</answer>", text)):
        yield f"\\boxed{{{tagged[1]}}}"
    yield text


def _verdict(said: str, wanted: list) -> float | None:
    from math_verify import verify

    if not algebra.is_small(said):
        return 0.0
    formulas = _parse(said)
    if not formulas:
        return None
    return float(verify(formulas, wanted, timeout_seconds=algebra.time_limit()))


@functools.lru_cache(maxsize=1024)
def _wanted(gold: str) -> list:
    return _parse(gold)


def _parse(text: str) -> list:
    return algebra.parsed(text) if algebra.is_small(text) else []


def _tidy(text: str) -> str:
    text = text.replace("dfrac", "frac").replace("\\text", "").replace("\\varnothing", "\\emptyset")
    return text.replace("minutes", "").replace("cm", "")
