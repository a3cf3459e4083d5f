"""The quickstart: its tokenizer, its numbers, its page, and all its phases at the smallest size there is."""

import dataclasses
import importlib.util
import json
import pathlib
import re
import subprocess

import numpy as np
import pytest

from pixel_jax import read_image
from pixel_jax.config import ConfigError, load
from pixel_jax.data import synthesis
from pixel_jax.data.batches import MemoryBatches
from pixel_jax.data.traces import to_trajectories
from pixel_jax.evaluation import transcript as saved_traces
from pixel_jax.evaluation.stats import proportion
from pixel_jax.evaluation.transcript import ShownTurn, Transcript
from pixel_jax.models.io import from_pretrained
from pixel_jax.quickstart import miniature, pipeline, vocabulary, zoom
from pixel_jax.quickstart.config import HeldOutConfig, QuickstartConfig, WarmStartConfig
from pixel_jax.quickstart.course import Course, parts_of, steps_of
from pixel_jax.quickstart.lesson import scene_query
from pixel_jax.quickstart.main import chat_command, write_card
from pixel_jax.quickstart.miniature import SceneConfig
from pixel_jax.quickstart.network import NetworkConfig
from pixel_jax.quickstart.page import page
from pixel_jax.quickstart.pipeline import check_same, once, run_seed, run_seeds, run_tuning
from pixel_jax.quickstart.summary import summarise
from pixel_jax.quickstart.task import lesson_of
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.limits import single_answer
from pixel_jax.rollouts.prompts import tables
from pixel_jax.rollouts.shapes import BatchShape
from pixel_jax.rollouts.trajectory import CallStatus
from pixel_jax.tools.named import DEFAULT
from pixel_jax.training.optimizer import OptimizerConfig
from pixel_jax.training.replay import ReplayConfig
from pixel_jax.training.rewards import RewardConfig
from pixel_jax.training.rl import RLConfig
from pixel_jax.training.sft import SFTConfig
from pixel_jax.training.steps import ForwardConfig
from tests.evaluation.test_report import HOSTILE, Reader
from tests.quickstart import small_limits

ROOT = pathlib.Path(__file__).parent.parent.parent

LIMITS = dataclasses.replace(
    small_limits.LIMITS,
    group_size=2,
    top_p=1.0,
    top_k=0,
    max_new_tokens=2,
    max_calls=3,
    max_response=112,
    observe_chunk=4,
)


def tuning(batch_size):
    return SFTConfig(
        steps=2,
        batch_size=batch_size,
        trainable=".*",
        normalizer="token",
        optimizer=OptimizerConfig(learning_rate=1e-3),
        forward=ForwardConfig(remat=False),
        save_every=1,
    )


SMALLEST = QuickstartConfig(
    network=NetworkConfig(
        width=32, layers=1, mlp=32, vision_width=32, vision_layers=1, vision_mlp=32, heads=2, kv_heads=2, vision_heads=2
    ),
    scenes=SceneConfig(small_share=0.5),
    ground=tuning(2),
    ground_rows=5,
    look_share=0.6,
    warm=tuning(3),
    warm_rows=8,
    traces=WarmStartConfig(),
    rl=RLConfig(
        iterations=2,
        prompts=2,
        train_batch=4,
        rollout=LIMITS,
        # The untrained network answers nothing; that it wrote a number at all or none is what its rows differ in.
        reward=RewardConfig(unparsable=-1),
        scale_by_std=True,
        old_logprobs="sampler",
        replay=ReplayConfig(kind="none"),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        forward=ForwardConfig(remat=False),
    ),
    evaluation=HeldOutConfig(scenes=6, batch=4, traces=2),
)


ARMS = tuple(lesson_of(SMALLEST).arms)
course_of = lambda directory: Course({0: parts_of(SMALLEST, lesson_of(SMALLEST), directory)})
LABELS = [arm.label for arm in lesson_of(SMALLEST).arms.values()]


# ---- tokenizer


@pytest.fixture(scope="module")
def words():
    return vocabulary.build_vocabulary()


def test_every_piece_is_one_token(words):
    for piece in vocabulary.pieces():
        ids = words.encode(piece)
        assert len(ids) == 1 and words.to_bytes(ids) == piece.encode(), piece
    text = "Ünexpected: 0.12345 and \\boxed{7}, 1.00, -3\n<tool_call>"
    assert words.to_bytes(words.encode(text)) == text.encode()


def test_boxes_are_four_tokens(words):
    rng = np.random.default_rng(0)
    for box in rng.integers(0, 101, (50, 4)) / 100:
        written = synthesis.written_box(box)
        assert len(words.encode(written)) == 4 and words.to_bytes(words.encode(written)) == written.encode()


def test_a_trace_with_one_crop_is_short(words):
    scene = miniature.draw_scene(np.random.default_rng(0), "test", SceneConfig(), small=True)
    query, reference = scene_query(scene), zoom.reference_box(scene)
    trace = synthesis.image_trace(np.random.default_rng(0), query, zoom.CUE, reference, "7", "single")
    t = to_trajectories([trace], words, tables(words), LIMITS, BatchShape(160, 2, 2, 16))
    assert t.calls.status[0, 0] == CallStatus.DONE  # the crop is among what is counted
    assert t.valid.sum() <= 64


def test_the_warm_start_has_the_shares_of_its_configuration():
    mix = synthesis.Mix(direct=0.4, image=(0.25, 0.25, 0.25, 0.25), video=(0.5, 0.5))
    config = WarmStartConfig(mix=mix, video_share=0.3)
    rng = np.random.default_rng(0)
    made = [zoom.warm_start_row(rng, SceneConfig(), "test", config) for _ in range(400)]
    video = np.array([trace.query.is_video for trace in made])
    turns = np.array([len(trace.turns) for trace in made])
    near = lambda found, share: abs(np.mean(found) - share) < 4 * np.sqrt(share * (1 - share) / len(found))
    assert near(video, 0.3) and near(turns[~video] == 1, 0.4) and near(turns[video] == 3, 0.5)
    assert near(turns[~video & (turns > 1)] == 4, 0.25)  # recrop_twice
    looks = [turn for trace in made for turn in trace.turns if turn.executed is not None]
    written = ["".join(text for text, _ in turn.parts) for turn in looks]
    differ = [not text.endswith(turn.executed) for text, turn in zip(written, looks, strict=True)]
    assert len(looks) > 100 and np.mean(differ) > 0.9  # most hands miss the box that is written


# ---- configuration


def shipped(name="quickstart"):
    spec = importlib.util.spec_from_file_location("shipped", ROOT / f"configs/pixel/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def test_the_shipped_configuration_is_read_strictly():
    config = load(QuickstartConfig, shipped())
    assert config.rl.reward.alpha > 0 and config.rl.reward.beta > 0
    # What is written into a run's directory is what the arms read.
    assert load(QuickstartConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config
    values = shipped()
    values.rl.iteratoins = 5  # a ConfigDict takes any key; the loader does not
    with pytest.raises(ConfigError, match="unknown key config.rl.iteratoins; the nearest .* is config.rl.iterations"):
        load(QuickstartConfig, values)
    values = shipped()
    del values.warm_rows
    with pytest.raises(ConfigError, match="lacks warm_rows"):
        load(QuickstartConfig, values)


def test_the_arms_differ_in_the_reward_alone():
    config, arms = SMALLEST.rl, zoom.ZOOM.arms
    plain = arms["no_curiosity"].change(config)
    assert arms["curiosity"].change(config) == config
    assert (plain.reward.alpha, plain.reward.beta) == (0.0, 0.0)
    assert dataclasses.replace(plain, reward=config.reward) == config


# ---- phases that are done once


def test_once(tmp_path, capsys):
    path, calls = tmp_path / "phase.json", []

    def work():
        calls.append(1)
        return {"accuracy": 0.5}

    def broken():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        once(path, broken)
    assert not path.exists()
    (tmp_path / "phase.partial").write_text('{"accuracy": ')  # cut short by a kill while it was written
    first = once(path, work)
    assert first["accuracy"] == 0.5 and first["seconds"] >= 0
    assert once(path, work) == first and len(calls) == 1
    path.write_bytes(path.read_bytes()[:9])  # a damaged note is none
    assert once(path, work)["accuracy"] == 0.5 and len(calls) == 2 and str(path) in capsys.readouterr().err


def test_a_directory_belongs_to_one_configuration(tmp_path):
    path = tmp_path / "seed-0" / "config.json"
    path.parent.mkdir()
    check_same(SMALLEST, path)
    check_same(SMALLEST, path)
    other = dataclasses.replace(SMALLEST, evaluation=HeldOutConfig(scenes=7))
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match="seed-0 was begun with evaluation.scenes = 6, now it is 7, .* choose another --out"
    ):
        run_seed(other, path.parent, course_of(path.parent))
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["config.json"]


# ---- progress


def test_one_bar_shows_all_seeds(tmp_path, capsys):
    """With the time that is left, and what is done; metrics of held-out scenes are no steps."""
    seeds = {seed: parts_of(SMALLEST, lesson_of(SMALLEST), tmp_path / str(seed)) for seed in (3, 4)}
    course = Course(seeds)
    course.line.every = 0.0
    course.show(3, "warm start", {})
    parts = {part.name: part for part in seeds[3]}
    tuned, learned = parts["ground and read"], parts["learning with curiosity"]
    tuned.log.parent.mkdir(parents=True)
    tuned.log.write_text('{"step": 0, "loss": 1.0}\n')
    course.show(3, "ground and read", {})
    for part in seeds[3]:
        part.result.parent.mkdir(parents=True, exist_ok=True)
        part.result.write_text("{}")
    learned.result.unlink()
    learned.log.parent.mkdir(parents=True)
    learned.log.write_text('{"step": -1, "eval_rapr": 0.5}\n{"step": 0, "reward": 1.0}\n')
    course.show(4, "compiling the rollout ...", {"curiosity rapr": 0.5})
    learned.result.write_text("{}")
    for part in seeds[4]:
        part.result.parent.mkdir(parents=True, exist_ok=True)
        part.result.write_text("{}")
    course.show(4, "", {})
    course.show(4, "", {})  # the end is said once
    nothing, one, most, all_done = capsys.readouterr().err.splitlines()
    total = 2 * (4 + 4 * 4 + 3 * 60)  # of each seed: steps of tuning, iterations of both arms, three evaluations
    assert nothing == f"quickstart 0/{total}  ? left  seed 1 of 2, warm start  "
    assert one.startswith(f"quickstart 1/{total}  ") and "? left" not in one
    assert all_done.startswith(f"quickstart {total}/{total}  0:00 left  seed 2 of 2")
    assert most.startswith(f"quickstart {total // 2 - 4}/{total}  0:0")
    assert most.endswith(" left  seed 2 of 2, compiling the rollout ...  curiosity rapr 0.5")


PHASE = """#!/bin/bash
# Stands for the interpreter that runs `-m pixel_jax.quickstart.phase DIRECTORY PHASE [CORE]`.
cd "$3" && echo "$4 $5" >> order.txt && echo "compiling nothing ..."
[ "$4" = "$FAILING" ] && echo "it has failed" >&2 && exit 3
timed='{"seconds": 1.0}'
case $4 in
tuning) echo "$timed" > ground.json && echo "$timed" > warm.json ;;
judging) echo '{"accuracy": 0.25, "seconds": 1.0}' > warm_evaluation.json ;;
*)
    mkdir -p "$4/rl"
    echo '{"step": 0, "reward": 1.0}' > "$4/rl/metrics.jsonl"
    echo '{"done": 1, "eval_accuracy": 0.5, "eval_rapr": 0.75}' > "$4/rl/looks.jsonl"
    sleep 0.5
    echo "$timed" > "$4/trained.json" && echo "$timed" > "$4/evaluation.json"
    echo '{"accuracy": 0.5, "seconds_training": 1.0, "seconds_evaluation": 1.0}' > "$4/result.json"
    ;;
esac
"""


def test_the_phases_of_all_seeds_and_their_bar(tmp_path, monkeypatch, capsys):
    interpreter = tmp_path / "python"
    interpreter.write_text(PHASE)
    interpreter.chmod(0o755)
    monkeypatch.setattr(pipeline.sys, "executable", str(interpreter))
    monkeypatch.setattr(pipeline, "POLL", 0.05)
    monkeypatch.setenv("FAILING", "no_curiosity")
    with pytest.raises(
        RuntimeError, match="the phase no_curiosity ended with code 3:\ncompiling nothing ...\nit has failed"
    ):
        list(run_seeds(SMALLEST, tmp_path, 2))
    monkeypatch.setenv("FAILING", "")
    capsys.readouterr()
    found = dict(run_seeds(SMALLEST, tmp_path, 2))
    assert list(found) == [0, 1] and found[1]["rl"]["no_curiosity"] == {"accuracy": 0.5}
    assert found[0]["sft"] == {"accuracy": 0.25} and found[0]["seconds"]["rl_curiosity"] == 1.0
    first, second = ((tmp_path / f"seed-{seed}" / "order.txt").read_text().splitlines() for seed in (0, 1))
    assert first.count("tuning ") == 1 and first.count("no_curiosity 1") == 2  # what was done is not done again
    assert second[0] == "tuning " and sorted(second[1:3]) == ["curiosity 0", "judging 1"]
    assert second[3:] == ["no_curiosity 1"]
    said = capsys.readouterr().err.splitlines()
    assert all(re.match(r"quickstart \d+/400  .* left  seed [12] of 2, ", line) for line in said)
    assert said[-1].startswith("quickstart 400/400  0:00 left  seed 2 of 2") and len(said) == len(set(said))
    assert "curiosity accuracy 0.5  curiosity rapr 0.75" in said[-1]


# ---- summary and page


def result(shift, points=12):
    """What one seed might have measured; `shift` moves every number."""

    def group(accuracy, **more):
        rates = dict.fromkeys(("accuracy_small", "accuracy_large", "rapr", "rapr_small", "rapr_large"), 0.5 + shift)
        rates |= dict.fromkeys(("greedy_accuracy", "greedy_rapr", "zoom_small", "direct_small"), 0.25 + shift)
        return {
            "accuracy": accuracy + shift,
            **rates,
            "zoom_iou": 0.5,
            "intervals": {"accuracy": proportion([True] * 8 + [False] * 2)},
            **more,
        }

    curve = lambda base: [
        {"step": i, "accuracy": base + shift, "rapr": 0.5, "entropy": None if i == 1 else 0.25} for i in range(points)
    ]
    return {
        "sft": group(0.25),
        "rl": {
            "curiosity": group(0.75, curve=curve(0.5), looks=curve(0.5)),
            "no_curiosity": group(0.5 - shift, curve=curve(0.25), looks=curve(0.25)),
        },
        "seconds": {"ground": 10.0 + shift, "total": 100.0},
    }


def test_means_and_intervals_over_seeds():
    found = summarise({0: result(0.0), 3: result(0.125)})
    assert found["seeds"] == [0, 3] and set(found["per_seed"]) == {"0", "3"}
    assert found["sft"]["accuracy"] == pytest.approx(0.3125) and "intervals" not in found["sft"]
    assert found["rl"]["curiosity"]["accuracy"] == pytest.approx(0.8125)
    assert found["accuracy_gap"] == pytest.approx(0.3125)  # 0.25 and 0.375
    assert found["seconds"] == {"ground": pytest.approx(10.0625), "total": 100.0}
    # Student's t with one degree of freedom: 12.706 standard errors, here of half the difference each.
    interval = found["intervals_over_seeds"]["sft"]["accuracy"]
    assert interval["high"] - interval["mean"] == pytest.approx(12.706204736 * 0.0625)
    gap = found["intervals_over_seeds"]["accuracy_gap"]
    assert gap["mean"] - gap["low"] == pytest.approx(12.706204736 * 0.0625) and gap["n"] == 2
    steps = found["rl"]["curiosity"]["curve"]
    assert [point["step"] for point in steps] == list(range(12))
    assert steps[0]["accuracy"] == pytest.approx(0.5625) and steps[0]["entropy"] == 0.25
    assert "entropy" not in steps[1]  # an iteration without an update
    json.dumps(found, allow_nan=False)


def test_one_seed_has_no_interval_over_seeds():
    found = summarise({5: result(0.0)})
    assert found["intervals_over_seeds"] is None and found["sft"]["accuracy"] == 0.25


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_the_page_shows_both_arms_and_escapes_everything(seeds):
    results = {seed: result(seed / 8) for seed in seeds}
    for each in results.values():
        each["seconds"][HOSTILE] = 31.0
    turns = [ShownTurn("assistant", HOSTILE), ShownTurn("tool", HOSTILE, failed=True)]
    trace = Transcript(HOSTILE, [], [], turns, stop=HOSTILE, answer=HOSTILE, reference=HOSTILE, title=HOSTILE)
    hot = dataclasses.replace(LIMITS, temperature=1.7, later_temperature=2.0)
    hot = dataclasses.replace(SMALLEST, rl=dataclasses.replace(SMALLEST.rl, rollout=hot))
    html = page(hot, summarise(results), [trace])
    seen = Reader(html)
    assert seen.runs == 0 and "img" not in seen.tags and "onerror" not in seen.attributes
    texts = " ".join(seen.texts)
    assert texts.count(HOSTILE) >= 8  # everything of the trace, and the phase
    for name in LABELS:
        assert texts.count(name) >= 3  # in the table and in both curves
    # The gap and, as there are intervals of it, the interval of the means.
    if len(seeds) == 1:
        assert "0.75 [0.49, 0.94]" in texts and "Wilson" in texts and "accuracy: 0.250." in texts
    else:
        assert "0.81 [0.02, 1.00]" in texts and "Student" in texts and "accuracy: 0.312 [-0.482, 1.107]." in texts
    assert "total, by the clock" in texts and "add up to 4" in texts  # 10 and 31, of which neither is the total
    assert texts.count("at temperature 1.7, and at 2 after the first call") == 2  # beside the curves, too
    assert "sampled at temperature 1, means over seeds: the last point is the number of the table" in texts
    embedded = json.loads(html.split('id="metrics">', 1)[1].split("</script>", 1)[0])
    assert embedded["seeds"] == list(seeds) and "per_seed" not in embedded


# ---- what the reader does next


def test_the_last_line_is_a_command_that_runs(tmp_path, monkeypatch):
    """In a shell where nothing is activated, with a name that a shell would take apart."""
    binaries = tmp_path / "an env" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "activate").write_text(f"PATH='{binaries}':$PATH")
    (binaries / "pixel-jax").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (binaries / "pixel-jax").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.prefix", str(tmp_path / "an env"))
    line = chat_command(pathlib.Path("runs/a $b/model"), pathlib.Path("runs/card.png"), DEFAULT)
    assert line.startswith("source 'an env/bin/activate' && ")
    found = subprocess.run(
        ["bash", "-c", line], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True
    )
    assert found.stdout.split("\n")[:-1] == [
        "chat",
        "runs/a $b/model",
        "runs/card.png",
        "--question",
        miniature.QUESTION,
    ]
    monkeypatch.setattr("sys.prefix", str(tmp_path))  # no virtual environment: nothing to activate
    plain = chat_command(pathlib.Path("m"), pathlib.Path("c"), DEFAULT)
    assert plain.startswith("pixel-jax chat m c --question ") and "--tools" not in plain
    assert chat_command(pathlib.Path("m"), pathlib.Path("c"), ["rotate"]).endswith(" --tools=rotate")


def test_a_picture_with_a_card_is_written(tmp_path):
    write_card(SMALLEST, tmp_path / "card.png")
    pixels = read_image(tmp_path / "card.png")
    card = np.argwhere((pixels == miniature.CARD).all(axis=2))
    assert pixels.shape == (448, 448, 3) and len(card) > 500
    least, most = SMALLEST.scenes.small_card
    assert (least <= np.ptp(card, axis=0) + 1).all() and (np.ptp(card, axis=0) + 1 <= most).all()


# ---- everything


class Interrupted(BaseException):
    """What a person's Ctrl-C would be."""


def numbers(values):
    """The result of a seed without its times."""
    if isinstance(values, dict):
        return {name: numbers(value) for name, value in values.items() if not name.startswith("seconds")}
    return values


@pytest.mark.slow
def test_a_run_and_the_same_run_interrupted(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    whole = tmp_path / "whole" / "seed-0"
    whole.mkdir(parents=True)
    run_tuning(SMALLEST, whole)  # in this process, as below: the last bits hang on how many threads there are
    found = run_seed(SMALLEST, whole, course_of(whole))
    for name in ("warm", *ARMS):
        place = whole / name
        assert len(saved_traces.load(place / "traces.json")) == 2
        model, processor = from_pretrained(place / "model")
        assert model.config.text.hidden_size == 32 and processor is not None
        assert load(RolloutConfig, json.loads((place / "model" / "rollout.json").read_text())) == single_answer(LIMITS)
    assert set(found["rl"]) == set(ARMS) and found["seconds"]["total"] > 0
    for group in (found["sft"], *found["rl"].values()):
        assert 0 <= group["accuracy"] <= 1 and group["intervals"]["accuracy"]["n"] == 6
    for arm in ARMS:
        assert [point["step"] for point in found["rl"][arm]["curve"]] == [0, 1]
        looks = found["rl"][arm]["looks"]
        assert [point["step"] for point in looks] == [0, 1, 2]
        for name in ("accuracy", "rapr"):  # the curve begins and ends at the numbers of the table
            assert looks[0][name] == found["sft"][name] and looks[-1][name] == found["rl"][arm][name]
    html = page(SMALLEST, summarise({0: found}), saved_traces.load(whole / "curiosity" / "traces.json"))
    assert all(name in html for name in LABELS)

    # The same in pieces: cut off in the middle of phase 1, at the end of phase 2, and in the middle of both arms.
    directory = tmp_path / "pieces" / "seed-0"

    directory.mkdir(parents=True)

    def interrupted(work, target, name, replacement):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, replacement)
            with pytest.raises(Interrupted):
                work(SMALLEST, directory)

    following = MemoryBatches.__next__

    def stop_at_second_batch(self):
        if self.position:
            raise Interrupted
        return following(self)

    interrupted(run_tuning, MemoryBatches, "__next__", stop_at_second_batch)
    assert (directory / "ground" / "checkpoints" / "1").exists() and not (directory / "ground.json").exists()

    saving = pipeline.save

    def stop_at_warm(task, model, place):
        if place.parent.name == "warm":
            raise Interrupted
        saving(task, model, place)

    interrupted(run_tuning, pipeline, "save", stop_at_warm)
    assert (directory / "ground.json").exists() and not (directory / "warm.json").exists()

    def stop_after_an_iteration(path):
        if steps := steps_of(path):
            raise Interrupted
        return steps

    seed = lambda config, directory: run_seed(config, directory, course_of(directory))
    interrupted(seed, pipeline, "steps_of", stop_after_an_iteration)
    assert not all((directory / arm / "result.json").exists() for arm in ARMS)

    assert numbers(seed(SMALLEST, directory)) == numbers(found)
    models, pieces = (
        [(path / name / "model" / "model.safetensors").read_bytes() for name in ("ground", "warm", *ARMS)]
        for path in (whole, directory)
    )
    assert models == pieces
    ground, warm, *arms = models
    assert ground != warm and warm not in arms  # every phase moved the weights
