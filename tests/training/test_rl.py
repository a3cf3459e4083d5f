"""The reinforcement-learning loop around a rollout made by hand: what it computes, what it keeps, what stops it."""

import collections
import dataclasses
import errno
import functools
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest
from tiny_model import make_batch

from pixel_jax import state_files
from pixel_jax.data.batches import MemoryBatches
from pixel_jax.data.buckets import check_position
from pixel_jax.dialog import call_parser
from pixel_jax.dialog.observations import kinds_of
from pixel_jax.files import write_file
from pixel_jax.identity import RunError, read_history
from pixel_jax.models import flops
from pixel_jax.parallel.sharding import WHOLE
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.images import ragged
from pixel_jax.rollouts.materialize import PatchSource, VisualRecord
from pixel_jax.rollouts.shapes import prompt_shape
from pixel_jax.rollouts.trajectory import NO_IMAGE, CallStatus, HostPrompts, Tables, Trajectories, Views, no_calls
from pixel_jax.tools import RELEASED
from pixel_jax.training import checkpoint
from pixel_jax.training import rl as rl_module
from pixel_jax.training import stages as stages_module
from pixel_jax.training.checkpoint import CheckpointError, Checkpoints, WriteError
from pixel_jax.training.loop import Identity
from pixel_jax.training.losses import PolicyLossConfig
from pixel_jax.training.optimizer import OptimizerConfig
from pixel_jax.training.preemption import NOTICE, Preempted
from pixel_jax.training.replay import ReplayConfig
from pixel_jax.training.rewards import Call, RewardConfig, Rewards, of_batch, rows_of
from pixel_jax.training.rl import RLConfig, rl
from pixel_jax.training.stages import Selected, Stages, Weighed, training_rows
from pixel_jax.training.steps import ForwardConfig, NonFiniteError
from pixel_jax.training.writers import MetricsLog, read_metrics

GROUPS, N = 4, 4
CONFIG = RLConfig(
    iterations=4,
    prompts=GROUPS,
    train_batch=8,
    rollout=RolloutConfig(
        group_size=N, later_temperature=0.9, max_pixels=3136, video_max_pixels=3136, crop_max_pixels=3136
    ),
    optimizer=OptimizerConfig(learning_rate=1e-3),
    forward=ForwardConfig(remat=False),
    replay=ReplayConfig(episode=2),
    save_every=1,
)


def make_trajectories(seed, calls=None):
    """16 rows; `calls` are the statuses of their calls."""
    rows = GROUPS * N
    batch = make_batch(rows, seed)
    record = no_calls(rows, 5, 1, RELEASED)
    first = (np.arange(5) == 0) & np.ones((rows, 1), bool)  # all see the image of their prompt, and nothing else
    side = np.where(first, 56, 0)[..., None]
    views = Views(np.where(first, 0, NO_IMAGE), side * np.array([0, 0, 1, 1]), side * np.array([1, 1]))
    drawn = np.random.default_rng(seed).integers(0, 2, (rows, 1))
    for row, found in enumerate(calls or np.where(drawn, CallStatus.DONE, CallStatus.NONE)):
        record.status[row, : len(found)] = found
    return Trajectories(
        tokens=batch.tokens,
        valid=batch.valid,
        loss_mask=batch.loss_mask,
        logprobs=batch.logprobs,
        visual=VisualRecord(PatchSource(views, None), *batch.visual[1:]),
        prompt=np.repeat(np.arange(GROUPS, dtype=np.int32), N),
        calls=record,
        num_calls=(record.status != CallStatus.NONE).sum(1).astype(np.int32),
        stop=np.zeros(rows, np.int32),
    )


class Questions:
    """Prompts with an image of 56 x 56 and no text: the rollout of these tests does not look at them. Answers count up."""

    def __init__(self):
        self.asked = 0

    def __next__(self):
        self.asked += 1
        ones = np.ones(GROUPS, np.int32)
        images = np.random.default_rng(self.asked).integers(0, 256, (GROUPS, 56, 56, 3)).astype(np.uint8)
        prompts = HostPrompts(
            tokens=ones[:, None],
            length=ones,
            images=ragged([image] for image in images),
            image_sizes=np.full((GROUPS, 1, 2), 56, np.int32),
            image_counts=ones,
            is_video=np.zeros(GROUPS, bool),
            seconds=np.zeros(GROUPS, np.float32),
            uid=ones,
            tables=Tables((), None, (), call_parser()),
            shape=prompt_shape(1, 64, 64, 1, CONFIG.rollout, video=False),
        )
        return prompts, list(range(self.asked, self.asked + GROUPS))

    def get_state(self):
        return {"asked": self.asked}

    def set_state(self, state):
        self.asked = state["asked"]


def rollout(model, prompts, key, config):
    """Rows that depend on the key and on the weights."""
    norm = sum(float(abs(x).sum()) for x in jax.tree.leaves(jax.device_get(model.lm_head)))
    return make_trajectories(int(jax.random.randint(key, (), 0, 10**6)) + int(norm * 1e3) % 7)


@pytest.fixture
def rollouts(monkeypatch):
    """Replaces the rollout."""
    monkeypatch.setattr(stages_module, "rollout", rollout)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """(weights, directory) of a run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages_module, "rollout", rollout)
        return run(model, directory), directory


def score(rows, answers):
    """Right or wrong, by the first token of the response."""
    return (np.array([row.tokens[0] for row in rows]) + np.array(answers)) % 2


def stages(config, score=score, **own):
    """The usual ones, but for what makes an answer right and for one's own."""
    return Stages(Rewards.of(config.reward, lambda ids: "", {"answer": of_batch(score)}), **own)


def run(model, directory, *, score=score, own=None, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return rl(model, Questions(), stages(config, score, **(own or {})), config, directory=directory)


def assert_same_run(whole, model, directory):
    """The weights, and all metrics but the times. The lines of the second run."""
    for a, b in zip(*map(jax.tree.leaves, (whole[0], model)), strict=True):
        np.testing.assert_array_equal(a, b)
    first, second = (read_metrics(path / "metrics.jsonl") for path in (whole[1], directory))
    for a, b in zip(first, second, strict=True):
        assert {k: v for k, v in a.items() if "second" not in k} == {k: v for k, v in b.items() if "second" not in k}
    return second


def test_a_resumed_run_is_the_same_run(model, whole, rollouts, tmp_path):
    calls = 0

    def failing(rows, answers):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return score(rows, answers)

    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path, score=failing, save_every=2)
    parts = run(model, tmp_path, save_every=2)
    lines = assert_same_run(whole, parts, tmp_path)
    assert not any(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (parts, model)), strict=True))
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and all(line["updates"] == 2 for line in lines)
    assert {
        "accuracy",
        "rapr",
        "reward",
        "nonzero_variance",
        "ratio",
        "clip_fraction",
        "entropy",
        "sampler_trainer_mismatch",
    } <= set(lines[0])


def test_an_iteration_that_is_told_to_go_before_its_updates_is_given_up(model, whole, rollouts, tmp_path, monkeypatch):
    """A life ends at a moment (place, its number in this life); what is saved are the iterations before that."""
    moment, calls = None, collections.Counter()

    def watched(place, function):
        def call(*arguments, **options):
            calls[place] += 1
            monkeypatch.setattr(NOTICE, "requested", NOTICE.requested or (place, calls[place]) == moment)
            return function(*arguments, **options)

        return call

    make = rl_module.make_score_step
    monkeypatch.setattr(stages_module, "rollout", watched("rollout", rollout))
    monkeypatch.setattr(rl_module, "make_score_step", lambda *a, **b: watched("old_logprobs", make(*a, **b)))
    lives = [(("rollout", 1), 0), (("score", 3), 2), (("old_logprobs", 2), 2), (("rollout", 2), 3)]
    for moment, saved in lives:
        calls.clear()
        monkeypatch.setattr(NOTICE, "requested", False)
        with pytest.raises(Preempted):
            run(model, tmp_path, score=watched("score", score), save_every=3)
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            assert checkpoints.latest == saved
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == saved
        assert calls["old_logprobs"] == (2 if moment == ("old_logprobs", 2) else 2 * (calls["rollout"] - 1))
    monkeypatch.setattr(NOTICE, "requested", False)
    assert_same_run(whole, run(model, tmp_path, save_every=3), tmp_path)


def test_a_directory_holds_one_run(model, whole, rollouts, tmp_path, monkeypatch, capsys):
    shutil.copytree(whole[1], tmp_path, dirs_exist_ok=True)

    def again(settings=None, resume_changed=False, **changes):
        config = dataclasses.replace(CONFIG, **changes)
        identity = Identity(settings or {}, resume_changed)
        return rl(model, Questions(), stages(config), config, directory=tmp_path, identity=identity)

    reward = dataclasses.replace(CONFIG.reward, alpha=9.0)
    with pytest.raises(RunError, match=r"was begun with rl\.reward\.alpha = 0\.5, now it is 9\.0: .*--resume_changed"):
        again(reward=reward)
    with pytest.raises(RunError, match=r"rl\.prompts = 4, now it is 8.* choose another directory$"):
        again(prompts=8, resume_changed=True)
    with pytest.raises(RunError, match="data.answer = 'not set', now it is 'ab'"):
        again(settings={"data.answer": "ab"})
    for resume_changed in (False, True):
        with pytest.raises(RunError, match="4 steps are done, the configuration says 2: a run does not go back"):
            again(iterations=2, resume_changed=resume_changed)
    assert not any(line["changed"] for line in read_history(tmp_path))
    again(reward=reward, save_every=3, resume_changed=True)
    line = read_history(tmp_path)[-1]
    assert line["done"] == 4 and line["changed"] == {"rl.reward.alpha": [0.5, 9.0], "rl.save_every": [1, 3]}
    monkeypatch.setattr(Questions, "set_state", lambda questions, state: check_position(-5))
    with pytest.raises(CheckpointError, match="checkpoint 4 cannot be gone on from: the position in the data is -5"):
        again(reward=reward, save_every=3)


def test_wherever_the_disk_is_full_the_run_goes_on_when_there_is_room(model, whole, rollouts, tmp_path, monkeypatch):
    """Half of what is to be written fits: of a checkpoint's JSON, of a line of metrics, of what is noted about files."""
    write = MetricsLog.write

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def write_half_a_file(path, data):
        path = pathlib.Path(path)
        if path.name == "3.0.json" or path.name == "0.json" and "/2." in str(path):
            path.with_name(f".{path.name}.partial").write_bytes(data.encode()[: len(data) // 2])
            full(path)
        write_file(path, data)

    def write_half_a_line(log, step, metrics):
        if step == 2:
            log.log.file.write(b'{"step": 2, "accur')
            log.log.file.flush()
            full(log.log.file.name)
        write(log, step, metrics)

    for module in (checkpoint, state_files):
        monkeypatch.setattr(module, "write_file", write_half_a_file)
    with pytest.raises(WriteError, match="checkpoint 2 cannot be written .*No space.* newest whole one is 1"):
        run(model, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_file", write_file)
        patch.setattr(MetricsLog, "write", write_half_a_line)
        with pytest.raises(OSError, match="No space left .*metrics.jsonl"):
            run(model, tmp_path)
    with pytest.raises(WriteError, match="checkpoint 3 cannot be written .*No space"):
        run(model, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(stages_module, "rollout", rollout)
    assert_same_run(whole, run(model, tmp_path), tmp_path)


def test_nothing_to_learn_from_is_no_update(model, rollouts, tmp_path):
    flat = dataclasses.replace(CONFIG.reward, alpha=0.0, beta=0.0)
    same = run(model, tmp_path, score=lambda rows, answers: np.ones(len(rows)), iterations=1, reward=flat)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(a, b)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["updates"] == 0 and line["nonzero_variance"] == 0 and line["accuracy"] == 1


def test_a_reward_that_is_no_number_stops_the_run(model, rollouts, tmp_path):
    def broken(rows, answers):
        return np.where(np.arange(len(answers)) == 6, np.nan, 1.0)

    with pytest.raises(NonFiniteError, match=r"iteration 0: the reward term 'answer' of 1 of 16 rows .*\(6: nan\)"):
        run(model, tmp_path, score=broken, iterations=1)


def scored(calls, *, correct=None, decode=lambda ids: "", examples=(0, 0, 0, 0), **options):
    """What rows that made `calls` are worth to a `RewardConfig` of `options`."""
    trajectories = make_trajectories(0, calls)
    config = RewardConfig(**options)
    given = {} if correct is None else {"answer": of_batch(lambda rows, examples: np.asarray(correct, np.float32))}
    learner = types.SimpleNamespace(config=CONFIG, shard=WHOLE)
    questions = stages_module.Questions(0, next(Questions())[0], examples)
    collected = stages_module.Collected(questions, trajectories, trajectories, None)
    return Rewards.of(config, decode, given)(learner, None, collected)


def test_operations_are_counted_as_the_switch_says():
    done, failed, spent = CallStatus.DONE, CallStatus.FAILED, CallStatus.SPENT
    calls = [[done], [failed], [done, failed], [done, done, spent]] + [[]] * 12
    options = {"alpha": 0.0, "beta": 0.1, "correct": np.ones(16)}
    np.testing.assert_allclose(scored(calls, **options).reward[0], [1, 1, 1, 0.9], rtol=1e-6)
    found = scored(calls, count="requested", **options).reward[0]
    np.testing.assert_allclose(found, [1, 1, 0.9, 0.8], rtol=1e-6)
    found = scored(calls, zero_after_failure=True, **options)
    np.testing.assert_allclose(found.reward[0], [1, 0, 0, 0.9], rtol=1e-6)
    assert found.terms["answer"][0].tolist() == [1, 0, 0, 1] and found.correct.all()  # the answers were right


def test_texts_are_what_the_policy_chose():
    trajectories = make_trajectories(0)
    seen = []

    def decode(ids):
        seen.append(list(ids))
        return r"\boxed{4}" if list(ids) == chosen[0] else "nothing"

    chosen = [row[mask].tolist() for row, mask in zip(trajectories.tokens, trajectories.loss_mask, strict=True)]
    found = scored(None, decode=decode, examples=["4"] * GROUPS, unparsable=-1)
    assert found.terms["answer"].ravel().tolist() == [1] + [-1] * 15
    # The response, and its two turns.
    assert seen[:3] == [chosen[0][:4], chosen[0][4:], chosen[0]] and seen[2::3] == chosen


def test_stages_of_ones_own(model, tmp_path):
    """Advantages that are ranks, and of every iteration the eight rows that differ most from their groups."""
    trained = []

    def ranks(learner, state, scored):
        places = np.argsort(np.argsort(scored.reward, axis=1), axis=1)
        return Weighed(scored, (places - 1.5).astype(np.float32), np.ones(GROUPS, bool))

    def extremes(learner, state, weighed):
        rows = training_rows(learner, state, weighed)
        best = np.argsort(-np.abs(weighed.advantage.ravel()), kind="stable")[: learner.config.train_batch]
        trained.append(weighed.advantage.ravel()[best])
        return Selected(weighed, learner.replay.entries(rows, best, weighed.scored.collected.row_shape))

    own = {"advantages": ranks, "select": extremes, "collect": functools.partial(stages_module.collect, roll=rollout)}
    changed = run(model, tmp_path, own=own, iterations=2)
    assert len(trained) == 2 and all(set(np.abs(x)) == {1.5} for x in trained)
    assert [line["updates"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 1]
    assert not any(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (changed, model)), strict=True))


def test_rewards_see_calls_with_boxes_in_the_original_image():
    """The rollout has the first image at 56 x 56; its file has it at 112 x 224 (height, width)."""
    done, failed, spent = CallStatus.DONE, CallStatus.FAILED, CallStatus.SPENT
    crop_name, select_name = (tool.name for tool in RELEASED)
    t, kinds = make_trajectories(0, [[done], [done], [failed, spent]] + [[]] * 13), kinds_of(RELEASED)
    calls = no_calls(len(t.stop), 5, 2, RELEASED)._replace(status=t.calls.status)
    named = [(None if kind.tool is None else kind.tool.name, kind.outcome.name) for kind in kinds]
    calls.tool[[0, 1], 0], calls.source.image[0, 0, 0], calls.source.image[1, 0] = [0, 1], 0, [3, 1]
    calls.source.region[0, 0, 0], calls.values.units[1, 0, :2], calls.values.lengths[1, 0, 0] = (
        [7, 14, 28, 56],
        [4, 2],
        2,
    )
    calls.outcome[:3, 0] = [named.index(x) for x in ((crop_name, "shown"), (select_name, "shown"), (None, "malformed"))]
    t = t._replace(calls=calls)
    tables = types.SimpleNamespace(tools=RELEASED, observations=types.SimpleNamespace(kinds=kinds))
    prompts, words = next(Questions())[0]._replace(tables=tables), lambda ids: " ".join(map(str, ids)) + "<|im_end|>"
    rows = rows_of(t, prompts, words, [[(112, 224)]] * GROUPS)
    assert [len(row.calls) for row in rows] == [1, 1, 2] + [0] * 13 and {row.stop for row in rows} == {"answer"}
    crop, frames, (error, spent) = rows[0].calls[0], rows[1].calls[0], rows[2].calls
    zeros = {"bbox_2d": (0.0, 0.0, 0.0, 0.0), "target_image": 0.0}
    assert crop == Call(crop_name, zeros, done, "shown", 0, (28.0, 28.0, 112.0, 112.0)) and crop.shown and crop.executed
    assert frames == Call(select_name, {"target_frames": (4, 2)}, done, "shown", frames=(3, 1)) and frames.shown
    assert error == Call("", {}, failed, "malformed") and error.executed and not error.shown and rows[2].failed_last
    assert not spent.executed and not spent.shown
    assert rows_of(t, prompts, words)[0].calls[0].box == (7.0, 14.0, 28.0, 56.0)  # it was not made smaller
    assert rows[0].turns == tuple(" ".join(map(str, x)) for x in (t.tokens[0, 10:14], t.tokens[0, 17:20]))
    np.testing.assert_array_equal(rows[0].tokens, np.concatenate([t.tokens[0, 10:14], t.tokens[0, 17:20]]))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train_batch": 7}, "16 rows .* 7"),
        ({"rollout": RolloutConfig(group_size=N, temperature=0.0)}, "temperature 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **changes)


def test_released_constants_are_one_switch_each():
    """Every deviation of the released code from the paper that training knows has a field; the defaults are the paper's."""
    config = RLConfig(iterations=1)
    assert (config.prompts, config.rollout.group_size, config.train_batch, config.updates) == (512, 8, 256, 16)
    reward = RewardConfig()
    assert (reward.alpha, reward.beta, reward.threshold, reward.budget) == (0.5, 0.05, 0.3, 1)
    assert (reward.form, reward.unparsable, reward.zero_after_failure, reward.count) == ("paper", 0, False, "executed")
    assert not config.scale_by_std and config.replay.kind == "ssr" and config.replay.life == "episode"
    loss = PolicyLossConfig()
    assert (loss.clip_low, loss.clip_high, loss.normalizer, loss.constant) == (0.2, 0.35, "constant", 200.0)
    optimizer = OptimizerConfig()
    assert (optimizer.learning_rate, optimizer.final_fraction, optimizer.warmup) == (1e-6, 0.5, 0.03)
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay, optimizer.clip) == (0.9, 0.95, 0.0, 1.0)


def test_shuffled_data_sees_every_row_once_an_epoch_and_resumes():
    rows = make_batch(10)
    rows.tokens[:, 0] = np.arange(10)
    data = MemoryBatches(rows, 4, seed=1)
    seen = np.concatenate([next(data).tokens[:, 0] for _ in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10].tolist() != seen[10:].tolist()
    again = MemoryBatches(rows, 4, seed=1)
    again.set_state({"position": 2, "size": 4, "rows": 10, "seed": 1})
    np.testing.assert_array_equal(next(again).tokens[:, 0], seen[8:12])
    with pytest.raises(ValueError, match="with 1 for seed, now it is 2"):
        MemoryBatches(rows, 4, seed=2).set_state(data.get_state())


def test_every_phase_and_what_it_did_is_in_the_metrics(model, rollouts, tmp_path, monkeypatch):
    """Operations are timed every second iteration, and what that takes is no other phase's."""
    monkeypatch.setitem(flops.PEAK_FLOPS, jax.devices()[0].device_kind, 1e9)
    monkeypatch.setattr(stages_module, "seconds_of_operations", lambda *_: 1.5)
    run(model, tmp_path, iterations=3, time_operations=2)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    for line in lines:
        assert {"reward", "reward_answer", "reward_curiosity", "reward_budget", "reward_length"} <= line.keys()
        assert {"accuracy", "rapr", "operations", "call_errors", "group_variance"} <= line.keys()
        assert {"sampler_trainer_mismatch", "clip_fraction", "entropy", "response_tokens", "row_tokens"} <= line.keys()
        assert {"tokens_per_second", "flops_per_second", "mfu"} <= line.keys()
        phases = {"input", "rollout", "timing", "scoring", "old_logprobs", "update"}
        seconds = [line.get(f"seconds_{phase}", 0.0) for phase in phases]
        np.testing.assert_allclose(sum(seconds), line["seconds"], rtol=1e-6)
        assert all(line[f"seconds_{phase}"] > 0 for phase in phases - {"timing"})
    assert [line.get("seconds_operations") for line in lines] == [1.5, None, 1.5]
