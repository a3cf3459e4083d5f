"""Files written in the released formats of MM-SpuBench and R-Bench, whole and damaged.

The sources of the formats, and what could not be verified, stand in the readers. The row of MM-SpuBench is the one that a public
loader prints; the fields of R-Bench are those of the authors' `eval.py`, `utils.py` and `demos/eval_rbench.py`.
"""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from pixel_jax.config import ConfigError
from pixel_jax.data.example import Example, ExampleError, ReadReport
from unlearn_jax.noisy_responses.config import QuestionsConfig
from unlearn_jax.noisy_responses.questions import ChoiceQuestion, draw, split_pictures
from unlearn_jax.noisy_responses.readers import READERS
from unlearn_jax.noisy_responses.readers.mm_spubench import read_mm_spubench
from unlearn_jax.noisy_responses.readers.r_bench import read_r_bench

SPURIOUS = {
    "core_attributes": ["compact design", "branding", "cosmetic container"],
    "spurious_attributes": ["round shape", "marble-like background", "shiny surface"],
    "spurious_correlation_type": ["Shape", "Background"],
    "question": "Which feature best indicates the identity of the round object on the marble-like surface?",
    "choices": ["A. The branding on it", "B. The marble-like background", "C. The round shape", "D. Its shiny surface"],
    "answer": "A",
}
RELATION = {"question_id": 7, "image": "0a1b2c.jpg", "text": "Is the man riding a horse in the image?", "label": "Yes"}
BOXES = {"subject": "Man", "object": "Horse", "sub_box": [0.1, 0.2, 0.5, 0.9], "obj_box": [0.3, 0.5, 0.8, 1.0]}
STOP = lambda: ReadReport("a file")


def picture(path, size=(30, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, format="PNG")


def spurious(tmp_path, rows):
    (tmp_path / "annotation.json").write_text(json.dumps(rows))
    for number in range(len(rows)):
        picture(tmp_path / "data" / "images" / f"{number:06d}.jpg")
    return tmp_path


def relations(tmp_path, rows, name="image-level_filterd.json"):
    (tmp_path / name).write_text(json.dumps(rows))
    for row in rows:
        if isinstance(row, dict) and isinstance(row.get("image"), str):
            picture(tmp_path / "images" / row["image"])
    return tmp_path / name


def test_mm_spubench_as_released(tmp_path):
    other = {**SPURIOUS, "answer": "C", "spurious_correlation_type": ["Texture and Noise"]}
    found = read_mm_spubench(spurious(tmp_path, [SPURIOUS, other]), STOP())
    assert [x.answer for x in found] == ["A", "C"] and [x.picture for x in found] == ["000000", "000001"]
    assert found[0].choices == ("A", "B", "C", "D")
    assert [x.example.category for x in found] == ["Shape + Background", "Texture and Noise"]
    assert found[0].example.question == (
        "Which feature best indicates the identity of the round object on the marble-like surface?\nA. The branding on it\n"
        "B. The marble-like background\nC. The round shape\nD. Its shiny surface\n"
        "Answer with the option's letter from the given choices directly."
    )
    with Image.open(tmp_path / "data" / "images" / "000001.jpg") as image:
        np.testing.assert_array_equal(found[1].pixels(), np.array(image))


def test_choices_without_letters_get_them(tmp_path):
    plain = {**SPURIOUS, "choices": ["one", "(B) two", "C: three"], "answer": "(b)"}
    (question,) = read_mm_spubench(spurious(tmp_path, [plain]), STOP())
    assert question.answer == "B" and "A. one\nB. two\nC. three\n" in question.example.question


@pytest.mark.parametrize(
    "change, message",
    [
        ({"answer": "E"}, r"annotation\.json, row 2: 'answer' is 'E', not one of A, B, C, D"),
        ({"answer": 1}, r"row 2: 'answer' is 1, not a text"),
        ({"choices": "A. one"}, r"row 2: 'choices' is 'A\. one', not a list of texts"),
        ({"choices": ["A. one"]}, r"row 2: 'choices' has 1 texts, not 2 to 8"),
        ({"choices": ["B. one", "A. two"]}, r"row 2: the choice 'B\. one' stands in the place of A"),
        ({"choices": ["A. one", None]}, r"row 2: 'choices' is .*None.*, not a list of texts"),
        ({"question": " "}, r"row 2: 'question' is empty"),
        ({"spurious_correlation_type": None}, r"row 2: 'spurious_correlation_type' is None"),
    ],
)
def test_a_damaged_row_of_mm_spubench_is_named(tmp_path, change, message):
    directory = spurious(tmp_path, [SPURIOUS, {**SPURIOUS, **change}])
    with pytest.raises(ExampleError, match=message):
        read_mm_spubench(directory, STOP())
    report = ReadReport("a file", drop=True)
    assert len(read_mm_spubench(directory, report)) == 1
    assert re.search(message, report.dropped[0])


def test_damaged_files_of_mm_spubench_are_named(tmp_path):
    with pytest.raises(ExampleError, match=r"annotation\.json' cannot be opened"):
        read_mm_spubench(tmp_path, STOP())
    directory = spurious(tmp_path, [SPURIOUS, SPURIOUS])
    (directory / "data" / "images" / "000001.jpg").unlink()
    with pytest.raises(ExampleError, match=r"row 2: there is no picture '.*000001'\.jpg"):
        read_mm_spubench(directory, STOP())
    (directory / "data" / "images" / "000001.jpg").write_bytes(b"GIF, or is it?")
    with pytest.raises(ExampleError, match=r"annotation\.json, row 2: .*000001\.jpg'? cannot be read"):
        read_mm_spubench(directory, STOP())
    (tmp_path / "annotation.json").write_text(json.dumps([SPURIOUS])[:-20])
    with pytest.raises(ExampleError, match=r"annotation\.json is not JSON"):
        read_mm_spubench(directory, STOP())
    for rows in ({"a": SPURIOUS}, [], "none"):
        (tmp_path / "annotation.json").write_text(json.dumps(rows))
        with pytest.raises(ExampleError, match="not a list of questions"):
            read_mm_spubench(directory, STOP())
    (tmp_path / "annotation.json").write_text(json.dumps([3]))
    with pytest.raises(ExampleError, match="row 1: it is 3, not an object"):
        read_mm_spubench(directory, STOP())


def test_r_bench_as_released(tmp_path):
    rows = [RELATION, {**RELATION, "question_id": 8, "label": "No. (opposite)", "qtype": "opposite", "image": "x.jpg"}]
    found = read_r_bench(relations(tmp_path, rows), STOP())
    assert [x.answer for x in found] == ["Yes", "No"] and [x.name for x in found] == ["7", "8"]
    assert [x.picture for x in found] == ["0a1b2c.jpg", "x.jpg"] and [x.example.category for x in found] == [
        "",
        "opposite",
    ]
    asked = "Is the man riding a horse in the image?\nAnswer the question using a single word or phrase."
    assert found[0].example.question == asked and found[0].choices == ("Yes", "No")


def test_questions_of_instances_are_drawn_and_asked_as_the_authors_do(tmp_path):
    path = relations(tmp_path, [{**RELATION, **BOXES}], "instance-level_filterd.json")
    (question,) = read_r_bench(path, STOP())
    assert question.example.question.startswith(
        "Is the man in red bounding box riding a horse in green bounding box in the image?\n"
    )
    with Image.open(tmp_path / "images" / RELATION["image"]) as image:  # `draw_box` of the authors' utils.py
        w, h = image.size
        pen = ImageDraw.Draw(image)
        for box, colour in (("sub_box", "red"), ("obj_box", "green")):
            pen.rectangle([b * x for b, x in zip(BOXES[box], [w, h, w, h], strict=True)], outline=colour, width=4)
        np.testing.assert_array_equal(question.pixels(), np.array(image))


def test_a_subset_of_r_bench(tmp_path):
    rows = [{**RELATION, "question_id": number} for number in range(4)]
    path = relations(tmp_path, rows)
    subset = tmp_path / "nocaps_image-level_rel_ids_1.json"
    subset.write_text("[2, 0]")
    assert [x.name for x in read_r_bench(path, STOP(), subset=subset)] == ["0", "2"]
    subset.write_text("[2, 9]")
    with pytest.raises(ExampleError, match=r"rel_ids_1\.json: the question '9' is not in .*image-level_filterd\.json"):
        read_r_bench(path, STOP(), subset=subset)
    subset.write_text('{"2": 1}')
    with pytest.raises(ExampleError, match="not a list of ids"):
        read_r_bench(path, STOP(), subset=subset)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"label": "maybe"}, r"filterd\.json, row 2: 'label' is 'maybe', which begins with neither Yes nor No"),
        ({"label": None}, r"row 2: 'label' is None, not a text"),
        ({"image": "../../etc/passwd"}, r"row 2: (there is no image|.*leads to)"),
        ({"image": "missing.jpg"}, r"row 2: there is no image .*missing\.jpg"),
        ({"text": ""}, r"row 2: 'text' is empty"),
        ({"sub_box": [0.1, 0.2, 0.5]}, r"row 2: 'sub_box' is \[0\.1, 0\.2, 0\.5\], not left, top, right and bottom"),
        ({**BOXES, "obj_box": [0.1, 0.2, 3, 4]}, r"row 2: 'obj_box' is \[0\.1, 0\.2, 3, 4\]"),
        ({**BOXES, "subject": 4}, r"row 2: 'subject' is 4, not a text"),
    ],
)
def test_a_damaged_row_of_r_bench_is_named(tmp_path, change, message):
    path = relations(tmp_path, [RELATION])
    path.write_text(json.dumps([RELATION, {**RELATION, "question_id": 8, **change}]))
    with pytest.raises(ExampleError, match=message):
        read_r_bench(path, STOP())
    report = ReadReport("a file", drop=True)
    assert [x.name for x in read_r_bench(path, report)] == ["7"] and re.search(message, report.dropped[0])


def test_an_id_of_r_bench_that_is_none_or_not_new(tmp_path):
    path = relations(tmp_path, [RELATION, RELATION])
    with pytest.raises(ExampleError, match=r"row 2: 'question_id' '7' occurs twice"):
        read_r_bench(path, STOP())
    path.write_text(json.dumps([{**RELATION, "question_id": [1]}]))
    with pytest.raises(ExampleError, match=r"row 1: 'question_id' is \[1\], not a number"):
        read_r_bench(path, STOP())


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@given(st.sampled_from(sorted({**RELATION, **BOXES})), values)
def test_no_value_of_r_bench_ends_in_another_error(tmp_path_factory, name, value):
    directory = tmp_path_factory.getbasetemp() / "r-bench"
    directory.mkdir(exist_ok=True)
    path = relations(directory, [RELATION])
    path.write_text(json.dumps([{**RELATION, **BOXES, name: value}]))
    try:
        (question,) = read_r_bench(path, STOP())
    except ExampleError as error:
        assert str(path) in str(error) and "row 1" in str(error)
    else:
        assert question.answer in question.choices


@given(st.sampled_from(sorted(SPURIOUS)), values)
def test_no_value_of_mm_spubench_ends_in_another_error(tmp_path_factory, name, value):
    directory = tmp_path_factory.getbasetemp() / "mm-spubench"
    directory.mkdir(exist_ok=True)
    spurious(directory, [{**SPURIOUS, name: value}])
    try:
        (question,) = read_mm_spubench(directory, STOP())
    except ExampleError as error:
        assert "annotation.json, row 1" in str(error)
    else:
        assert question.answer in question.choices


def test_a_reader_is_a_value_of_the_config(tmp_path):
    (tmp_path / "a").mkdir()
    directory = spurious(tmp_path / "a", [SPURIOUS])
    data = QuestionsConfig(reader="mm_spubench", path=str(directory))
    assert READERS[data.reader](data, STOP())[0].answer == "A"
    (tmp_path / "b").mkdir()
    path = relations(tmp_path / "b", [RELATION])
    moved = (tmp_path / "b" / "images").rename(tmp_path / "pictures")
    data = QuestionsConfig(reader="r_bench", path=str(path), images=str(moved))
    assert READERS[data.reader](data, STOP())[0].answer == "Yes"


def question(number, picture):
    return ChoiceQuestion(Example(str(number), "?", (), ("A",)), ("A", "B", "C"), picture)


def test_pictures_are_held_out_whole():
    questions = [question(i, f"picture {i % 5}") for i in range(20)]
    learned, held = split_pictures(questions, 0.4, seed=0)
    assert len(learned) == 12 and len(held) == 8 and not {x.picture for x in learned} & {x.picture for x in held}
    assert {x.picture for x in split_pictures(questions[::-1], 0.4, 0)[1]} == {x.picture for x in held}
    with pytest.raises(ConfigError, match="1 picture: none is left to hold out"):
        split_pictures(questions[:1], 0.4, 0)
    drawn = draw(questions, 7, 0, "config.data.tests")
    assert len({x.name for x in drawn}) == 7 and drawn == draw(questions, 7, 0, "") != draw(questions, 7, 1, "")
    with pytest.raises(ConfigError, match=r"config\.data\.tests is 21, the data have 20"):
        draw(questions, 21, 0, "config.data.tests")


def test_wrong_answers_are_each_of_the_others():
    random, right = np.random.default_rng(0), question(0, "")
    wrong = [right.wrong(random).answer for _ in range(60)]
    assert set(wrong) == {"B", "C"} and 20 < wrong.count("B") < 40 and right.answer == "A"
