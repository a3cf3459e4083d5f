"""Scoring of answers: the behaviours observed of the released scorer, and its traps."""

import sys
import threading

import pytest

from pixel_jax.training.answers import correctness, equal, last_boxed, references_of


@pytest.mark.parametrize(
    "response, answer, expected",
    [
        (r"\boxed{A}", "A", 1),
        (r"\boxed{(A)}", "A", 1),
        (r"\boxed{\text{A}}", "A", 1),
        (r"\boxed{a}", "A", 1),
        (r"\boxed{A: Lion}", "A", 0),
        (r"\boxed{A. Lion}", "A", 0),
        ("I think 3 dogs", "3", 1),
        ("I think 3 dogs and 4 cats", "3", 0),
        (r"\boxed{5}, or rather 3", "3", 0),
        (r"\boxed{three}", "3", 0),
        (r"\boxed{35%}", "35%", 1),
        (r"\boxed{35\%}", "35%", 1),
        (r"\boxed{35}", "35%", 1),
        (r"\boxed{0.35}", "35%", 1),
        (r"\boxed{3.5}", "35%", 0),
        (r"\boxed{Red}, no: \boxed{blue}", "Blue", 1),
        (r"\boxed{Red}, no: \boxed{blue}", "Red", 0),
        (r"\boxed{b}", ["A", "B"], 1),
        (r"\boxed{c}", ["A", "B"], 0),
        (r"\boxed{1,000}", "1000", 1),
        (r"\boxed{\frac{1}{2}}", "0.5", 1),
        (r"\boxed{\dfrac{3}{4}}", r"\frac{3}{4}", 1),
        (r"\boxed{x+1}", "1+x", 1),
        (r"\boxed{xy+1}", "1+xy", 1),
        (r"\boxed{ab / 2}", "0.5ba", 1),
        (r"\boxed{xyz - 1}", "zyx-1", 1),
        (r"\boxed{xy+1}", "xy+2", 0),
        (r"\boxed{left-right}", "right-left", 0),
        ("I counted 3-4 dogs", "4", 1),
        ("I counted 3-4 dogs", "-4", 0),
        ("It is at -4 degrees", "-4", 1),
        ("It is exit-12", "12", 1),
        (r"\boxed{5 cm}", "5", 1),
        (r"\boxed{}", "A", 0),
        (r"\boxed{Paris, Rome}", "rome, paris", 1),
        (r"\boxed{Paris}", "rome, paris", 0),
        (r"\boxed{Troubles and The Siege of Krishnapur}", "troubles, the siege of krishnapur", 1),
        (r"\boxed{Paris, London, Rome}", "rome, paris", 0),  # a list of all there could be
        (r"\boxed{Paris}, Rome", "rome, paris", 0),  # in the box, not after it
        (r"\boxed{13, 24}", "3, 4", 0),  # whole words
        (r"\boxed{comparison, Rome}", "paris, rome", 0),
        ("<answer>Lion</answer>", "lion", 1),
        ("<answer>cat</answer> or <answer>Lion</answer>", "lion", 0),  # the first, as in the released code
        (r"<answer>Lion</answer>, that is \boxed{cat}", "lion", 0),
        ("I count 4 of them: <answer>3</answer>", "4", 0),
        ("<answer>Lion", "lion", 0),
        (r"\boxed{9007199254740993}", "9007199254740992", 0),
    ],
)
def test_observed_behaviours(response, answer, expected):
    assert correctness(response, answer) == expected


def test_a_response_without_an_answer_is_zero_and_minus_one_by_switch():
    assert correctness("The answer is A", "A") == 0
    assert correctness("The answer is A", "A", unparsable=-1) == -1
    assert correctness(r"The answer is \boxed{B}", "A", unparsable=-1) == 0


@pytest.mark.parametrize(
    "text, content",
    [
        (r"a \boxed{x^{2}_{i}} b", "x^{2}_{i}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed {7}", "7"),
        (r"\boxed", None),
        ("none", None),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{a\}b}", r"a\}b"),
    ],
)
def test_the_last_complete_box(text, content):
    assert last_boxed(text) == content


def test_references_may_be_boxed_and_may_be_list_literals():
    assert references_of([r"\boxed{B}"]) == ["B"]
    assert references_of(r"\boxed{['12', 'twelve']}") == ["12", "twelve"]
    assert references_of(["['a' b"]) == ["['a' b"]
    assert references_of(["[1, 2]"]) == ["[1, 2]"]
    with pytest.raises(ValueError, match="reference"):
        references_of([])


def test_plain_answers_never_reach_the_algebra_system(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # importing it now fails
    for answer, reference in [
        ("red", "blue"),
        ("17", "71"),
        ("12%", "12"),
        ("A: Lion", "A"),
        ("a dog, a cat", "x"),
        ("gate 7b", "gate 8b"),
    ]:
        equal(answer, reference)
    with pytest.raises(ImportError):
        equal(r"\frac{1}{2}", "0.5")


def test_other_threads_can_score_and_cannot_hang():
    verdicts = []
    pairs = [(r"\frac{1}{2}", "0.5"), ("9^{9^{9^{9}}}", "3"), ("2^{3}", "8")]
    thread = threading.Thread(target=lambda: verdicts.extend(equal(a, b) for a, b in pairs), daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert verdicts == [True, False, False]
    assert equal("2^{3}", "8")
    assert not equal("9^{9^{9^{9}}}", "3")


def test_hostile_responses_are_scored():
    assert correctness(r"\boxed{" * 20_000 + "1", "1") == 1  # no box is complete: the last number counts
    assert correctness(r"\boxed{" + "1+" * 100_000 + "1}", "1") == 0
    assert correctness(r"\boxed{" * 20_000 + "1" + "}" * 20_000, "1") == 1
