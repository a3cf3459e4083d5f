"""Looks at a run: when they are made, what stays of them, and that training is the same with them and without."""

import json

import jax
import numpy as np
import pytest

from pixel_jax.evaluation import transcript as traces
from pixel_jax.evaluation.transcript import Picture, ShownTurn, Transcript
from pixel_jax.state_files import read_json_lines, read_note
from pixel_jax.training.optimizer import OptimizerConfig
from pixel_jax.training.sft import SFTConfig, sft
from pixel_jax.training.steps import ForwardConfig
from pixel_jax.training.watch import BEST, LOOKS, Watch, WatchConfig, numbered, thin
from pixel_jax.training.writers import read_metrics
from tests.training.test_course import Fragile, Lost
from tests.training.tiny_model import make_batch, make_model

CONFIG = SFTConfig(
    steps=6,
    batch_size=4,
    save_every=2,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup=0.0),
    forward=ForwardConfig(remat=False),
    writers=("tensorboard",),
)


def a_trace(title):
    picture = Picture(traces.data_uri(np.zeros((4, 4, 3), np.uint8)), 4, 4, "image")
    return Transcript("?", (picture,), (), (ShownTurn("assistant", "7"),), "answer", title=title)


class Looking:
    """Finds a sum of the weights, and draws from NumPy's and JAX's randomness, which training must not notice."""

    def __init__(self, accuracies=()):
        self.calls, self.accuracies = 0, iter(accuracies)

    def __call__(self, state):
        self.calls += 1
        np.random.random(3)
        jax.random.normal(jax.random.key(0), (3,))
        total = float(sum(abs(x.astype("float32")).sum() for x in jax.tree.leaves(state.trainable)))
        return {"loss": total, "accuracy": next(self.accuracies, 0.0)}, [a_trace(f"look {self.calls}")]


def saver(places):
    def save(state, place):
        place.mkdir(parents=True, exist_ok=True)
        (place / "step.txt").write_text(str(int(state.step)))
        places.append((place.name, int(state.step)))

    return save


def tune(directory, watch=None, end=-1):
    data = Fragile(make_batch(8)._replace(visual=None), 4, seed=0)
    data.end = end
    try:
        return sft(make_model(), data, CONFIG, directory=directory and directory / "sft", watch=watch)
    except Lost:
        return None


def watching(directory, look, saved=None, **more):
    save = saver([] if saved is None else saved)
    return Watch(WatchConfig(every=2), directory / "sft", CONFIG.steps, None, look=look, save=save, **more)


def bits(model):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(model)]


@pytest.fixture(scope="module")
def alone():
    return bits(tune(None))


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """(weights, directory, what was saved) of a run that nothing disturbed."""
    directory, saved = tmp_path_factory.mktemp("watched"), []
    watch = watching(directory, Looking((0.25, 0.5, 0.5, 0.25)), saved, save_every=4, best="accuracy")
    return bits(tune(directory, watch)), directory, saved


def test_training_is_the_same_with_looks_and_without(alone, watched):
    assert watched[0] == alone


def test_what_a_look_leaves(watched):
    _, directory, saved = watched
    looks = read_json_lines(directory / "sft" / LOOKS, done=int)
    assert [x["done"] for x in looks] == [0, 2, 4, 6]
    assert len({x["eval_loss"] for x in looks}) == 4  # the weights moved
    lines = read_metrics(directory / "sft/metrics.jsonl")
    beside = {x["step"]: x for x in lines if "eval_loss" in x}
    assert list(beside) == [-1, 1, 3, 5] and [beside[x["done"] - 1]["eval_loss"] for x in looks] == [
        x["eval_loss"] for x in looks
    ]
    assert [x["step"] for x in lines if "loss" in x] == list(range(6))
    files = numbered(directory / "sft/traces/held_out")
    assert [int(path.stem) for path in files] == [0, 2, 4, 6]
    assert [traces.load(path)[0].title for path in files] == [f"look {i}" for i in (1, 2, 3, 4)]
    # The first of equals is the best; a model is kept at step 4.
    assert saved == [("best", 0), ("best", 2), ("4", 4)]
    assert read_note(directory / "sft" / BEST) == {"done": 2, "by": "accuracy", "value": 0.5}
    assert (directory / "best/step.txt").read_text() == "2" and (directory / "models/4/step.txt").read_text() == "4"


@pytest.mark.parametrize("end", [3, 5])
def test_a_run_that_is_lost_looks_again_at_what_it_repeats(watched, end, tmp_path, capsys):
    """It is lost before step `end`; the last checkpoint is of step 2 or 4, and so is a look, which is not made again."""
    tune(tmp_path, watching(tmp_path, Looking((0.25, 0.5, 0.5)), best="accuracy"), end)
    with (tmp_path / "sft/looks.jsonl").open("a") as file:  # a look at a step that is about to be done again
        file.write(json.dumps({"done": 5}) + "\n")
    traces.save(tmp_path / "sft/traces/held_out/000005.json", [a_trace("lost")])
    look = Looking((0.5, 0.25)[end // 5 :])
    assert bits(tune(tmp_path, watching(tmp_path, look, best="accuracy"))) == watched[0]
    assert look.calls == (2 if end == 3 else 1)
    strip = lambda lines: [{k: v for k, v in x.items() if "second" not in k} for x in lines]
    for read in (
        lambda x: read_json_lines(x / "sft" / LOOKS, done=int),
        lambda x: read_metrics(x / "sft/metrics.jsonl"),
    ):
        assert strip(read(tmp_path)) == strip(read(watched[1]))
    assert [path.name for path in numbered(tmp_path / "sft/traces/held_out")] == [
        path.name for path in numbered(watched[1] / "sft/traces/held_out")
    ]
    assert read_note(tmp_path / "sft" / BEST)["done"] == 2


def test_the_lowest_loss_is_the_best(tmp_path):
    class Losses(Looking):
        def __call__(self, state):
            return {"loss": next(self.accuracies)}, []

    saved = []
    tune(tmp_path, watching(tmp_path, Losses((3.0, 1.0, 2.0, 1.0)), saved, best="loss"))
    assert saved == [("best", 0), ("best", 2)]


def test_best_is_of_something():
    for look, every in ((None, 2), (Looking(), 0)):
        with pytest.raises(ValueError, match="keep_best='loss' needs held-out examples: give data_eval"):
            Watch(WatchConfig(every=every), None, 4, None, look=look, save=None, best="loss")


def test_five_looks_by_default_and_none_at_zero():
    assert [WatchConfig().interval(steps) for steps in (1, 5, 90, 307)] == [1, 1, 18, 62]
    assert WatchConfig(every=0).interval(90) == 0 and WatchConfig(every=7).interval(90) == 7
    for wrong in ({"share": 1.0}, {"drawn": -1}, {"every": -1}, {"batch": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            WatchConfig(**wrong)


@pytest.mark.parametrize("step", [1, 7, 62, 64])
def test_files_are_thinned_evenly(step, tmp_path):
    for number in range(0, 200 * step, step):
        (tmp_path / f"{number:06}.json").write_text("[]")
        thin(tmp_path, 8)
        kept = [int(path.stem) for path in numbered(tmp_path)]
        assert len(kept) <= 8 and kept[-1] == number and kept[0] == 0
    gaps = np.diff(kept)[:-1]
    assert len(set(gaps)) == 1 and len(kept) >= 4


@pytest.mark.parametrize("most, left", [(1, [9]), (2, [0, 9]), (3, [0, 8, 9]), (99, list(range(10)))])
def test_the_newest_file_stays_and_the_others_are_spread(tmp_path, most, left):
    for number in range(10):
        (tmp_path / f"{number:06}.json").write_text("[]")
    thin(tmp_path, most)
    assert [int(path.stem) for path in numbered(tmp_path)] == left
