"""Seeds from a file: read as written, refused by name."""

import json

import pytest
from PIL import Image

from pixel_jax.synthesis.seeds import SeedError, read_seeds

GOOD = {"question": "Which digit?", "answer": "7", "images": ["a.png"], "cue": "the card", "box": [10, 5, 20.5, 30]}
VIDEO = {"question": "Who?", "answer": "B", "images": ["a.png"] * 3, "video": True, "cue": "the end", "frames": [3, 2]}


@pytest.fixture
def write(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")

    def write(*rows):
        path = tmp_path / "seeds.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), "utf-8")
        return path

    return write


def test_reads_what_is_written(write):
    direct = {"question": "Was?", "answer": ["\\boxed{['7', 'seven']}", "sieben"], "images": ["a.png"], "id": "x"}
    path = write(GOOD, "", VIDEO | {"seconds": 2}, direct)
    image, video, plain = read_seeds(path)
    assert (image.id, image.cue, image.box, image.answers) == ("1", "the card", (10.0, 5.0, 20.5, 30.0), ("7",))
    assert image.images == (path.parent / "a.png",) and image.looks and not image.video and image.image == 1
    assert (video.id, video.frames, video.video, video.seconds) == ("3", (2, 3), True, 2)
    assert (plain.id, plain.answers, plain.looks) == ("x", ("7", "seven", "sieben"), False)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
def test_boxes_are_those_of_the_upright_image(write, name):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: what is 40 x 30 in the file is shown as 30 x 40
    row = GOOD | {"images": [name]}
    path = write(row | {"box": [10, 5, 30, 40]})
    Image.new("RGB", (40, 30)).save(path.parent / name, exif=exif)
    assert read_seeds(path)[0].box == (10, 5, 30, 40)
    with pytest.raises(SeedError, match="within 30 x 40 pixels"):
        read_seeds(write(row | {"box": [10, 5, 40, 30]}))


BAD = [
    ("{", "is not JSON"),
    ("[1]", "is list, not an object"),
    (GOOD | {"anwser": "7"}, "unknown field 'anwser'; known are id, "),
    (GOOD | {"question": " "}, "'question' must be a text, not ' '"),
    (GOOD | {"answer": []}, r"'answer' must be .*, not \[\]"),
    (GOOD | {"images": []}, "'images' must be a list of at least one path"),
    (GOOD | {"images": ["b.png"]}, "there is no image .*b.png"),
    (GOOD | {"question": "What \ud800?"}, "half a surrogate pair"),
    (GOOD | {"id": 3}, "'id' must be a text, not 3"),
    (GOOD | {"image": 2}, "'image' must be a number from 1 to 1, not 2"),
    (GOOD | {"seconds": 1}, "'seconds' must be a positive number, of a video, not 1"),
    (GOOD | {"box": [10, 5, 20]}, "'box' must be four numbers"),
    (GOOD | {"box": [10, 5, 20, "x"]}, "'box' must be four numbers"),
    (GOOD | {"box": [20, 5, 10, 30]}, "'box' must be x1 < x2 and y1 < y2 within 40 x 30 pixels"),
    (GOOD | {"box": [10, 5, 41, 30]}, "within 40 x 30 pixels"),
    (GOOD | {"box": [-1, 5, 20, 30]}, "within 40 x 30 pixels"),
    (GOOD | {"box": [float("nan"), 5, 20, 30]}, "NaN is no JSON number"),
    (GOOD | {"frames": [1]}, "'frames' must be left out for images"),
    ({**GOOD, "cue": None}, "'cue' must be the name of what is looked at"),
    (GOOD | {"cue": "two\nlines"}, "'cue' must be .* one line"),
    (VIDEO | {"frames": [4]}, r"'frames' must be 1 to 8 numbers from 1 to 3, not \[4\]"),
    (VIDEO | {"frames": [0]}, "numbers from 1 to 3"),
    (VIDEO | {"frames": []}, "numbers from 1 to 3"),
    (VIDEO | {"frames": [2, 2]}, "numbers that differ"),
    (VIDEO | {"box": [0, 0, 9, 9]}, "'box' must be left out for a video"),
    ({"question": "?", "answer": "7", "images": ["a.png"], "cue": "it"}, "'cue' must be left out where"),
]


@pytest.mark.parametrize(("row", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_a_bad_line_is_named(write, row, message):
    path = write(GOOD, "", row)
    with pytest.raises(SeedError, match=message) as caught:
        read_seeds(path)
    assert str(caught.value).startswith(f"{path}:3")


def test_ids_are_unique_and_files_have_seeds(write, tmp_path):
    with pytest.raises(SeedError, match=":2: the id '1' is that of line 1 already"):
        read_seeds(write(GOOD, GOOD | {"id": "1"}))
    with pytest.raises(SeedError, match="has no seeds"):
        read_seeds(write(""))
    with pytest.raises(SeedError, match="nowhere' cannot be opened"):
        read_seeds(tmp_path / "nowhere")


def test_an_image_that_cannot_be_read_is_no_mistake_of_the_line(write, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    assert read_seeds(write(GOOD))[0].box == tuple(GOOD["box"])
