"""Rules and the judge: hand-made cases, and a judge that is asked over real HTTP."""

import json
import pathlib
import threading
import time

import pytest

from pixel_jax import endpoint
from pixel_jax.endpoint import EndpointConfig, EndpointError
from pixel_jax.training.answers import anls, numbers_in, same_number
from pixel_jax.training.choices import choices_of, letter_of, same_choice
from pixel_jax.training.scorers import Reference, Scorer, ScorerConfig
from tests.chat_server import Reply, chat_server

QUESTION = "What is in the photo?\n(A) a cat\n(B) Lion\n(C) a red car\nAnswer with the option's letter."
TWINS = "What color?\n(A) red\n(B) blue\n(C) green\n(D) Red"


@pytest.mark.parametrize(
    "question, found",
    [
        (QUESTION, {"a": "a cat", "b": "lion", "c": "a red car"}),
        ("Which? (A) red (B) dark blue (C) 3.5", {"a": "red", "b": "dark blue", "c": "3.5"}),
        ("Which?\nA. red\nB. blue", {"a": "red", "b": "blue"}),
        ("Which?\n  A: red\n  B: blue\n", {"a": "red", "b": "blue"}),
        ("Which?\nA) red\nB) blue", {"a": "red", "b": "blue"}),
        ("Which is (A)?", {}),
        ("Where is (B) and where (C)?", {}),
        ("How many dogs?", {}),
    ],
)
def test_options_are_read_from_the_question(question, found):
    assert choices_of(question) == found


@pytest.mark.parametrize(
    "answer, reference, question, same",
    [
        ("B", "B", QUESTION, True),
        ("(B)", "B", QUESTION, True),
        ("B: Lion", "B", QUESTION, True),
        ("B. Lion", "B", QUESTION, True),
        ("(B) lion", "B", QUESTION, True),
        ("B Lion", "B", QUESTION, True),
        ("Lion", "B", QUESTION, True),
        ("B", "Lion", QUESTION, True),
        ("A. Lion", "B", QUESTION, False),  # contradicts itself
        ("A. Lion", "A", QUESTION, False),
        ("B. the lion", "B", QUESTION, True),
        ("A", "B", QUESTION, False),
        ("D", "B", QUESTION, False),
        ("a cat", "A", QUESTION, True),
        ("a red car", "A", QUESTION, False),
        ("a dog", "A", QUESTION, False),
        ("A: Lion", "A", "", True),
        ("A. Lion", "A", "", True),
        ("B. Lion", "A", "", False),
        ("a lion", "A", "", False),
        ("apple", "A", "", False),
        ("A and B", "A", QUESTION, False),
        ("", "A", QUESTION, False),
        # As VLMEvalKit and lmms-eval read them
        ("Option B", "B", QUESTION, True),
        ("option (B)", "B", QUESTION, True),
        ("**B**", "B", QUESTION, True),
        ("[B]", "B", QUESTION, True),
        ("B, lion", "B", QUESTION, True),
        ("The answer is B", "B", QUESTION, True),
        ("The correct answer is: (B) lion.", "B", QUESTION, True),
        ("B is correct", "B", QUESTION, True),
        ('"Lion"', "B", QUESTION, True),
        ("The answer is lion", "B", QUESTION, True),
        (r"\mathrm{~B}", "B", QUESTION, True),
        (r"\text{(B)}", "B", QUESTION, True),
        ("选项B", "B", QUESTION, True),
        ("答案是B", "B", QUESTION, True),
        ("（B）", "B", QUESTION, True),
        ("Option C", "B", QUESTION, False),
        ("A, B", "A", QUESTION, False),  # of two minds
        ("A or B", "A", QUESTION, False),
        ("Both A and B", "A", QUESTION, False),
        ("B. lion, not A", "B", QUESTION, False),
        ("The answer is not B", "B", QUESTION, False),
        ("not B", "B", QUESTION, False),
        ("the answer is a", "B", QUESTION, False),
        ("D", "A", TWINS, True),
        ("A", "red", TWINS, True),
        ("red", "D", TWINS, True),
        ("B", "D", TWINS, False),
        ("A", "B", "Which?\n(A) <image>\n(B) <image>", False),  # pictures are no texts
    ],
)
def test_choices_by_letter_and_text(answer, reference, question, same):
    assert same_choice(answer, reference, choices_of(question)) is same


def test_choices_are_read_as_vlmevalkit_and_lmms_eval_read_them():
    """Wherever both read the option that was meant (`make_golden_choices.py`); and never another than was meant."""
    golden = json.loads(pathlib.Path(__file__).with_name("golden_choices.json").read_text())
    choices = choices_of("Which?\n" + "\n".join(f"({letter}) {text}" for letter, text in golden["options"].items()))
    both = [case for case in golden["cases"] if case[1] == case[2] == case[3]]
    assert len(both) > 0.8 * len(golden["cases"])
    for answer, meant, *_ in golden["cases"]:
        assert letter_of(answer, choices) == meant.lower(), answer
        assert all(same_choice(answer, letter, choices) == (letter == meant) for letter in golden["options"])


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("three", [3]),
        ("Twenty-one dogs", [21]),
        ("two hundred and five", [205]),
        ("three thousand two hundred", [3200]),
        ("one two", [1, 2]),
        ("twenty thirteen", [20, 13]),
        ("1,204 and 3.5", [1204, 3.5]),
        ("none", [0]),
        ("stone, often, phone", []),
        ("between 3 and four", [3, 4]),
        ("nineteen hundred", [1900]),
        ("hundred", []),
        ("no dogs", [0]),
        ("No", [0]),
        ("no, 3 dogs", [3]),
        ("no more than 3", [3]),
    ],
)
def test_numbers_in_digits_and_words(text, numbers):
    assert numbers_in(text) == numbers


@pytest.mark.parametrize(
    "answer, reference, same",
    [
        ("three", "3", True),
        ("3 dogs", "3", True),
        ("There are three dogs.", "3", True),
        ("3", "three", True),
        ("two or three", "3", False),
        ("thirteen", "3", False),
        ("dogs", "3", False),
        ("3", "dogs", False),
        ("none", "0", True),
        ("3 " * 200, "3", False),
    ],
)
def test_counts(answer, reference, same):
    assert same_number(answer, reference) is same


@pytest.mark.parametrize(
    "answer, references, value",
    [
        ("Exit 12", ["exit 12"], 1.0),
        ("exit  12 ", ["Exit 12"], 1.0),
        ("exit 1", ["exit 12"], 1 - 1 / 7),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("abcd", ["wxyz"], 0.0),
        ("ab", ["abcd"], 0.5),  # at the threshold it counts
        ("ab", ["abcde"], 0.0),
        ("12", ["1200", "12"], 1.0),
        ("", ["x"], 0.0),
    ],
)
def test_anls(answer, references, value):
    assert anls(answer, references) == pytest.approx(value)


def score(rules, response, *answer, question=QUESTION):
    return Scorer(ScorerConfig(rules))([response], [Reference(answer, question)])[0]


def test_the_best_rule_counts():
    assert score(("box",), r"\boxed{B. Lion}", "B") == 0
    assert score(("box", "choice"), r"\boxed{B. Lion}", "B") == 1
    assert score(("box",), r"\boxed{three}", "3") == 0
    assert score(("box", "number"), r"\boxed{three}", "3") == 1
    assert score(("choice",), r"\boxed{A} or \boxed{B}", "A") == 0  # the last box
    assert score(("box", "anls"), r"\boxed{exit 1}", "exit 12") == pytest.approx(6 / 7)
    assert score(("anls",), r"\boxed{x}", "y", "x") == 1


def test_no_answer_is_none_and_not_zero():
    assert score(("box",), "I cannot say.", "B") is None
    assert score(("box",), "I see 3.", "3") == 1
    assert score(("choice", "number", "anls"), "I see 3.", "3") is None
    assert score(("choice", "box"), "I see 3.", "4") == 0


def test_a_choice_may_be_stated_without_a_box():
    assert score(("choice",), "The answer is B", "B") == 1
    assert score(("choice",), "I looked closer. The answer is (B).", "B") == 1
    assert score(("choice",), "Lion", "B") == 1
    assert score(("choice",), "The answer is C", "B") == 0
    assert score(("choice",), "I looked at A, B and C.", "B") is None
    assert score(("choice",), "<answer>\nOption B\n</answer>", "B") == 1


def test_references_are_unboxed():
    assert Reference.of([r"\boxed{['a', 'b']}"]) == Reference(("a", "b"))
    assert Reference.of(Reference(("a",), "?")) == Reference(("a",), "?")


class Judge:
    """Says what it is told to, and remembers what it was asked."""

    def __init__(self, reply):
        self.reply, self.asked, self.lock = reply, [], threading.Lock()

    def complete(self, messages, **sampling):
        with self.lock:
            self.asked.append(messages[0]["content"])
        return self.reply(messages[0]["content"]) if callable(self.reply) else self.reply


JUDGED = ScorerConfig(("box", "judge"), EndpointConfig("http://localhost:1/v1", "m"))


def test_the_judge_is_asked_only_where_the_rules_fail():
    judge = Judge(lambda prompt: "CORRECT" if "a lion cub" in prompt else "INCORRECT")
    responses = [r"\boxed{lion}", r"\boxed{a lion cub}", r"\boxed{a dog}", "no box", r"\boxed{a dog}"]
    found = Scorer(JUDGED, judge)(responses, [Reference(("Lion",), "What is it?")] * 5)
    assert found == [1.0, 1.0, 0.0, None, 0.0]
    assert len(judge.asked) == 2  # the same answer to the same question is graded once
    assert all("What is it?" in prompt and "- Lion" in prompt for prompt in judge.asked)


def test_verdicts_are_read_strictly(caplog):
    ask = lambda reply, answer="cub": Scorer(JUDGED, Judge(reply))([rf"\boxed{{{answer}}}"], [Reference(("Lion",))])[0]
    assert ask("CORRECT") == 1 and ask("INCORRECT") == 0
    assert ask("It is not INCORRECT to say so. CORRECT") == 1
    assert ask("It might be CORRECT, but: INCORRECT") == 0
    assert ask("perhaps") == 0 and "gives no verdict on 'cub'" in caplog.text
    judge = Judge("CORRECT")
    assert Scorer(JUDGED, judge)([r"\boxed{" + "x" * 1001 + "}"], [Reference(("Lion",))]) == [0.0] and not judge.asked


def test_a_judge_needs_its_section():
    with pytest.raises(ValueError, match="go together"):
        ScorerConfig(("judge",))
    with pytest.raises(ValueError, match="go together"):
        ScorerConfig(("box",), EndpointConfig("http://localhost:1/v1", "m"))


LION = Reference(("Lion",), "What is it?")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.001)


def graded(body):
    """The answer that a request asks to be graded."""
    return body["messages"][0]["content"].split("==========\n")[1].strip()


def test_a_judge_over_http(quick, monkeypatch, tmp_path, caplog):
    """Right, wrong, no verdict, a refusal, and a server that fails first: with the key, and the second time from the cache."""
    said = {
        "a lion cub": "CORRECT",
        "a dog": "INCORRECT",
        "a beast": "Who knows?",
        "a cat": Reply({"error": "no"}, 400),
    }
    failing = [Reply("busy", 503), Reply("slow down", 429, {"retry-after": "0"}), Reply(b"<html>")]
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with chat_server(lambda number, body: failing[number] if number < 3 else said[graded(body)]) as server:
        judge = EndpointConfig(server.url, "a-judge", key="JUDGE_KEY", workers=1, cache=str(tmp_path / "verdicts"))
        responses = [rf"\boxed{{{answer}}}" for answer in said] + [r"\boxed{lion}", "no box"]
        score = lambda: Scorer(ScorerConfig(("box", "judge"), judge))(responses, [LION] * len(responses))
        assert score() == [1.0, 0.0, 0.0, 0.0, 1.0, None]
        assert "gives no verdict on 'a beast'" in caplog.text and "refuses a request with 400" in caplog.text
        assert len(server.received) == len(failing) + len(said)
        for request in server.received:
            assert request.path == "/v1/chat/completions" and request.headers["authorization"] == "Bearer secret"
            assert request.body["model"] == "a-judge" and request.body["temperature"] == 0
            assert "What is it?" in request.body["messages"][0]["content"]
        assert score() == [1.0, 0.0, 0.0, 0.0, 1.0, None]
        assert len(server.received) == len(failing) + len(said) + 1  # a refusal is no verdict to keep


def test_a_judge_is_asked_no_faster_than_it_allows(quick):
    with chat_server(lambda number, body: "CORRECT") as server:
        judge = EndpointConfig(server.url, "a-judge", requests_per_second=20.0)
        began = time.monotonic()
        responses = [rf"\boxed{{{i} lions}}" for i in range(5)]
        assert Scorer(ScorerConfig(("judge",), judge))(responses, [LION] * 5) == [1.0] * 5
        assert time.monotonic() - began >= 4 / 20 and len(server.received) == 5


def test_a_judge_that_cannot_be_used_is_an_error_and_no_verdict(quick, monkeypatch):
    score = lambda judge: Scorer(ScorerConfig(("judge",), judge))([r"\boxed{lion}"], [LION])
    with chat_server(lambda number, body: Reply("wrong key", 401)) as server:
        with pytest.raises(EndpointError, match="answers 401: .*wrong key"):
            score(EndpointConfig(server.url, "a-judge"))
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(EndpointError, match="JUDGE_KEY does not hold an API key"):
        score(EndpointConfig(server.url, "a-judge", key="JUDGE_KEY"))
