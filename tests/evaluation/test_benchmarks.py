"""Readers, on files written here in the formats that are released."""

import base64
import json
import sys
import zipfile

import av
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from pixel_jax import score_answer
from pixel_jax.data.clips import Span, clip_frame_size, frame_indices, load_clip
from pixel_jax.data.images import ImageError
from pixel_jax.data.own import read_own
from pixel_jax.evaluation import benchmarks
from pixel_jax.evaluation.benchmarks import BenchmarkError, read
from tests.data.ffmpeg import ffmpeg, frames_of, make


def sizes_of(question):
    return [image.shape[:2] for image in question.outline().images]


def picture(path, height=30, width=40, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(path, **options)


def video(path, frames=40, rate=10, size=(48, 64)):
    """A video whose every frame has a brightness of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx" if path.suffix == ".webm" else "mpeg4", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.bit_rate = 4_000_000
        for i in range(frames):
            image = np.full((*size, 3), 20 + 5 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def brightness(frames):
    return [round((float(frame.mean()) - 20) / 5) for frame in frames]


VSTAR = [
    {
        "image": "direct_attributes/sa_4690.jpg",
        "text": "What is the material of the glove?\n(A) rubber\n(B) cotton\n(C) kevlar\n(D) leather\n"
        "Answer with the option's letter from the given choices directly.",
        "category": "direct_attributes",
        "question_id": 0,
        "label": "A",
    },
    {
        "image": "relative_position/sa_86.jpg",
        "text": "Is the dog left or right of the car?\n(A) right\n(B) left\nAnswer with the option's letter.",
        "category": "relative_position",
        "question_id": 0,
        "label": "B",
    },
]


def test_vstar(tmp_path):
    for row in VSTAR:
        picture(tmp_path / row["image"])
    (tmp_path / "test_questions.jsonl").write_text("\n".join(map(json.dumps, VSTAR)))
    found, split = read("vstar", tmp_path)
    assert split == "test" and [x.id for x in found] == ["direct_attributes-0", "relative_position-0"]
    assert found[0].question == VSTAR[0]["text"] and found[0].answer == ("A",) and not found[0].video
    assert found[1].category == "relative_position" and found[1].images == (tmp_path / VSTAR[1]["image"],)
    with pytest.raises(BenchmarkError, match="is the split 'test', the config says 'val'"):
        read("vstar", tmp_path, split="val")
    assert not found[0].fields
    # A file beside each picture, as github.com/penghao-wu/vstar, visual_search.py reads it: boxes are x, y, width, height.
    beside = tmp_path / VSTAR[0]["image"].replace(".jpg", ".json")
    note = {"target_object": ["glove"], "bbox": [[5, 6, 10, 4]], "question": "?", "options": ["rubber", "cotton"]}
    beside.write_text(json.dumps(note))
    assert read("vstar", tmp_path)[0][0].fields == {"box": [[5, 6, 15, 10]]}
    beside.write_text(json.dumps(note | {"bbox": [[5, 6, 10]]}))
    with pytest.raises(BenchmarkError, match="sa_4690.json: 'bbox' is .* not a list of x, y, width and height"):
        read("vstar", tmp_path)


# Columns as github.com/EvolvingLMMs-Lab/lmms-eval, lmms_eval/tasks/hrbench/utils.py reads them (index, question, answer, A to D,
# category, cycle_category, image in base64); the file's name is that of huggingface.co/datasets/DreamMr/HR-Bench. Not verified:
# whether `index` and `cycle_category` are numbers or texts (both are read), and the encoding of the pictures (JPEG or PNG).
def hr_rows(path):
    picture(path)
    encoded = base64.b64encode(path.read_bytes()).decode()
    row = {"question": "What colour is the flag?", "category": "single", "image": encoded}
    texts = ["red", "blue", "green", "white"]
    return [
        row
        | {"index": i, "cycle_category": str(i)}
        | dict(zip("ABCD", texts[-i:] + texts[:-i], strict=True))
        | {"answer": "ABCD"[i]}
        for i in range(4)
    ]


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_hrbench(tmp_path):
    rows = hr_rows(tmp_path / "a.jpg")
    write_parquet(tmp_path / "hr_bench_4k.parquet", rows)
    found, split = read("hrbench", tmp_path)
    assert split == "test" and [x.id for x in found] == [f"hr_bench_4k-{i}" for i in range(4)]
    assert found[1].question == "What colour is the flag?\n(A) white\n(B) red\n(C) blue\n(D) green"
    assert [score_answer(r"\boxed{red}", x.answer, question=x.question, rules=("choice",)) for x in found] == [1.0] * 4
    assert found[0].category == "single" and found[2].fields == {"cycle_category": "2"}
    assert sizes_of(found[0]) == [(30, 40)] and found[0].images[0].data is found[3].images[0].data
    np.testing.assert_array_equal(found[0].query().images[0], np.asarray(Image.open(tmp_path / "a.jpg")))
    write_parquet(tmp_path / "hr_bench_8k.parquet", rows)
    with pytest.raises(BenchmarkError, match="holds 2 files .*name the file"):
        read("hrbench", tmp_path)
    for damage, why in (
        ({"answer": "E"}, "row 1: the answer 'E' is none of the options"),
        ({"D": None, "answer": "D"}, "row 1: the answer 'D' is none of"),
        ({"image": "not base64!"}, "row 1: 'image' is no base64"),
        ({"question": 7}, "row 1: 'question' is 7, of the type int"),
    ):
        write_parquet(tmp_path / "one" / "hr_bench_8k.parquet", [rows[0] | damage])
        with pytest.raises(BenchmarkError, match=why):
            read("hrbench", tmp_path / "one")
    write_parquet(tmp_path / "one" / "hr_bench_8k.parquet", [{k: v for k, v in rows[0].items() if k != "category"}])
    with pytest.raises(BenchmarkError, match="has no field 'category'"):
        read("hrbench", tmp_path / "one")
    # The picture itself is damaged: found when its header is read, and the question counts as wrong.
    write_parquet(
        tmp_path / "one" / "hr_bench_8k.parquet", [rows[0] | {"image": base64.b64encode(b"no picture").decode()}]
    )
    (broken,), _ = read("hrbench", tmp_path / "one")
    with pytest.raises(ImageError, match="the picture of .*hr_bench_8k.parquet, row 1"):
        broken.outline()
    cut = tmp_path / "cut.parquet"
    cut.write_bytes((tmp_path / "hr_bench_4k.parquet").read_bytes()[:-200])
    with pytest.raises(BenchmarkError, match="cut.parquet cannot be read"):
        read("hrbench", cut)


# Keys as github.com/dddraxxx/Mini-o3, examples/minio3/preprocess_visualprobe.py reads them (a list with images, problem,
# solution, doc_id); the authors' training command has `data.image_key=images`, `data.answer_key=solution` and the folders'
# names. Not verified: to which folder `images` are relative (both are tried), and whether `solution` is boxed (it may be).
def test_visualprobe(tmp_path):
    folder = tmp_path / "VisualProbe_Hard"
    picture(folder / "data" / "7.jpg")
    rows = [
        {"doc_id": 3, "images": ["VisualProbe_Hard/data/7.jpg"], "problem": "<image>\nWhich number?", "solution": "42"},
        {"images": ["data/7.jpg"], "problem": "Which name?", "solution": "\\boxed{Ada}", "data_source": "hard"},
    ]
    (folder / "val.json").write_text(json.dumps(rows))
    found, split = read("visualprobe", folder)
    assert (
        split == "test" and [x.id for x in found] == ["3", "1"] and {x.category for x in found} == {"VisualProbe_Hard"}
    )
    assert [x.question for x in found] == ["Which number?", "Which name?"] and [x.answer for x in found] == [
        ("42",),
        ("Ada",),
    ]
    assert [sizes_of(x) for x in found] == [[(30, 40)]] * 2
    for damage, why in (
        ({"images": []}, "row 0 has no images"),
        ({"images": ["../../etc/passwd"]}, "row 0: "),
        ({"problem": None}, "row 0: 'problem' is None"),
        ({"solution": 0.5}, "row 0: 'solution' is 0.5"),
    ):
        (folder / "val.json").write_text(json.dumps([rows[0] | damage]))
        with pytest.raises(BenchmarkError, match=why):
            read("visualprobe", folder)
    (folder / "val.json").write_text('{"problem": "?"}')
    with pytest.raises(BenchmarkError, match="holds dict, not a list"):
        read("visualprobe", folder)


# Columns as on the card of huggingface.co/datasets/lmms-lab/Video-MME; paths as in lmms_eval/tasks/videomme/utils.py ("data/",
# .mp4, .MP4 or .mkv) and vlmeval/dataset/videomme.py ("video/"). Not verified: that options always begin with their letters
# (both loaders join them as they are); a row where they do not is refused.
MME = {
    "video_id": "001",
    "duration": "short",
    "domain": "Knowledge",
    "sub_category": "Humanity & History",
    "url": "https://example.invalid/watch?v=fFjv93ACGo8",
    "videoID": "fFjv93ACGo8",
    "question_id": "001-1",
    "task_type": "Counting Problem",
    "question": "What is most common?",
    "options": ["A. Apples.", "B. Candles.", "C. Berries.", "D. All alike."],
    "answer": "C",
}


def test_videomme(tmp_path):
    path = tmp_path / "videomme" / "test-00000-of-00001.parquet"
    write_parquet(path, [MME, MME | {"question_id": "002-1", "videoID": "x", "duration": "long"}])
    video(tmp_path / "data" / "fFjv93ACGo8.mp4")
    video(tmp_path / "video" / "x.mkv", frames=20)
    found, split = read("videomme", tmp_path)
    assert (
        split == "test"
        and [x.id for x in found] == ["001-1", "002-1"]
        and [x.category for x in found] == ["short", "long"]
    )
    assert found[0].question.splitlines()[1:] == MME["options"] and found[0].answer == ("C",) and found[0].video
    assert found[0].fields["task_type"] == "Counting Problem"
    video(tmp_path / "a.mp4")
    frames = found[0].query().images
    assert len(frames) == 16 and brightness(frames) == sorted(brightness(frames))
    assert read("videomme", path)[0] == found
    for damage, why in (
        ({"videoID": "gone"}, "row 1: there is no image .*gone.mp4"),
        ({"answer": "E"}, "row 1: the answer 'E' is none of the options"),
        ({"options": ["Apples", "Candles"]}, "row 1: the answer 'C' is none of the options"),
        ({"videoID": "../a"}, "row 1: .* which is not in .*image_folders to allow it"),
    ):
        write_parquet(path, [MME | damage])
        with pytest.raises(BenchmarkError, match=why):
            read("videomme", tmp_path)
    path.write_bytes(b"PAR1")
    with pytest.raises(BenchmarkError, match="cannot be read"):
        read("videomme", tmp_path)


TALLY = {
    "answer": 4,
    "data_source": "imported_genome",
    "image": "VG_100K_2/2410408.jpg",
    "image_id": 92410408,
    "issimple": False,
    "question": "How many headlights does the black bus have?",
    "question_id": 30095774,
}


def test_tallyqa_complex(tmp_path):
    picture(tmp_path / "images" / TALLY["image"])
    rows = [TALLY, TALLY | {"question_id": 7, "issimple": True}, TALLY | {"question_id": 8, "data_source": "amt"}]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    found, split = read("tallyqa", tmp_path, tmp_path / "images")
    assert split == "test" and [x.id for x in found] == ["30095774", "8"]
    assert found[0].answer == ("4",) and [x.category for x in found] == ["imported_genome", "amt"]
    sampled, _ = read("tallyqa", tmp_path / "test.json", tmp_path / "images", sample=1, seed=3)
    assert len(sampled) == 1 and sampled == read("tallyqa", tmp_path, tmp_path / "images", sample=1, seed=3)[0]


INFO = {
    "questionId": 98313,
    "question": "Which social platform has heavy female audience?",
    "image_local_name": "20471.jpeg",
    "image_url": "http://example.invalid/20471.jpeg",
    "ocr_output_file": "20471.json",
    "answers": ["pinterest", "Pinterest"],
    "data_split": "val",
    "answer_type": ["single-span"],
    "operation/reasoning": [],
}


def test_infographicsvqa(tmp_path):
    picture(tmp_path / "images" / "20471.jpeg")
    head = {"dataset_name": "infographicVQA", "dataset_version": "1.0", "dataset_split": "val"}
    path = tmp_path / "infographicsVQA_val_v1.0_withQT.json"
    path.write_text(json.dumps(head | {"data": [INFO]}))
    (found,), split = read("infovqa", path, tmp_path / "images")
    assert split == "val" and found.id == "98313" and found.answer == ("pinterest", "Pinterest")
    assert found.category == "single-span" and found.images == (tmp_path / "images" / "20471.jpeg",)
    hidden = {name: value for name, value in INFO.items() if name != "answers"}
    path.write_text(json.dumps(head | {"dataset_split": "test", "data": [hidden]}))
    with pytest.raises(BenchmarkError, match="row 0 has no answers .split 'test'.*server"):
        read("infovqa", path, tmp_path / "images")


def test_mvbench(tmp_path):
    row = {"question": "What happened?", "candidates": ["Sat down.", "Ran."], "answer": "Ran."}
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "action_sequence.json").write_text(
        json.dumps([row | {"video": "ZS9XR.mp4", "start": 1.0, "end": 3.0}])
    )
    (tmp_path / "json" / "fine_grained_action.json").write_text(json.dumps([row | {"video": "a.mp4"}]))
    (tmp_path / "json" / "episodic_reasoning.json").write_text(
        json.dumps([row | {"video": "show/clip_0", "start": 0.0, "end": 5.0}])
    )
    video(tmp_path / "video/star/Charades_v1_480/ZS9XR.mp4")
    video(tmp_path / "video/Moments_in_Time_Raw/videos/a.mp4", frames=9)
    folder = tmp_path / "video/tvqa/frames_fps3_hq/show/clip_0"
    for i in range(1, 13):
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((48, 64, 3), 20 + 5 * i, np.uint8)).save(folder / f"{i:05d}.jpg", quality=95)
    found, split = read("mvbench", tmp_path)
    assert split == "test"
    assert [x.category for x in found] == ["Action Sequence", "Fine-grained Action", "Episodic Reasoning"]
    assert found[0].question == "What happened?\n(A) Sat down.\n(B) Ran." and found[0].answer == ("B",)
    assert found[0].video and sizes_of(found[0]) == [(48, 64)] * 16
    seen = found[0].query()
    assert seen.is_video and seen.seconds == 1.0
    # Ten frames a second, seconds 1 to 3: frames 10 to 30.
    assert brightness(seen.images) == frame_indices((1.0, 3.0), 10, 39, 16)
    assert brightness(found[1].query().images) == frame_indices(None, 10, 8, 16)
    assert brightness(found[2].query().images) == frame_indices((0.0, 5.0), 3, 12, 16, first=1)
    (tmp_path / "json" / "action_sequence.json").write_text(json.dumps([row | {"answer": "Slept.", "video": "a.mp4"}]))
    with pytest.raises(BenchmarkError, match="answer 'Slept.' is none of"):
        read("mvbench", tmp_path)


def test_frames_are_the_middles_of_equal_parts():
    assert frame_indices(None, 25, 160, 16) == [5 + 10 * i for i in range(16)]
    assert frame_indices((2.0, 6.0), 10, 1000, 4) == [25, 35, 45, 55]
    assert frame_indices((0.0, 99.0), 10, 7, 4) == [0, 2, 4, 5]  # 3.5 is rounded to even, as MVBench's code does
    assert frame_indices((50.0, 60.0), 10, 7, 4) == [7, 7, 7, 7]  # beyond the end


def test_other_video_files(tmp_path):
    video(tmp_path / "a.webm", frames=20)
    assert clip_frame_size(tmp_path / "a.webm") == (48, 64)
    assert brightness(load_clip(tmp_path / "a.webm", Span(frames=4))) == frame_indices(None, 10, 19, 4)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n/etc/passwd\n")
    (tmp_path / "torn.mp4").write_bytes((tmp_path / "a.webm").read_bytes()[:3])
    (tmp_path / "empty").mkdir()
    for name, message in {
        "list.m3u8": "it is no picture .* and no video",
        "torn.mp4": "it is no picture .* and no video",
        "empty": "holds no frames",
        "http://example.invalid/a.mp4": "cannot be opened",
    }.items():
        with pytest.raises(ImageError, match=message):
            load_clip(tmp_path / name)


def test_prepared_parquet(tmp_path):
    frames = [f"frames/v{i}.jpg" for i in range(3)]
    for name in ["a.jpg", *frames]:
        picture(tmp_path / "images" / name)
    rows = [
        {
            "question": "<image>\nWhich?",
            "answer": [r"\boxed{A}"],
            "image": ["a.jpg"],
            "is_video": None,
            "qid": "vstar-0",
        },
        {
            "question": "How many?",
            "answer": [r"\boxed{['12', 'twelve']}"],
            "image": ["a.jpg"],
            "is_video": False,
            "qid": "infovqa-3",
        },
        {"question": "What?", "answer": [r"\boxed{B}"], "image": frames, "is_video": True, "qid": "mvbench-test-1"},
    ]
    path = tmp_path / "vstar.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found, split = read("prepared", path, tmp_path / "images")
    assert split == "test" and [x.answer for x in found] == [("A",), ("12", "twelve"), ("B",)]
    assert found[0].question == "<image>\nWhich?"  # the marker stays in the text, as in the released evaluation
    assert [x.category for x in found] == ["vstar", "infovqa", "mvbench"]
    assert found[2].video and sizes_of(found[2]) == [(30, 40)] * 3 and len(found[2].query().images) == 3
    path.write_bytes(b"PAR1")
    with pytest.raises(BenchmarkError, match="vstar.parquet cannot be read"):
        read("prepared", path)


def test_prepared_images_stay_in_their_archive(tmp_path, monkeypatch):
    """The release as it lies: the Parquet beside `images.zip`; whole paths are taken as they are."""
    picture(tmp_path / "elsewhere" / "b.jpg")
    picture(tmp_path / "a.jpg")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.write(tmp_path / "a.jpg", "images/frames/a.jpg")
        archive.writestr("images/broken.jpg", (tmp_path / "a.jpg").read_bytes()[:300])
    (tmp_path / "a.jpg").unlink()
    row = {"question": "?", "answer": [r"\boxed{A}"], "is_video": None}
    names = ["frames/a.jpg", "images/frames/a.jpg", str(tmp_path / "elsewhere" / "b.jpg"), "broken.jpg"]
    path = tmp_path / "vstar.parquet"
    write = lambda names: parquet.write_table(
        pyarrow.Table.from_pylist([row | {"image": [name], "qid": f"vstar-{i}"} for i, name in enumerate(names)]), path
    )
    write(names)
    found, _ = read("prepared", path)
    assert all(sizes_of(x) == [(30, 40)] and x.query().images[0].shape == (30, 40, 3) for x in found[:3])
    with pytest.raises(ImageError, match="images.zip:images/broken.jpg cannot be read"):
        found[3].query()
    write(["frames/c.jpg"])
    with pytest.raises(BenchmarkError, match="row 1 .*: there is no 'frames/c.jpg' in .*, images.zip"):
        read("prepared", path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # importing it now fails
    with pytest.raises(BenchmarkError, match=r"is a Parquet file: `pip install pyarrow` to read it"):
        read("prepared", path)


def test_a_folder_of_ones_own(tmp_path):
    picture(tmp_path / "a.png")
    line = {"question": "Which digit?", "images": ["a.png"], "answer": r"\boxed{7}"}
    (tmp_path / "mine.jsonl").write_text(json.dumps(line))
    (found,), split = read("jsonl", tmp_path / "mine.jsonl", split="val")
    assert split == "val" and found.answer == ("7",) and found.images == (tmp_path / "a.png",)
    assert read("jsonl", tmp_path / "mine.jsonl")[1] == "test"  # who does not say what it is may not choose by it
    (tmp_path / "more.jsonl").write_text(json.dumps(line | {"category": "street"}))
    both, _ = read("jsonl", tmp_path)
    assert [(x.id, x.category) for x in both] == [("mine.jsonl:1", ""), ("more.jsonl:1", "street")]


def test_one_s_own_is_asked_as_it_is_trained_on(tmp_path):
    """Frames, seconds and names: 3.2 s are .4 s for two of sixteen frames, in either."""
    video(tmp_path / "a.mp4", frames=32)
    video(tmp_path / "short.mp4", frames=5)
    picture(tmp_path / "a.png")
    about = lambda images, **more: json.dumps({"question": "?", "images": images, "answer": "7", **more}) + "\n"
    (tmp_path / "mine.jsonl").write_text(
        about(["a.mp4"], video=True, id="mine")
        + about(["a.mp4"], video=True, seconds=3)
        + about(["short.mp4"], video=True)
        + about(["a.png", "a.png"], video=True)
        + about(["a.png"])
    )
    questions, _ = read("jsonl", tmp_path / "mine.jsonl")
    examples = read_own(tmp_path / "mine.jsonl")
    assert [x.id for x in questions] == [x.id for x in examples] == ["mine", *(f"mine.jsonl:{i}" for i in range(2, 6))]
    for question, example in zip(questions, examples, strict=True):
        asked, trained = question.query(), example.query()
        np.testing.assert_array_equal(asked.images, trained.images)
        assert (asked.seconds, asked.is_video) == (trained.seconds, trained.is_video)
        assert sizes_of(question) == [x.shape[:2] for x in asked.images]
    seen = questions[0].query()
    assert seen.seconds == pytest.approx(0.4) and len(set(brightness(seen.images))) == 16
    assert questions[1].query().seconds == 3.0 and len(questions[2].query().images) == 5


def test_mvbench_shows_a_cut_video_from_the_frames_that_there_are(tmp_path):
    """Frames that an edit list hides are counted by the container, but not shown."""
    whole, cut = make(tmp_path / "whole.mp4"), tmp_path / "cut.mp4"
    ffmpeg("-ss", "1.7", "-i", whole, "-t", "0.8", "-c", "copy", cut)
    shown = frames_of(cut)
    found = load_clip(cut)
    assert clip_frame_size(cut) == (48, 64) and len(found) == 16 < len(shown)
    np.testing.assert_array_equal(found, shown[frame_indices(None, 20, len(shown) - 1, 16)])
    assert len({frame.tobytes() for frame in found}) == 16


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tiff"])
def test_pictures_are_measured_upright(tmp_path, name):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / name, height=30, width=40, exif=exif)
    line = {"question": "?", "images": [name], "answer": "7"}
    (tmp_path / "mine.jsonl").write_text(json.dumps(line))
    (found,), _ = read("jsonl", tmp_path / "mine.jsonl")
    assert sizes_of(found) == [(40, 30)] and found.query().images[0].shape == (40, 30, 3)


@pytest.mark.parametrize(
    "kind, content, message",
    [
        ("vstar", "{", ":1 is not JSON"),
        ("vstar", "[]", ":1 is list, not an object"),
        ("vstar", json.dumps({"text": "?"}), "has no field 'category'; it has \\['text'\\]"),
        ("vstar", json.dumps(VSTAR[0] | {"label": 3}), "'label' is 3, of the type int"),
        ("vstar", json.dumps(VSTAR[0]), "there is no image .*sa_4690.jpg"),
        ("tallyqa", "{}", "holds dict, not a list"),
        ("tallyqa", json.dumps([TALLY | {"issimple": 0}]), "'issimple' is 0"),
        ("tallyqa", json.dumps([TALLY | {"answer": True}]), "'answer' is True"),
        ("tallyqa", "[]", "has no questions"),
        ("infovqa", "[]", "no field 'dataset_split'"),
        ("infovqa", json.dumps({"dataset_split": "val", "data": 3}), "'data' is 3"),
    ],
)
def test_what_is_wrong_is_named(kind, content, message, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(BenchmarkError, match=message):
        read(kind, path)
    with pytest.raises(BenchmarkError, match="there is no"):
        read(kind, tmp_path / "nowhere")


def test_questions_have_names_of_their_own(tmp_path):
    picture(tmp_path / VSTAR[0]["image"])
    (tmp_path / "test_questions.jsonl").write_text("\n".join([json.dumps(VSTAR[0])] * 2))
    with pytest.raises(BenchmarkError, match="two questions of the id 'direct_attributes-0'"):
        read("vstar", tmp_path)


def test_every_format_has_a_reader():
    from pixel_jax.evaluation.config import BenchmarkConfig

    for kind in benchmarks.READERS:
        assert BenchmarkConfig(kind).format == kind
    assert BenchmarkConfig.__dataclass_fields__["format"].type.__args__ == tuple(benchmarks.READERS)
