"""Scoring of answers: the behaviours observed of the released scorer, and its traps."""

import json
import pathlib
import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pixel_jax
from pixel_jax.training import algebra
from pixel_jax.training.answers import by_rule, equal, given_answer, last_boxed, references_of
from pixel_jax.training.scorers import RULES, Reference, Scorer, ScorerConfig


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
        ("<answer>cat</answer> or <answer>Lion</answer>", "lion", 1),  # the last, as with boxes
        ("<answer>cat</answer> or <answer>Lion</answer>", "cat", 0),
        ("<answer>cat</answer> or <answer>Lion", "cat", 1),
        ("<answer>\nred\n</answer>", "red", 1),
        ("<think>I count 3</think>\n<answer>\nnone at all\n</answer>", "3", 0),
        ("<think>I count 3</think> They are many.", "3", 0),
        ("<think>I count 3, no", "3", 0),
        ("I count 3.</think> They are many.", "3", 0),  # the prompt has opened it
        (r"So \boxed{3}?</think> No, \boxed{4}.", "4", 1),
        ("I count 3. <answer>no", "3", 0),
        (r"<think>\boxed{3}?</think><answer>4</answer>", "4", 1),
        (r"<think>So it is \boxed{3}.</think>", "3", 1),
        (r"<answer>Lion</answer>, that is \boxed{cat}", "lion", 0),
        ("I count 4 of them: <answer>3</answer>", "4", 0),
        ("<answer>Lion", "lion", 0),
        (r"\boxed{9007199254740993}", "9007199254740992", 0),
        # Ranges, dates, scores and telephone numbers are no sums
        (r"\boxed{-6}", "3-9", 0),
        (r"\boxed{-2}", "2010-2012", 0),
        (r"\boxed{2}", "24/12", 0),
        (r"\boxed{-679}", "555-1234", 0),
        (r"\boxed{3-9}", "-6", 0),
        (r"\boxed{3-9}", "3-9", 1),
        ("It was 24/12", "12", 0),
        ("It ended 2:1", "1", 0),
        ("about 1/2", "0.5", 1),
        # nor is what has a nought in it nought
        (r"\boxed{0 to 5}", "0", 0),
        (r"\boxed{12 0}", "0", 0),
        (r"\boxed{about 0}", "0", 0),
        (r"\boxed{maybe 0 maybe 9}", "0", 0),
        (r"\boxed{10+}", "10", 0),
        # Lists
        (r"\boxed{1/2}", "1, 2", 0),
        (r"\boxed{2:1}", "1, 2", 0),
        (r"\boxed{-1, 2}", "1, 2", 0),
        (r"\boxed{1.2}", "1, 2", 0),
        (r"\boxed{2 and 1}", "1, 2", 1),
        (r"\boxed{(1, 2)}", "1, 2", 1),
        # Fractions and formulas
        (r"\boxed{1/2}", "0.5", 1),
        (r"\boxed{1 1/2}", "1.5", 1),
        (r"\boxed{3/2}", r"\frac{6}{4}", 1),
        (r"\boxed{2^{10}}", "1024", 1),
        (r"\boxed{\sqrt{9}}", "3", 1),
        (r"\boxed{2+3}", "5", 1),
        (r"\boxed{x=5}", "5", 1),
        (r"\boxed{BA-12}", "AB-12", 0),
        (r"\boxed{1/2^{98}}", "1/2^{99}", 0),
        (r"\boxed{\frac{1}{2^{98}}}", "1/2^{98}", 1),
        # How it is written
        ("\\boxed{\u00e9te\u0301}", "e\u0301t\u00e9", 1),
        (r'\boxed{"left"}', "left", 1),
        (r"\boxed{**Left**}", "left", 1),
        (r"\boxed{[B]}", "B", 1),
        (r"\boxed{\mathrm{~B}}", "B", 1),
        ("\\boxed{\uff22}", "B", 1),
    ],
)
def test_observed_behaviours(response, answer, expected):
    assert (by_rule(response, references_of(answer)) or 0) == expected


def test_a_response_without_an_answer_has_no_score():
    assert by_rule("The answer is A", ["A"]) is None
    assert by_rule(r"The answer is \boxed{B}", ["A"]) == 0


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
    assert verdicts == [True, False, True]
    assert equal("2^{3}", "8")
    assert not equal("9^{9^{9^{9}}}", "3")


ENDLESS = (
    *("10000000!", "2^{10000000000}", "9^{9^{9^9}}", "9^9^9^9", "(((9^{99})^{99})^{99})^{99}", "2**2**2**2**2**2**2"),
    *(r"\binom{10000000}{5000000}", r"\sum_{i=1}^{99999999} i", r"\int_0^1 x^x dx", "(a+b+c+d+x+y+z)^{99}", "3!!!!!!"),
    *(r"\exp{\exp{\exp{99}}}", "2^{x^{9999}}", "e^{9^9}", "7^{7^{7}} - 7", r"\lim_{x \to 0} x", "10^{10^{10}} mod 7"),
)


def test_endless_formulas_are_refused_before_they_are_worked_out():
    began = time.thread_time()
    for formula in ENDLESS:
        for answer, reference in ((formula, "5"), ("5", formula), (formula, "x+1")):
            assert not equal(answer, reference)
            assert RULES["released"](rf"\boxed{{{answer}}}", Reference((reference,))) in (0.0, None)
    assert time.thread_time() - began < 20


def test_an_iteration_has_a_budget(monkeypatch, caplog):
    """4,096 rows that are slow each cost the budget, not their sum; they count as wrong, and the log says so."""
    slept = []

    def slow(answer, reference):
        slept.append(answer)
        until = time.thread_time() + 0.05
        while time.thread_time() < until:
            pass
        return True

    monkeypatch.setattr(algebra, "_verified", slow)
    monkeypatch.setattr("pixel_jax.training.scorers.FORMULA_SECONDS", 0.2)
    monkeypatch.setattr("pixel_jax.training.scorers.FORMULA_SECONDS_A_ROW", 0.0)
    responses = [rf"\boxed{{{i}+1}}" for i in range(4096)]
    found = Scorer(ScorerConfig())(responses, [Reference(("x+1",))] * 4096)
    assert 1 <= len(slept) <= 5 and found == [1.0] * len(slept) + [0.0] * (4096 - len(slept))
    assert caplog.text.count("the time for formulas is spent") == 1
    assert Scorer(ScorerConfig())(responses[:1], [Reference(("x+1",))]) == [1.0]  # the next one has its own


PIECES = st.sampled_from(
    [
        *"0123456789+-*/^=(){}[].,:!% xyab\n$~",
        *r"\frac{ \sqrt{ \boxed{ \text{ \pi <answer> </answer> <think> </think>".split(),
    ]
    + [" and ", "The answer is ", "Option ", "é", "²", "①", "\ud800", "（B）", "**"]
)
TEXTS = st.lists(PIECES, max_size=24).map("".join)


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS, st.sampled_from(["box", "choice", "number", "anls"]))
def test_any_text_is_scored(response, reference, rule):
    question = "Which?\n(A) red\n(B) 3"
    for text in (response, rf"\boxed{{{response}}}"):
        score = pixel_jax.score_answer(text, [reference or "x"], question=question, rules=(rule,))
        assert score is None or 0 <= score <= 1
    assert given_answer(response) is None or given_answer(response) in response


@settings(max_examples=200, deadline=None)
@given(
    st.integers(-999, 999),
    st.integers(-999, 999),
    st.sampled_from(["-", "/", ":", " to ", " - ", " ", " or ", "\u2013"]),
)
def test_two_numbers_are_neither_of_them_nor_what_comes_of_them(a, b, between):
    """Whatever stands between them; a fraction is a number."""
    written = f"{a}{between}{abs(b)}"
    for value in {a, b, a - b, a + b, a * b, -b}:
        assert not equal(str(value), written) and not equal(written, str(value))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-99, 99), min_size=2, max_size=4), st.randoms())
def test_a_list_is_answered_in_any_order_and_by_nothing_else(numbers, random):
    reference, shuffled = ", ".join(map(str, numbers)), random.sample(numbers, len(numbers))
    assert equal(", ".join(map(str, shuffled)), reference)
    assert not equal(", ".join(map(str, [*shuffled, 100])), reference)
    assert not equal(", ".join(map(str, shuffled[1:])), reference)
    for between in "/:":
        assert not equal(between.join(map(str, shuffled)), reference)


GOLDEN = json.loads(pathlib.Path(__file__).with_name("golden_scorer.json").read_text())["cases"]


def test_the_released_rule_gives_the_released_verdicts():
    """Of `rule_reward` itself (`make_golden_scorer.py`), with its faults; -1 is None."""
    assert {verdict for *_, verdict in GOLDEN} == {1.0, 0.0, -1.0}
    released = Scorer(ScorerConfig(("released",)))
    found = released([case[0] for case in GOLDEN], [Reference((case[1],)) for case in GOLDEN])
    differ = [
        (case, score)
        for case, score in zip(GOLDEN, found, strict=True)
        if case[2] != (-1.0 if score is None else score)
    ]
    assert not differ


def test_the_released_rule_takes_lists_and_percentages():
    score = lambda response, *references: RULES["released"](response, Reference(references))
    assert score(r"\boxed{The Siege of Krishnapur and Troubles}", "troubles, the siege of krishnapur") == 1.0
    assert score(r"\boxed{1/2}", "1, 2") == 1.0  # known faults
    assert score(r"\boxed{0 to 5}", "0") == 1.0
    assert score(r"\boxed{35}", "35%") == 1.0
    assert score("The answer is A", "A") is None


def test_the_public_function():
    score = pixel_jax.score_answer
    assert score(r"\boxed{3}", "3") == 1.0 and score(r"\boxed{3}", ["4", r"\boxed{3}"]) == 1.0
    assert score(r"\boxed{3}", "4") == 0.0 and score("I cannot say", "4") is None
    assert score(r"\boxed{three}", "3") == 0.0 and score(r"\boxed{three}", "3", rules=("box", "number")) == 1.0
    assert score(r"\boxed{exit 1}", "exit 12", rules=("anls",)) == pytest.approx(6 / 7)
    assert score(r"\boxed{red}", "A", question="Which?\n(A) red\n(B) blue", rules=("choice",)) == 1.0
    with pytest.raises(ValueError, match="no rule is called 'boxes'; known are box, released"):
        score("3", "3", rules=("boxes",))
    with pytest.raises(ValueError, match="not 'box'"):
        score("3", "3", rules="box")
    with pytest.raises(ValueError, match="Scorer"):
        score("3", "3", rules=("judge",))
    with pytest.raises(ValueError, match="without a reference"):
        score("3", [])


def test_hostile_responses_are_scored():
    assert by_rule(r"\boxed{" * 20_000 + "1", ["1"]) == 1  # no box is complete: the last number counts
    assert not by_rule(r"\boxed{" + "1+" * 100_000 + "1}", ["1"])
    assert by_rule(r"\boxed{" * 20_000 + "1" + "}" * 20_000, ["1"]) == 1
    assert not by_rule("<answer>" * 50_000 + "1", ["1"])
    assert not by_rule("<think>" * 50_000 + "1", ["1"])
    assert not by_rule(r"\boxed{" + "*\"'" * 5_000 + "1" + "}", ["1"])
    assert not by_rule(r"\boxed{" + r"\text{" * 5_000 + "1" + "}" * 5_001, ["1"])
