"""`pixel-jax view` draws whatever a command has left, and runs nothing of what is in it."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from pixel_jax.cli import UserError
from pixel_jax.data import synthesis
from pixel_jax.data.example import ExampleError
from pixel_jax.dialog import Language
from pixel_jax.dialog.formats import FORMATS
from pixel_jax.evaluation import transcript as traces
from pixel_jax.evaluation.transcript import Picture, ShownTurn, Transcript
from pixel_jax.identity import settle
from pixel_jax.ops import host_crop_resize
from pixel_jax.run_page import draw_run
from pixel_jax.state_files import write_json
from pixel_jax.tools import CROP_IMAGE, ROTATE
from pixel_jax.training.writers import MetricsLog
from pixel_jax.view import RunOpener, draw, written_traces
from tests.evaluation.test_evaluate import records_of
from tests.evaluation.test_report import HOSTILE, Reader
from tests.rollouts import scripted_model


def look(what, tmp_path, **more):
    """What is said, and the page."""
    page = tmp_path / "page.html"
    said = draw([what] if isinstance(what, pathlib.Path) else what, str(page), RunOpener(**({"most": 100} | more)))
    return said, page.read_text()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Traces for tuning: of an image that is looked at twice, of a video, of no look at all, and one that is wrong."""
    folder = tmp_path_factory.mktemp("synth")
    for i in range(3):
        Image.fromarray(scripted_model.image(i, 200, 300)).save(folder / f"{i}.png")
    box, smaller = (0.1, 0.2, 0.5, 0.9), (0.0, 0.0, 0.5, 0.5)
    look = lambda box, target=1: (
        synthesis.opening_zoom("sign")
        + synthesis.crop_call("sign", box, target).removeprefix(synthesis.opening_zoom("sign"))
    )
    rows = [
        {"question": HOSTILE, "images": ["0.png"], "answer": "7", "turns": [look(box), look(smaller, 2), "\\boxed{7}"]},
        {"question": "Which?", "images": ["1.png"], "answer": ["3", "three"], "turns": ["\\boxed{3}"], "id": "direct"},
        {"question": "Which?", "images": ["1.png"], "answer": "3", "turns": ["This is no call.", "\\boxed{3}"]},
    ]
    (folder / "traces.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_traces_for_tuning_show_what_their_calls_show(written, tmp_path, capsys):
    drawn, count = written_traces(written / "traces.jsonl", 100, [])
    assert count == 3 and len(drawn) == 2
    assert "traces.jsonl:3 is not drawn: turn 1 of a trace about 'Which?' is no call" in capsys.readouterr().err
    item = drawn[0]
    assert [turn.role for turn in item.turns] == ["assistant", "tool"] * 2 + ["assistant"]
    _, *first = item.pictures[0].boxes[0]
    # The crop is the host's own of the box that is drawn, which holds the one that was written.
    crop = traces.drawn(item.turns[1].pictures[0])
    np.testing.assert_array_equal(crop, host_crop_resize(scripted_model.image(0, 200, 300), first, crop.shape[:2]))
    assert first[0] <= 30 and first[1] <= 40 and first[2] >= 150 and first[3] >= 180
    assert item.reference == "7" and drawn[1].reference == "3 / three" and drawn[1].title == "direct"
    for what in (written, written / "traces.jsonl"):
        said, page = look(what, tmp_path)
        seen = Reader(page)
        assert seen.tags.count("article") == 2 and seen.runs == 0 and "onerror" not in seen.attributes
        assert said.startswith("2 traces of ") and "--most" not in said
    said, page = look(written, tmp_path, most=1)
    assert "has 3 traces; 1 are drawn, as --most says" in capsys.readouterr().err
    assert said.startswith("1 traces of ") and Reader(page).tags.count("article") == 1


def test_traces_in_another_format_and_with_other_tools(written, tmp_path):
    """As `synth` writes them for a config's tools and format; without its format the error names it."""
    call = '<tool_call>\n{"name": "%s", "arguments": {%s}}\n</tool_call>'
    zoom = call % ("image_zoom_in_tool", '"bbox_2d": [100, 200, 500, 900], "img_idx": 0')
    turned = call % ("rotate", '"by": "90", "target_image": 1')
    messages = [{"role": "user", "content": "<image>Which?"}]
    for turn in (zoom, turned):
        messages += [{"role": "assistant", "content": turn}, {"role": "user", "content": "Here."}]
    row = {"messages": [*messages, {"role": "assistant", "content": "\\boxed{7}"}], "images": ["0.png"], "answer": "7"}
    path = written / "other" / "traces.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(row))
    (path.parent / "0.png").write_bytes((written / "0.png").read_bytes())
    language = Language((CROP_IMAGE, ROTATE), FORMATS["qwen3_vl"])
    (drawn,), _ = written_traces(path, 1, [], language)
    _, *box = drawn.pictures[0].boxes[0]
    assert box == [30, 40, 150, 180] and [len(turn.pictures) for turn in drawn.turns] == [0, 1, 0, 1, 0]
    with pytest.raises(ExampleError, match="it is one in 'qwen3_vl'"):
        look(path, tmp_path)


def a_trace(title):
    picture = Picture(traces.data_uri(scripted_model.image(0, 20, 30)), 20, 30, "image")
    return Transcript(
        HOSTILE,
        (picture,),
        (picture,),
        (ShownTurn("assistant", HOSTILE),),
        "answer",
        title=title,
        reward=0.5,
        terms={"answer": 1.0, HOSTILE: -0.5, "budget": 0.0},
    )


@pytest.fixture
def run(tmp_path):
    """The directory of a run as it leaves it, with text of others wherever there can be some."""
    out = tmp_path / "run"
    (out / "rl").mkdir(parents=True)
    settle(out / "rl", {"data": HOSTILE, "rl": {"iterations": 4}}, of=4)
    settle(out / "rl", {"data": HOSTILE, "rl": {"iterations": 4}, "out": HOSTILE}, done=2, of=4)
    log = MetricsLog(out / "rl/metrics.jsonl", 0)
    log.write(-1, {"eval_accuracy": 0.125})
    for step in range(3):
        log.write(step, {"accuracy": step / 8, "loss": None if step == 1 else 1.0 / (step + 1), "rapr": 0.5})
    log.write(2, {"eval_accuracy": 0.75})
    log.close()
    for name, numbers in {"held_out": range(0, 12, 2), "rollouts": (1, 2)}.items():
        (out / "rl/traces" / name).mkdir(parents=True)
        for number in numbers:
            traces.save(out / f"rl/traces/{name}/{number:06}.json", [a_trace(f"{name} {number}")])
    (out / "rl/traces/held_out/000004.json").write_text("[")
    write_json(out / "data.json", {"source": HOSTILE, "data": "3 questions", "judged_by": "1", "dropped": [HOSTILE]})
    write_json(out / "settings.json", {"model": HOSTILE, "data": "d", "out": "o", "rl": {"iterations": 4}, "seed": 3})
    return out


def test_the_page_of_a_run(run, tmp_path):
    said, page = look(run, tmp_path)
    assert said == f"the run {run}: drawn in {tmp_path / 'page.html'}."
    assert look(run / "rl", tmp_path)[1].replace(f"<h1>The run {run / 'rl'}", f"<h1>The run {run}") == page
    assert draw_run(run).read_text() == page
    seen = Reader(page)
    assert seen.runs == 0 and "onerror" not in seen.attributes and "img" not in seen.tags and "link" not in seen.tags
    assert sum(HOSTILE in text for text in seen.texts) > 8
    texts = "\n".join(seen.texts)
    assert "3 of 4" in texts and "0.125 → 0.75" in texts and "0 → 0.25" in texts
    assert "went on from 2 of 4" in texts and "--config.seed" in texts
    # The first look and the newest; the broken file is among those that are not drawn.
    shown = [f"held_out {i}" for i in range(0, 12, 2) if f"held_out {i}" in texts]
    assert shown == ["held_out 0", "held_out 6", "held_out 8", "held_out 10"] and "rollouts 2" in texts
    assert seen.tags.count("article") == 6 and texts.count(f"reward 0.5 (answer +1, {HOSTILE} -0.5)") == 6
    assert "accuracy" in texts and seen.tags.count("polyline") >= 4


def test_a_broken_file_of_conversations_is_named_and_left_out(run, tmp_path, capsys):
    (run / "rl/traces/held_out/000010.json").write_text("[")
    _, page = look(run, tmp_path)
    assert "000010.json" in capsys.readouterr().err and Reader(page).tags.count("article") == 5


def test_the_page_of_an_evaluation_is_drawn_again(tmp_path):
    from pixel_jax.evaluation import summary

    rows = summary.summarise(records_of([[1.0]] * 3 + [[0.0]]))
    one = {"split": "val", "modes": {"operations": rows}, "unanswered": {"operations": {}}, "differences": {}}
    write_json(tmp_path / "metrics.json", {"model": HOSTILE, "first_mode": "operations", "benchmarks": {"own": one}})
    (tmp_path / "own/operations/traces").mkdir(parents=True)
    traces.save(tmp_path / "own/operations/traces/0.json", [a_trace("0")])
    (tmp_path / "own/operations/results-0.jsonl").write_text("")
    said, page = look(tmp_path, tmp_path)
    assert said.startswith(f"the evaluation {tmp_path}: drawn in")
    summary.redraw(tmp_path)
    seen = Reader((tmp_path / "report.html").read_text())
    assert Reader(page).texts[3:] == seen.texts[3:]
    assert seen.tags.count("article") == 1 and seen.runs == 0 and any("75.0" in text for text in seen.texts)
    # One that is not finished has no numbers yet: what it has kept is drawn.
    (tmp_path / "metrics.json").unlink()
    said, page = look(tmp_path, tmp_path)
    assert said.startswith("1 traces of") and Reader(page).tags.count("article") == 1


def test_nothing_to_draw(tmp_path):
    with pytest.raises(
        UserError, match=r"is no directory of pixel-jax sft, rl, eval or synth: it has neither sft/metrics"
    ):
        look(tmp_path, tmp_path)
    with pytest.raises(UserError, match=r"there is no file or directory '.*nowhere.json'"):
        look(tmp_path / "nowhere.json", tmp_path)
    (tmp_path / "wrong.json").write_text("[")
    with pytest.raises(UserError, match=r"wrong.json does not hold traces"):
        look(tmp_path / "wrong.json", tmp_path)
