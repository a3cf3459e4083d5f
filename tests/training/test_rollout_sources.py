"""Rows that carry over to the next iteration, and rows that are written ahead: the same run, however often it is stopped."""

import dataclasses
import functools
import threading
import types

import jax
import numpy as np
import optax
import pytest
import scripted_model
import shared_worker
import test_rl
from tiny_model import make_model

from pixel_jax.cli import UserError
from pixel_jax.config import ConfigError, load
from pixel_jax.models.lora import add_lora
from pixel_jax.parallel import make_mesh
from pixel_jax.parallel.sharding import WHOLE, ProcessShard, shardings
from pixel_jax.phases import Phase
from pixel_jax.rollouts.config import RolloutBudget
from pixel_jax.rollouts.rollout import static_shape
from pixel_jax.training import loop, sources
from pixel_jax.training import rl as rl_module
from pixel_jax.training.checkpoint import CheckpointError, from_bytes, to_bytes
from pixel_jax.training.losses import PolicyLossConfig
from pixel_jax.training.optimizer import OptimizerConfig
from pixel_jax.training.preemption import NOTICE, Preempted
from pixel_jax.training.rewards import Rewards, Term
from pixel_jax.training.rl import Learner, RLConfig, rl
from pixel_jax.training.stages import Collected, Questions, Stages, advantages, collect
from pixel_jax.training.state import Resharder, init_state
from pixel_jax.training.steps import ForwardConfig
from pixel_jax.training.writers import read_metrics

CAPPED = PolicyLossConfig(importance_cap=2.0)
AHEAD = dataclasses.replace(test_rl.CONFIG, staleness=1, loss=CAPPED)


@functools.cache
def halves(**shape):
    """A mesh of the first four devices, and one of the others."""
    devices = jax.devices()
    return [make_mesh(shape or {"data": 4}, part) for part in (devices[:4], devices[4:])]


def run_ahead(directory, *, rollout=test_rl.rollout, score=test_rl.score, model=None, meshes=None, **changes):
    config = dataclasses.replace(AHEAD, **changes)
    stages = test_rl.stages(config, score, collect=functools.partial(collect, roll=rollout))
    mesh, rollout_mesh = meshes or halves()
    data = test_rl.Questions()
    return rl(model or make_model(), data, stages, config, directory=directory, mesh=mesh, rollout_mesh=rollout_mesh)


def lines_of(directory):
    lines = read_metrics(directory / "metrics.jsonl")
    return [{name: x for name, x in line.items() if "second" not in name} for line in lines]


def assert_same(a, b):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_rows_are_written_ahead_and_a_restart_is_exact(tmp_path, monkeypatch):
    """Rollout i + 1 begins before i is trained on, by the devices of rollouts, with the weights that there are then."""
    begun, scored, devices = [], [], set()

    def rollout(model, *arguments):
        begun.append((threading.current_thread() is threading.main_thread(), len(scored)))
        devices.update(x for leaf in jax.tree.leaves(model) for x in leaf.devices())
        return test_rl.rollout(model, *arguments)

    def score(rows, answers):
        scored.append(answers)
        return test_rl.score(rows, answers)

    whole = run_ahead(tmp_path / "whole", rollout=rollout, score=score)
    assert [on_main for on_main, _ in begun] == [False] * 4 and len(scored) == 4
    assert devices == set(jax.devices()[4:])
    lines = lines_of(tmp_path / "whole")
    assert [line.get("token_age", 0) for line in lines] == [0, 1, 1, 1]
    all_lines = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    times = {"seconds_waiting", "seconds_update", "rollouts_seconds_rollout", "rollouts_seconds_waiting"}
    assert all(times <= line.keys() for line in all_lines)

    calls = 0

    def failing(rows, answers):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return test_rl.score(rows, answers)

    with pytest.raises(KeyboardInterrupt):
        run_ahead(tmp_path / "parts", score=failing, save_every=2)
    # Told to go while it waits for the rows of iteration 3, it waits for the rollout and saves its rows.
    monkeypatch.setattr(NOTICE, "requested", False)

    def told(rows, answers):
        monkeypatch.setattr(NOTICE, "requested", True)
        return test_rl.score(rows, answers)

    with pytest.raises(Preempted):
        run_ahead(tmp_path / "parts", score=told, save_every=2)
    monkeypatch.setattr(NOTICE, "requested", False)
    assert_same(whole, run_ahead(tmp_path / "parts", save_every=2))
    assert lines_of(tmp_path / "parts") == lines


@pytest.mark.slow
def test_the_rows_are_those_of_the_policy_before(tmp_path, monkeypatch):
    """Taking turns with the policy of the iteration before, kept on the host, comes to the same bits."""
    ahead = run_ahead(tmp_path / "ahead")
    mesh, rolled = halves()

    class Late(sources.Together):
        kept: list = []

        def take(self, state, i):
            self.kept.append(jax.tree.map(np.array, state.model))
            number = max(0, i - 1)
            return self.roller.roll(jax.device_put(self.kept[number], shardings(self.kept[number], rolled)), i, number)

    late = lambda learner: Late(sources.WholeBatches(learner, learner.ask), learner)
    monkeypatch.setattr(rl_module, "source_of", late)
    assert_same(ahead, run_ahead(tmp_path / "late"))
    assert lines_of(tmp_path / "ahead") == lines_of(tmp_path / "late")


@pytest.mark.slow
def test_two_iterations_ahead(tmp_path):
    run_ahead(tmp_path, staleness=2)
    assert [line.get("token_age", 0) for line in lines_of(tmp_path)] == [0, 1, 2, 2]


@pytest.mark.slow
def test_without_staleness_a_mesh_of_its_own_changes_nothing(tmp_path):
    """Taking turns on two halves is the same as on one, to the bit."""
    same = {"loss": PolicyLossConfig(), "staleness": 0}
    apart = run_ahead(tmp_path / "apart", **same)
    assert_same(apart, run_ahead(tmp_path / "one", meshes=(halves()[0], None), **same))
    assert lines_of(tmp_path / "apart") == lines_of(tmp_path / "one")


def test_only_adapters_move():
    """The frozen weights are copied to the rollouts' devices once; adapters, whenever the policy is asked for."""
    mesh, rolled = halves()
    model = add_lora(make_model(), jax.random.key(1), rank=2, alpha=4, targets=r"model\..*")
    state = init_state(model, optax.sgd(1e-3), trainable=".*lora_", mesh=mesh)
    move = Resharder(mesh, rolled)
    first, second = move(state), move(state)
    theirs = set(jax.devices()[4:])
    buffers = lambda x: {leaf.unsafe_buffer_pointer() for leaf in (s.data for s in x.addressable_shards)}
    shared = [buffers(a) == buffers(b) for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True)]
    assert all(leaf.devices() <= theirs for leaf in jax.tree.leaves(first))
    assert shared.count(False) == len(jax.tree.leaves(state.trainable)) and any(shared)
    assert_same(first, state.model)


# ---- rows that carry over

CARRIED = RLConfig(
    iterations=4,
    prompts=shared_worker.PROMPTS,
    train_batch=4,
    rollout=scripted_model.CONFIG,
    rollout_budget=RolloutBudget(tokens=14),
    loss=CAPPED,
    optimizer=OptimizerConfig(learning_rate=1e-3, eps=1e-2),
    forward=ForwardConfig(remat=False),
    save_every=1,
)


def run_carried(directory, *, watched=lambda scored: None, mesh=None, rollout_mesh=None, **changes):
    config = dataclasses.replace(CARRIED, **changes)

    def look(learner, state, scored):
        watched(scored)
        return advantages(learner, state, scored)

    rewards = Rewards.of(config.reward, shared_worker.decode, {"answer": Term(shared_worker.written)})
    data = shared_worker.Questions(types.SimpleNamespace(index=0, count=1), {})
    stages = Stages(rewards, advantages=look)
    return rl(scripted_model.model(), data, stages, config, directory=directory, mesh=mesh, rollout_mesh=rollout_mesh)


def killed(after):
    """What ends a run the `after`-th time that rows are scored."""
    times = []

    def end(scored):
        times.append(scored)
        if len(times) == after:
            raise KeyboardInterrupt

    return end


@pytest.mark.slow
def test_rows_carry_over_and_a_restart_is_exact(tmp_path):
    seen = []
    whole = run_carried(tmp_path / "whole", watched=seen.append)
    lines = lines_of(tmp_path / "whole")
    assert max(line["rows_carried"] for line in lines) > 0 and max(line["rows_resumed"] for line in lines) > 0
    assert max(line["token_age_max"] for line in lines) >= 1
    mixed = False
    for i, scored in enumerate(seen):
        t = scored.collected.records
        assert (
            len(t.stop) % CARRIED.train_batch == 0 and (t.stop >= 0).all()
        )  # groups are trained on when all is written
        assert (t.policy[t.loss_mask] >= 0).all() and (t.policy[~t.loss_mask] == -1).all() and t.policy.max() <= i
        for row, mask in zip(t.policy, t.loss_mask, strict=True):
            assert (np.diff(row[mask]) >= 0).all()
            mixed |= len(set(row[mask])) > 1
    assert mixed
    asked = [tuple(uid) for scored in seen for uid in scored.collected.questions.prompts.uid]
    assert len(asked) == len(set(asked))  # no prompt is trained on twice
    with pytest.raises(KeyboardInterrupt):
        run_carried(tmp_path / "parts", watched=killed(2))
    # Told to go when rows are scored, it abandons the iteration: the rows that wait are those before it.
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Preempted):
        run_carried(tmp_path / "parts", watched=lambda scored: patch.setattr(NOTICE, "requested", True))
    assert_same(whole, run_carried(tmp_path / "parts"))
    assert lines_of(tmp_path / "parts") == lines
    # The same directory with other limits: the rows that wait are of another shape.
    shorter = dataclasses.replace(scripted_model.CONFIG, max_response=384)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "settle", lambda *arguments, **options: None)
        with pytest.raises(CheckpointError, match=r"rows that carry over have .*512.* this rollout needs .*384"):
            run_carried(tmp_path / "parts", iterations=6, rollout=shorter)


@pytest.mark.slow
def test_rows_carry_over_ahead_of_training_and_a_restart_is_exact(tmp_path):
    mesh, rollout_mesh = halves(data=2, tensor=2)
    options = {"mesh": mesh, "rollout_mesh": rollout_mesh, "staleness": 1}
    whole = run_carried(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run_carried(tmp_path / "parts", watched=killed(3), **options)
    assert_same(whole, run_carried(tmp_path / "parts", **options))
    lines = lines_of(tmp_path / "whole")
    assert lines_of(tmp_path / "parts") == lines and max(line["token_age_max"] for line in lines) >= 2


@pytest.mark.slow
def test_a_budget_that_is_never_spent_is_no_budget(tmp_path):
    """The rows, the weights and all metrics but the ones about carrying over."""
    same = {"iterations": 2, "train_batch": 16}
    free = run_carried(tmp_path / "free", rollout_budget=RolloutBudget(), **same)
    rich = run_carried(tmp_path / "rich", rollout_budget=RolloutBudget(tokens=100_000), **same)
    for a, b in zip(*map(jax.tree.leaves, (free, rich)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for a, b in zip(lines_of(tmp_path / "free"), lines_of(tmp_path / "rich"), strict=True):
        assert (a["accuracy"], a["response_tokens"], a["calls"]) == (b["accuracy"], b["response_tokens"], b["calls"])
        assert b["rows_carried"] == b["prompts_waiting"] == b["token_age"] == 0


# ---- parts of several processes


def test_parts_of_the_rows_are_those_of_one_process_side_by_side():
    """Both parts of a batch, and of its rows, make the whole; what is sent comes back as it was."""
    data = test_rl.Questions()
    log = sources.QuestionLog(data, lambda i: Questions(i, *next(data)))
    questions = log.ask(0)
    rows = test_rl.make_trajectories(1)
    shape = static_shape(questions.prompts, test_rl.CONFIG.rollout, None)
    whole = Collected(questions, rows, rows, shape, {"seconds": 1.5})
    parts = [sources.shared(whole, ProcessShard(i, 2, (i,), ((0,), (1,)))) for i in range(2)]
    assert [x for part in parts for x in part.questions.examples] == questions.examples
    joined = jax.tree.map(lambda *xs: np.concatenate(xs), *[part.trajectories for part in parts])
    assert_same(joined, rows)
    assert all(part.records is rows for part in parts) and sources.shared(whole, WHOLE) is whole

    # A process that does not roll out reads the questions in the same order, until all rows of a batch have arrived.
    learner = types.SimpleNamespace(config=test_rl.CONFIG, mesh=None)
    other = test_rl.Questions()
    along = sources.ReadAlong(sources.QuestionLog(other, lambda i: Questions(i, *next(other))))
    second = log.ask(1)
    for asked in (second, questions):  # the later batch is done first
        sent = from_bytes(to_bytes(sources.saved(whole._replace(questions=asked))))
        got = sources.restored(sent, along.batches_of(sent["uid"]), learner)
        assert list(got.questions.examples) == list(asked.examples) and got.metrics == {"seconds": 1.5}
        assert_same(got.records, rows)
        along.forget(sent["uid"])
    assert not along.batches and along.log.asked == 2


# ---- what is refused


@pytest.mark.parametrize("staleness", [-1, 4, 1.0, True, float("nan")])
def test_a_staleness_that_cannot_be_is_refused(staleness):
    with pytest.raises(
        ValueError, match=f"staleness {staleness!r} in a run of 4 iterations: give a whole number from 0 to 3"
    ):
        dataclasses.replace(AHEAD, staleness=staleness)


@pytest.mark.parametrize(
    "changes, words",
    [({"staleness": 1}, "staleness 1"), ({"rollout_budget": RolloutBudget(tokens=9)}, "a rollout_budget")],
)
def test_rows_of_older_policies_need_importance_sampling(changes, words):
    with pytest.raises(ValueError, match=f"with {words} rows are written by older policies .* set loss.importance_cap"):
        dataclasses.replace(test_rl.CONFIG, **changes)
    dataclasses.replace(test_rl.CONFIG, old_logprobs="sampler", **changes)


def test_meshes_that_cannot_be_are_refused():
    devices, model, stages = jax.devices(), make_model(), test_rl.stages(AHEAD)
    begin = lambda config, *meshes, stages=stages: Learner(
        model, test_rl.Questions(), stages, config, mesh=meshes[0], rollout_mesh=meshes[1]
    )
    four, behind = halves()
    some = make_mesh({"data": 4}, devices[2:6])
    with pytest.raises(
        ValueError, match=r"training has the devices \[0, 1, 2, 3\], .* \[2, 3, 4, 5\]: they share \[2, 3\]"
    ):
        begin(AHEAD, four, some)
    with pytest.raises(ValueError, match=r"they share \[0, 1\]"):
        begin(test_rl.CONFIG, four, make_mesh({"data": 2}, devices[:2]))
    with pytest.raises(ValueError, match="rollouts have a mesh and training has none"):
        begin(test_rl.CONFIG, None, behind)
    for rolled in (None, four):
        with pytest.raises(ValueError, match="staleness 1: rows are written ahead only by devices of their own"):
            begin(AHEAD, four, rolled)
    config = dataclasses.replace(test_rl.CONFIG, rollout_budget=RolloutBudget(tokens=9), loss=CAPPED)
    own = test_rl.stages(config, collect=lambda *_: None)
    with pytest.raises(ValueError, match="a rollout_budget with a `collect` of one's own"):
        begin(config, None, None, stages=own)


def test_rows_written_ahead_have_the_devices_behind_those_of_training():
    def ids(mesh, shape, staleness=1):
        config = types.SimpleNamespace(
            mesh=mesh, rollout_mesh=shape, learning=types.SimpleNamespace(staleness=staleness)
        )
        phase = types.SimpleNamespace(ahead=staleness > 0, mesh=mesh and make_mesh(mesh), config=config)
        found = Phase.rollout_mesh.fget(phase)
        return found and [device.id for device in found.devices.flat]

    assert ids({"data": 4}, {"data": -1}) == [4, 5, 6, 7] and ids({"data": 2}, {"tensor": 4}) == [2, 3, 4, 5]
    assert ids({"data": 4}, {"data": 4}, staleness=0) == [0, 1, 2, 3] and ids({"data": 4}, {}, staleness=0) is None
    with pytest.raises(UserError, match=r"config.mesh and config.rollout_mesh: .* they share \[0, 1\]"):
        ids({"data": 4}, {"data": 2}, staleness=0)
    with pytest.raises(
        UserError, match="has all 8 devices, and config.rl.staleness needs some for config.rollout_mesh"
    ):
        ids({"data": -1}, {"data": 4})
    for mesh, shape in ((None, {"data": 4}), ({"data": 4}, {})):
        with pytest.raises(
            UserError, match="rollouts need devices of their own; set config.mesh and config.rollout_mesh"
        ):
            ids(mesh, shape)


def test_a_budget_in_a_config():
    """The settings of `docs/scale.md`."""
    values = {"iterations": 2, "loss": {"importance_cap": 2.0}}
    found = load(RLConfig, {**values, "rollout_budget": {"tokens": 9, "share": 0.5}})
    assert found.rollout_budget == RolloutBudget(tokens=9, share=0.5)
    with pytest.raises(ConfigError, match=r"config\.rollout_budget: a rollout budget of the share 1\.5 of the rows"):
        load(RLConfig, {**values, "rollout_budget": {"share": 1.5}})
    with pytest.raises(ConfigError, match=r"config\.rollout_budget\.share must be .*not nan"):
        load(RLConfig, {**values, "rollout_budget": {"share": float("nan")}})
