"""The filter of analyses, on sentences as models write them."""

import pytest

from pixel_jax.synthesis.checks import local_problem, reveals, right_answer, whole_problem, with_answer

QUESTION = "What does the sign say?"
CHOICE = "What colour is the car?\nA. dark red\nB. green\nC. white"
INLINE = "Which animal is it? (A) a cat (B) a dog (C) a horse"

# text, question, answers, what is wrong
WHOLE = [
    ("A street with a sign far on the left, too small here to be read.", QUESTION, ["Exit 12"], None),
    ("The answer is likely written on the sign at the left.", QUESTION, ["Exit 12"], None),
    ("To find the answer, the sign on the left has to be looked at.", QUESTION, ["Exit 12"], None),
    ("A street with a sign that reads EXIT 12 on the left.", QUESTION, ["Exit 12"], "reveals the answer"),
    ("The answer is Paris, as the sign says.", QUESTION, ["Exit 12"], "reveals the answer"),
    ("The sign says \\boxed{Exit 12}.", QUESTION, ["Exit 12"], "reveals the answer"),
    ("Answer: I need a closer look at the sign.", QUESTION, ["Exit 12"], "reveals the answer"),
    ("A man and a dog stand in front of a house.", "How many dogs?", ["2"], None),
    ("A man and two dogs stand in front of a house.", "How many dogs?", ["2"], "reveals the answer"),
    ("A man and 2 dogs stand in front of a house.", "How many dogs?", ["two"], "reveals the answer"),
    ("Lines 12 and 20 of the table are hard to read.", "How many dogs?", ["2"], None),
    ("A man stands in a room; there is no window.", "Is the door open?", ["no"], None),
    ("The answer is no, the door is closed.", "Is the door open?", ["no"], "reveals the answer"),
    ("A car stands in the middle of a yard.", CHOICE, ["A"], None),
    ("A dark red car stands in the middle of a yard.", CHOICE, ["A"], "reveals the answer"),
    ("It might be dark red, green or white; it is far away.", CHOICE, ["A"], None),
    ("A green lawn, and a car on it that is far away.", CHOICE, ["A"], None),
    ("Far away on the grass stands an animal, it seems.", INLINE, ["B"], None),
    ("There is a dog, I believe, on the grass far away.", INLINE, ["B"], "reveals the answer"),
    ("A table with numbers in circles on the left.", "Which one? ① red ② blue", ["①"], None),
    ("A formula, of which x² is on the left.", "What is it?", ["²"], None),
    ("A circle that reads ① on the left of it.", "What is in the circle?", ["①"], "reveals the answer"),
    ("A long number on the left of the page.", "Which?", ["9" * 5000], None),
    ("", QUESTION, ["x y"], "empty"),
    (" \n ", QUESTION, ["x y"], "empty"),
    ("A street.", QUESTION, ["x y"], "too short"),
    ("A street. " * 300, QUESTION, ["x y"], "too long"),
    ('I look. <tool_call>\n{"name": "x"}\n</tool_call>', QUESTION, ["x y"], "markup in the text"),
    ("I would use crop_image on the sign over there.", QUESTION, ["x y"], "markup in the text"),
    ('The region is {"bbox_2d": [1, 2, 3, 4]}.', QUESTION, ["x y"], "markup in the text"),
    ("A street with a sign.<|im_end|>", QUESTION, ["x y"], "markup in the text"),
    ("<think>A street</think> with a sign.", QUESTION, ["x y"], "markup in the text"),
    ("<image>\nA street with a sign on the left.", QUESTION, ["x y"], "markup in the text"),
    ("As an AI, I see a street with a sign.", QUESTION, ["x y"], "talks about its instructions"),
    ("I was told not to answer, but there is a sign.", QUESTION, ["x y"], "talks about its instructions"),
]


@pytest.mark.parametrize(("text", "question", "answers", "problem"), WHOLE)
def test_the_whole_analysis_knows_no_answer(text, question, answers, problem):
    assert whole_problem(text, question, answers) == problem


LOCAL = [
    ("The sign is green, with white letters: Exit 12.\n\\boxed{Exit 12}", ["Exit 12"], None),
    ("The sign reads EXIT 12, so the answer is \\boxed{exit 12}.", ["Exit 12"], None),
    ("The car's paint is red, which is option A.\n\\boxed{A. dark red}", ["A"], None),
    ("I count the dogs: one at the door, two on the lawn.\n\\boxed{3}", ["3", "three"], None),
    ("The answer is clearly 3 when counting them.\n\\boxed{3}", ["3"], None),
    ("The first guess was \\boxed{3}, and indeed, three it is: \\boxed{3}", ["3"], None),
    ("The sign is green, with white letters: Exit 12.", ["Exit 12"], "no final answer"),
    ("The sign is green, with white letters: Exit 72.\n\\boxed{Exit 72}", ["Exit 12"], "wrong final answer"),
    ("I count the dogs: one at the door.\n\\boxed{}", ["3"], "wrong final answer"),
    ("\\boxed{Exit 12}", ["Exit 12"], "no analysis"),
    ("Answer: \\boxed{Exit 12}", ["Exit 12"], "no analysis"),
    ("I cannot read the sign in this crop.\n\\boxed{Exit 12}", ["Exit 12"], "says that it cannot see"),
    ("The sign is too blurry to be sure of it.\n\\boxed{Exit 12}", ["Exit 12"], "says that it cannot see"),
    ("The number is not visible in the crop.\n\\boxed{Exit 12}", ["Exit 12"], "says that it cannot see"),
    ("At first sight \\boxed{4}, but then I count again: \\boxed{3}", ["3"], "contradicts its answer"),
    ("There are some dogs, and the answer is 4.\n\\boxed{3}", ["3"], "contradicts its answer"),
    ("The car is white, so the answer is C.\n\\boxed{A}", ["A"], "contradicts its answer"),
    ("The door is closed. The answer is yes.\n\\boxed{no}", ["no"], "contradicts its answer"),
    ("The reference answer is 3, which I can see.\n\\boxed{3}", ["3"], "talks about its instructions"),
    ("```\nthree dogs on a lawn\n```\n\\boxed{3}", ["3"], "markup in the text"),
    ("", ["3"], "empty"),
]


@pytest.mark.parametrize(("text", "answers", "problem"), LOCAL)
def test_the_local_analysis_arrives_at_the_answer(text, answers, problem):
    assert local_problem(text, answers) == problem


@pytest.mark.parametrize(("found", "answers", "right"), [("B) green", ["B"], True), ("B. green", ["C"], False)])
def test_a_letter_may_come_with_its_option(found, answers, right):
    assert right_answer(found, answers) == right


def test_a_cue_may_not_give_the_answer_away():
    assert reveals("the sign that says Exit 12", QUESTION, ["exit 12"])
    assert not reveals("the sign on the left", QUESTION, ["exit 12"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Three dogs.\n\\boxed{three}", "Three dogs.\nThe answer is \\boxed{3}"),
        ("Three dogs.\n\n$\\boxed{three}$", "Three dogs.\nThe answer is \\boxed{3}"),
        ("So it is \\boxed{three}. That is all.", "So it is \\boxed{3}"),
        ("First \\boxed{3}, and finally **\\boxed{three}**", "First \\boxed{3}, and finally \\boxed{3}"),
        ("So \\(\\boxed{\\text{three}}\\)", "So \\boxed{3}"),
    ],
)
def test_the_box_gets_the_answer_as_it_is_written_in_the_data(text, expected):
    assert with_answer(text, "3") == expected
