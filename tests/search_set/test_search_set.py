"""The visual search set: the same bytes from a seed, boxes that hold what is asked about, overviews that do not show it.

The page is `docs/visual-search.md`.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pixel_jax import score_answer, smart_resize
from pixel_jax.data.own import read_own
from pixel_jax.evaluation.evidence import boxes_of, region_of
from pixel_jax.search_set import items, reader, things
from pixel_jax.search_set.items import DIFFICULTIES, TIERS, draw_item
from pixel_jax.search_set.photographs import PhotographError, in_folder, packaged, split_of
from pixel_jax.search_set.writing import Photographs, SetConfig, example_of, make_item, write_set

SMALL = dataclasses.replace(TIERS["1k"], size=(672, 560))  # the 1k tier, quicker to draw


@functools.cache
def noise(seed, height, width):
    """Something like a photograph: coarse structure, and finer structure on it."""
    rng = np.random.default_rng(seed)
    image = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((4, 60), (16, 30), (64, 15), (256, 8)):
        coarse = Image.fromarray(rng.integers(0, 255, (cells, cells, 3), dtype=np.uint8))
        image += (
            (np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32) - 127) * strength / 100
        )
    return np.clip(image + rng.uniform(80, 170), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def wallpapers(tmp_path_factory):
    """A folder as Debian's packages unpack it: sizes of one scene, a night version, an icon, a damaged file."""
    root = tmp_path_factory.mktemp("wallpapers")
    for seed, name in enumerate(("Hills", "Lake", "Town", "Sea")):
        folder = root / name / "contents" / "images"
        folder.mkdir(parents=True)
        large = Image.fromarray(noise(seed, 760, 1000))
        large.save(folder / "1000x760.jpg")
        large.resize((600, 456)).save(folder / "600x456.jpg")
    Image.fromarray(noise(0, 700, 920)).save(root / "hills-again.png")
    Image.fromarray(noise(9, 90, 90)).save(root / "icon.png")
    (root / "damaged.jpg").write_bytes((root / "Sea/contents/images/1000x760.jpg").read_bytes()[:40])
    return root


def test_a_scene_is_one_photograph_and_in_one_split(wallpapers):
    found, left_out = in_folder(wallpapers)
    assert [(x.name, x.size) for x in found] == [(name, (1000, 760)) for name in ("Hills", "Lake", "Sea", "Town")]
    assert [next(name for name in ("damaged", "icon", "again") if name in line) for line in left_out] == [
        "damaged",
        "icon",
        "again",
    ]
    both = [*packaged(), *found]
    splits = split_of(both, 0)
    assert sorted(x.name for some in splits.values() for x in some) == sorted(x.name for x in both)
    assert {name: len(some) for name, some in splits.items()} == {"train": 10, "val": 2, "test": 5}
    assert split_of(list(reversed(both)), 0) == splits and split_of(both, 1) != splits
    with pytest.raises(PhotographError, match="is no folder"):
        in_folder(wallpapers / "icon.png")
    with pytest.raises(PhotographError, match="too few for the splits"):
        split_of(found[:2], 0)


def all_kinds(tier, count=1, seed=0):
    """Items of every kind and difficulty."""
    for number in range(count * len(tier.kinds) * len(DIFFICULTIES)):
        rng = np.random.default_rng([seed, number])
        kind, difficulty = tier.kinds[number % len(tier.kinds)], DIFFICULTIES[number // len(tier.kinds) % 3]
        before = noise(number % 5, tier.size[1], tier.size[0])
        yield before, draw_item(rng, before.copy(), tier, kind, difficulty, "noise")


@pytest.mark.parametrize("tier", [TIERS["miniature"], SMALL], ids=lambda tier: tier.name)
def test_the_overview_looks_the_same_with_and_without_the_marks(tier, monkeypatch):
    """Drawn twice, with and without marks: seen at the tier's budget and below it hardly anything differs, in the zoom much."""
    drawn = [item for _, item in all_kinds(tier)]
    with monkeypatch.context() as patch:
        patch.setattr(things, "hide", lambda *arguments: None)
        bare = [item for _, item in all_kinds(tier)]
    for with_marks, without in zip(drawn, bare, strict=True):
        assert with_marks.boxes == without.boxes and with_marks.question == without.question
        assert np.any(with_marks.image != without.image)
        for budget, most in ((tier.max_pixels, 6), (tier.max_pixels // 4, 6)):
            height, width = smart_resize(*with_marks.image.shape[:2], min_pixels=784, max_pixels=budget)
            seen = [
                np.asarray(Image.fromarray(x.image).resize((width, height), Image.Resampling.BICUBIC), np.int32)
                for x in (with_marks, without)
            ]
            assert np.abs(seen[0] - seen[1]).max() <= most, (with_marks.kind, with_marks.difficulty, budget)
        for x1, y1, x2, y2 in with_marks.boxes:
            zoom = [x.image[y1:y2, x1:x2].astype(int) for x in (with_marks, without)]
            assert np.abs(zoom[0] - zoom[1]).max() > 45, (with_marks.kind, with_marks.difficulty)


@pytest.mark.slow
def test_of_what_is_hidden_nothing_can_be_told_from_the_overview_and_all_from_the_zoom():
    """A linear classifier that is told where the digit lies: by chance from the overview, nearly always from the zoom."""
    from sklearn.linear_model import LogisticRegression

    tier, digits = TIERS["miniature"], "0123456789"
    zooms, overviews, answers = [], [], []
    for number in range(260):
        rng = np.random.default_rng(number)
        item = draw_item(rng, noise(number % 5, 448, 448).copy(), tier, "digit", "easy")
        (x1, y1, x2, y2), image = item.boxes[0], Image.fromarray(item.image).convert("L")
        middle, half = ((x1 + x2) / 2, (y1 + y2) / 2), 32
        box = (middle[0] - half, middle[1] - half, middle[0] + half, middle[1] + half)
        zooms.append(np.asarray(image.resize((16, 16), box=box)).ravel())
        small = image.resize(tier.overview, Image.Resampling.BICUBIC)
        overviews.append(np.asarray(small.resize((16, 16), box=tuple(x / tier.factor for x in box))).ravel())
        answers.append(digits.index(item.answer))
    rates = {}
    for name, pixels in (("zoom", zooms), ("overview", overviews)):
        x = np.asarray(pixels, float)
        x = (x - x.mean(axis=1, keepdims=True)) / (x.std(axis=1, keepdims=True) + 1e-3)
        rates[name] = LogisticRegression(max_iter=300).fit(x[:200], answers[:200]).score(x[200:], answers[200:])
    assert rates["zoom"] > 0.9 and rates["overview"] < 0.3, rates


@pytest.mark.parametrize("tier", [TIERS["miniature"], SMALL], ids=lambda tier: tier.name)
def test_a_reader_that_knows_where_to_look_needs_the_zoom(tier):
    """After JPEG, on real photographs: the share that is right is chance in the overview, and nearly all in the zoom."""
    some = [x for x in packaged() if x.name in ("retina.jpg", "hubble_deep_field.jpg")]
    right, guess, count = {"zoom": 0, "overview": 0}, 0.0, 18 * len(tier.kinds)
    for number in range(count):
        item = make_item(some, tier, "test", number, 1)
        example = example_of(item, tier, "test", number)
        (picture,) = example.query().images
        right["zoom"] += reader.read_item(picture, example, tier) == item.answer
        right["overview"] += reader.read_item(reader.overview_of(picture, tier), example, tier) == item.answer
        guess += 1 / len(item.options)
    assert right["zoom"] > 0.9 * count and right["overview"] < guess + 2.5 * (count / 4) ** 0.5, (right, guess)


@pytest.mark.parametrize("tier", [TIERS["miniature"], SMALL], ids=lambda tier: tier.name)
def test_items_are_what_they_say(tier):
    answers = {}
    for before, item in all_kinds(tier, count=4):
        assert item.answer in item.options and len(set(item.options)) == len(item.options)
        answers.setdefault(item.kind, []).append(item.options.index(item.answer))
        height, width = item.image.shape[:2]
        assert (width, height) == tier.size and len(item.boxes) == (2 if item.kind in items.SPATIAL else 1)
        for x1, y1, x2, y2 in item.boxes:
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height and y2 - y1 < 0.2 * height
            assert np.any(item.image[y1:y2, x1:x2] != before[y1:y2, x1:x2])
        if item.kind == "side":
            one, other = item.boxes
            centre = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in (one, other)]
            axis = "above" in item.options
            assert item.answer == (("left", "right"), ("above", "below"))[axis][centre[0][axis] > centre[1][axis]]
        if item.kind == "larger":
            assert item.boxes[0][0] < item.boxes[1][0]  # in the order in which they are read
        assert (
            score_answer(rf"\boxed{{{item.answer}}}", [item.letter], question=item.lettered, rules=("choice",)) == 1.0
        )
    assert all(len(set(places)) > 1 for places in answers.values())


def test_a_set_is_the_same_bytes_again_and_reads_as_data_of_ones_own(wallpapers, tmp_path, monkeypatch):
    monkeypatch.setitem(TIERS, "1k", SMALL)
    config = SetConfig(str(wallpapers), seed=3, tiers=("miniature", "1k"), share=0.02)
    notes = [write_set(tmp_path / name, config) for name in ("a", "b")]
    assert notes[0] == notes[1] and notes[0]["items"]["miniature/train"] == 12 and len(notes[0]["left_out"]) == 3
    files = [{p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.*")} for n in ("a", "b")]
    assert files[0] == files[1] and len(files[0]) > 20
    assert write_set(tmp_path / "c", dataclasses.replace(config, seed=4))["sha256"] != notes[0]["sha256"]
    seen = {}
    for split in ("train", "val", "test"):
        for tier in config.tiers:
            for example in read_own(tmp_path / "a" / tier / split):
                (image,) = example.query().images
                assert image.shape[1::-1] == TIERS[tier].size and boxes_of(example) is not None
                x1, y1, x2, y2 = region_of(example, example.query())
                assert (x2 - x1) * (y2 - y1) < image.shape[0] * image.shape[1]
                seen.setdefault(split, set()).add(example.fields["photograph"])
                assert ("(A)" in example.question) is (tier != "miniature") and example.category
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["val"] and not seen["val"] & seen["test"]
    noted = json.loads((tmp_path / "a" / "set.json").read_text())["photographs"]
    assert all(noted[name]["split"] == split for split, names in seen.items() for name in names)
    assert (
        noted["Lake"]["sha256"]
        == hashlib.sha256((wallpapers / "Lake/contents/images/1000x760.jpg").read_bytes()).hexdigest()
    )


def test_what_cannot_be_made_is_said_before_anything_is_written(wallpapers, tmp_path):
    with pytest.raises(
        PhotographError, match="tier '4k' needs photographs of at least 2539 x 1419 pixels; the largest"
    ):
        write_set(tmp_path / "out", SetConfig(str(wallpapers), tiers=("miniature", "4k")))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="there is no tier '8k'"):
        SetConfig(tiers=("8k",))


def test_the_usual_set_is_large_enough():
    assert sum(tier.items for tier in TIERS.values()) >= 2000 and max(tier.size for tier in TIERS.values())[0] > 3800
    for tier in TIERS.values():
        assert all(
            side % (28 * tier.factor) == 0 for side in tier.size
        )  # the overview is what smart_resize makes of it
        assert smart_resize(*tier.size[::-1], min_pixels=784, max_pixels=tier.max_pixels) == tier.overview[::-1]


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "pixel_jax.search_set", str(tmp_path / "set"), "--share", "0.01"]
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([*command, "--tiers", "miniature"], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "10 items about" in done.stdout, done.stderr
    refused = subprocess.run([*command, "--tiers", "2k"], cwd=root, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2 and "name a folder with larger ones" in refused.stderr


def test_the_builder_prepares_what_the_files_hold(tmp_path):
    import tensorflow_datasets as tfds

    import pixel_jax.search_set.tfds_builder  # noqa: F401
    from pixel_jax.data.read import read_examples

    builder = tfds.builder("visual_search/miniature", data_dir=tmp_path, share=0.01, seed=5, file_format="array_record")
    builder.download_and_prepare()
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {
        "train": 6,
        "val": 1,
        "test": 3,
    }
    record = builder.as_data_source(split="test")[1]
    photographs = Photographs.of(SetConfig(seed=5)).splits["test"]
    item = make_item(photographs, TIERS["miniature"], "test", 1, 5)
    assert record["category"].decode() == item.category and record["box"].tolist() == [list(b) for b in item.boxes]
    assert [x.decode() for x in record["options"]] == list(item.options) and record["answer"][0].decode() == item.answer
    examples, _ = read_examples(pathlib.Path(builder.data_dir), turns=False)
    assert len(examples) == 6 and examples[0].query().images[0].shape == (448, 448, 3)
