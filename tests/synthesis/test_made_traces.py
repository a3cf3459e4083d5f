"""Traces are carried out by the rollout's own tools: what they learn shows the cue, what they call a mistake does not."""

import dataclasses
import json

import numpy as np
import pytest

from pixel_jax.data.own import read_own
from pixel_jax.data.traces import to_trajectories
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.prompts import tables
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.rollouts.trajectory import CallStatus
from pixel_jax.synthesis import checks
from pixel_jax.synthesis.run import SynthConfig, language_of, plan, synthesize
from pixel_jax.synthesis.seeds import read_seeds
from pixel_jax.synthesis.traces import assign_kinds, possible_kinds
from pixel_jax.tools import ToolError
from tests.dialog.qwen import qwen_vocabulary
from tests.rollouts import scripted_model
from tests.synthesis import seed_files

CONFIG = RolloutConfig(  # the padding of the released recipe; few pixels, so that rows are short
    max_pixels=4704, crop_max_pixels=31360, select_max_pixels=4704, video_max_pixels=3136
)
ROOM = BatchShape(tokens=900, images=16, slices=16, patches=160)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Seeds, the report, the examples, and what became of them when they were carried out."""
    folder = tmp_path_factory.mktemp("seeds")
    path = seed_files.write_seeds(folder, images=20, videos=10, direct=2)
    out = folder / "runs" / "traces"
    report = synthesize(SynthConfig(seeds=str(path), out=str(out), video=(0.5, 0.5)))
    examples = read_own(out / "traces.jsonl", turns=True)
    vocabulary = qwen_vocabulary()
    done = to_trajectories([x.trace(x.query()) for x in examples], vocabulary, tables(vocabulary), CONFIG, ROOM)
    return read_seeds(path), report, examples, done


def test_the_mix_is_the_paper_s(made):
    seeds, report, examples, _ = made
    counts = {group: {kind: x["made"] for kind, x in found.items()} for group, found in report["kinds"].items()}
    assert counts["image"] == {"single": 6, "recrop": 4, "recrop_twice": 4, "further": 6}
    assert counts["video"] == {"single": 5, "reselect": 5}
    assert counts["without a look"] == {"direct": 2}
    assert report["made"] == report["seeds"] == len(seeds) == len(examples) and not report["dropped"]
    assert SynthConfig(seeds="", out="").image == (0.3, 0.2, 0.2, 0.3) and SynthConfig("", "").video == (0.9, 0.1)


def kind_of(example):
    calls = len(example.turns) - 1
    if example.video:
        return {1: "single", 2: "reselect"}[calls]
    further = any('"target_image": 2' in turn.parts[0][0] for turn in example.turns)
    return "further" if further else {0: "direct", 1: "single", 2: "recrop", 3: "recrop_twice"}[calls]


def test_what_is_learned_shows_the_cue_and_what_is_not_does_not(made):
    seeds, _, examples, done = made
    kinds = []
    for row, (seed, example) in enumerate(zip(seeds, examples, strict=True)):
        kind = kind_of(example)
        kinds.append(kind)
        calls = len(example.turns) - 1
        shown = scripted_model.outcomes(done)[row, :calls]
        assert done.num_calls[row] == calls and set(shown) <= {
            scripted_model.SELECTED if seed.video else scripted_model.CROPPED
        }
        learned = [turn.parts[0][1] for turn in example.turns]
        assert learned == [False] * (calls - 1) + [True, True][-(calls + 1) :]
        for call in range(calls):
            if seed.video:
                frames = done.calls.source.image[row, call]
                assert (set(frames[frames >= 0] + 1) & set(seed.frames) != set()) == learned[call]
                continue
            x1, y1, x2, y2 = done.calls.source.region[row, call, 0]
            within = x1 <= seed.box[0] and y1 <= seed.box[1] and x2 >= seed.box[2] and y2 >= seed.box[3]
            apart = x2 <= seed.box[0] or y2 <= seed.box[1] or x1 >= seed.box[2] or y1 >= seed.box[3]
            assert within if learned[call] or kind == "further" else apart
        if kind == "further":  # the second look is into the first, and closer
            first, second = done.calls.source.region[row, :2, 0]
            area = lambda box: int((box[2] - box[0]) * (box[3] - box[1]))
            assert area(second) < area(first) and (second[:2] >= first[:2]).all() and (second[2:] <= first[2:]).all()
    assert set(kinds) == {"single", "recrop", "recrop_twice", "further", "reselect", "direct"}


def test_only_the_right_turns_carry_loss(made):
    _, _, examples, done = made
    vocabulary = qwen_vocabulary()
    for row, example in enumerate(examples):
        chosen = done.tokens[row][done.loss_mask[row]]
        learned = [turn.parts[0][0] + "<|im_end|>" for turn in example.turns if turn.parts[0][1]]
        assert vocabulary.to_bytes(chosen).decode() == "".join(learned)
        assert example.turns[-1].parts[0][0].endswith(f"\\boxed{{{example.answer[0]}}}")


def test_rows_are_those_of_the_format(made, tmp_path):
    seeds, _, examples, _ = made
    for seed, example in zip(seeds, examples, strict=True):
        assert (example.question, example.answer, example.video) == (seed.question, seed.answers, seed.video)
        assert [path.read_bytes() for path in example.images] == [path.read_bytes() for path in seed.images]
        assert example.seconds == (2.0 if seed.video else None)


def seed_of(folder, box, width, height, **more):
    from PIL import Image

    Image.new("RGB", (width, height)).save(folder / "a.png")
    row = {"question": "?", "answer": "fox", "images": ["a.png"], "cue": "it", "box": box} | more
    (folder / "s.jsonl").write_text(json.dumps(row))
    return read_seeds(folder / "s.jsonl")[0]


@pytest.mark.parametrize(
    ("box", "size", "kinds"),
    [
        ([10, 10, 30, 30], (1000, 800), {"single", "recrop", "recrop_twice", "further"}),
        ([300, 200, 800, 700], (1000, 800), {"single"}),  # cannot be missed, nor be seen from further away
        ([0, 0, 400, 300], (1000, 800), {"single", "recrop", "recrop_twice"}),
        ([40, 40, 44, 44], (130, 130), {"single"}),  # crops of crops, and misses, would be too small
        ([40, 40, 44, 44], (80, 80), "the reference is too small to crop"),
        ([50, 20, 950, 780], (1000, 800), "the reference is the whole image"),
    ],
)
def test_what_can_be_made_of_a_box(tmp_path, box, size, kinds):
    found = possible_kinds(seed_of(tmp_path, box, *size), 0.1, 28)
    assert (found if isinstance(found, str) else set(found)) == kinds


def test_a_telling_cue_and_a_full_reference(tmp_path):
    assert (
        possible_kinds(seed_of(tmp_path, [1, 1, 9, 9], 500, 500, cue="the fox"), 0.1, 28)
        == "the cue reveals the answer"
    )
    assert possible_kinds(seed_of(tmp_path, [1, 1, 9, 9], 500, 500, cue="<image>"), 0.1, 28) == "the cue has markup"
    video = {"video": True, "images": ["a.png"] * 3}
    assert possible_kinds(seed_of(tmp_path, None, 99, 99, **video, frames=[1, 2, 3]), 0.1, 28) == ("single",)
    assert possible_kinds(seed_of(tmp_path, None, 99, 99, **video, frames=[1]), 0.1, 28) == ("single", "reselect")


def test_kinds_fill_the_shares_as_far_as_they_can():
    every, shares = ("a", "b", "c"), {"a": 0.5, "b": 0.3, "c": 0.2}
    count = lambda found: {kind: found.count(kind) for kind in every}
    assert count(assign_kinds([every] * 100, shares, 0)) == {"a": 50, "b": 30, "c": 20}
    assert count(assign_kinds([("a",)] * 40 + [every] * 60, shares, 0)) == {"a": 50, "b": 30, "c": 20}
    assert count(assign_kinds([("a",)] * 80 + [every] * 20, shares, 0)) == {"a": 80, "b": 15, "c": 5}
    assert assign_kinds([every] * 100, shares, 0) == assign_kinds([every] * 100, shares, 0)
    assert assign_kinds([every] * 100, shares, 0) != assign_kinds([every] * 100, shares, 1)
    assert assign_kinds([], shares, 0) == []


def test_a_mix_may_leave_kinds_out(tmp_path):
    small, large = ([10, 10, 30, 30], [300, 200, 800, 700])
    seeds = [seed_of(tmp_path, box, 1000, 800) for box in (small, large, small)]
    config = SynthConfig(seeds="", out="", image=(0, 0.5, 0, 0.5))
    kinds, impossible = plan(seeds, config)
    assert set(kinds) == {0, 2} and set(kinds.values()) == {"recrop", "further"}
    assert impossible == {1: "no kind of the mix fits the reference"}


def test_references_of_every_size_and_place_make_sound_traces(tmp_path):
    """Boxes of a pixel and of half the image, in corners and in the middle: no crop of any trace fails."""
    from PIL import Image

    random, rows = np.random.default_rng(0), []
    for i in range(60):
        width, height = (int(x) for x in random.integers(90, 700, 2))
        w, h = (max(int(side * random.choice([0.002, 0.03, 0.1, 0.3])), 1) for side in (width, height))
        x, y = (int(random.choice([0, room // 2, room])) for room in (width - w, height - h))
        Image.new("L", (width, height)).save(tmp_path / f"{i}.png")
        rows.append({"question": "?", "answer": "x", "cue": "it", "images": [f"{i}.png"], "box": [x, y, x + w, y + h]})
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = SynthConfig(seeds=str(tmp_path / "s.jsonl"), out=str(tmp_path / "out"), image=(1, 3, 3, 9))
    report = synthesize(config)
    seeds = read_seeds(config.seeds)
    kinds, impossible = plan(seeds, config)
    assert report["made"] == len(kinds) > 40 and len(set(kinds.values())) == 4
    assert set(impossible.values()) <= {"the reference is too small to crop", "the reference is the whole image"}
    examples = read_own(tmp_path / "out" / "traces.jsonl", turns=True)
    vocabulary = qwen_vocabulary()
    done = to_trajectories([x.trace(x.query()) for x in examples], vocabulary, tables(vocabulary), CONFIG, ROOM)
    for row, (i, example) in enumerate(zip(sorted(kinds), examples, strict=True)):
        calls = len(example.turns) - 1
        assert set(scripted_model.outcomes(done)[row, :calls]) == {scripted_model.CROPPED}, (rows[i], kinds[i])
        x1, y1, x2, y2 = done.calls.source.region[row, calls - 1, 0]
        box = rows[i]["box"]
        assert x1 <= box[0] and y1 <= box[1] and x2 >= box[2] and y2 >= box[3], (rows[i], kinds[i])


FORMATS = ("crop_image", "deepeyes", "mini_o3", "qwen3_vl", "qwen3_5")


@pytest.mark.parametrize("name", FORMATS)
def test_traces_in_other_formats(name, tmp_path):
    """Carried out by the rollout's tools in that format: what is learned shows the cue."""
    path = seed_files.write_seeds(tmp_path, images=8, videos=2, direct=1)
    tools = ("crop_image_normalized",) if name == "mini_o3" else ("crop_image_normalized", "select_frames", "rotate")
    # The references are smaller than what may be cropped: as in the released recipe, a tenth of the image is added on each side.
    config = SynthConfig(str(path), str(tmp_path / "out"), tools=tools, call_format=name, pad=0.1)
    report, seeds, language = synthesize(config), {x.id: x for x in read_seeds(path)}, language_of(config)
    made = {kind: x["made"] for kind, x in report["kinds"]["image"].items()}
    # DeepEyes looks at the first image only.
    assert sum(made.values()) == 8 and (made["further"] == 0) == (name == "deepeyes")
    assert report["dropped"] == ({"the tools have no select_frames": 2} if name == "mini_o3" else {})
    examples = read_own(tmp_path / "out" / "traces.jsonl", turns=True, language=language)
    vocabulary = qwen_vocabulary()
    limits = dataclasses.replace(CONFIG, call_format=name, pad=0.1)
    token_tables = tables(vocabulary, language.tools, language.format)
    done = to_trajectories(
        [x.trace(x.query()) for x in examples], vocabulary, token_tables, limits, ROOM._replace(tokens=2000)
    )
    names = [*map(str, token_tables.observations.kinds)]
    looked = 0
    for row, example in enumerate(examples):
        seed = seeds[example.id]
        for call, turn in enumerate(example.turns[:-1]):
            assert done.calls.status[row, call] == CallStatus.DONE and names[done.calls.outcome[row, call]].endswith(
                ": shown"
            )
            if not seed.video and turn.parts[0][1]:
                x1, y1, x2, y2 = done.calls.source.region[row, call, 0]
                # A share in hundredths is rounded to a pixel.
                near = np.array([x1 - seed.box[0], y1 - seed.box[1], seed.box[2] - x2, seed.box[3] - y2]) <= 1
                assert near.all()
                looked += 1
    assert looked == 8


def test_tools_of_ones_own_are_named_and_not_synthesized(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_search.py").write_text(
        "from pixel_jax.tools import Text, Tool\n"
        "SEARCH = Tool('search_web', 'Searches.', (Text('for_what'),), execute=lambda images, for_what: '', host=True)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = seed_files.write_seeds(tmp_path, images=2, videos=0, direct=1)
    config = SynthConfig(str(path), str(tmp_path / "out"), tools=("my_search:SEARCH", "enhance"))
    report = synthesize(config)
    assert "No traces are synthesized that call search_web, enhance" in "".join(capsys.readouterr())
    assert report["made"] == 1 and report["dropped"] == {"the tools have no crop_image_normalized": 2}
    assert checks.unfit("I would search_web for it.", language_of(config)) == "markup in the text"
    assert checks.unfit("I would search_web for it.") is None
    for wrong, message in (
        ({"tools": ("zoom",)}, "no tool is called 'zoom'"),
        ({"call_format": "x"}, "no call format 'x'"),
        ({"call_format": "mini_o3"}, "can only write"),
    ):
        with pytest.raises(ToolError, match=message):
            synthesize(SynthConfig(str(path), str(tmp_path / "out"), **wrong))
