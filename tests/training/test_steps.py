"""The three steps: accumulation, meshes, freezing, masks, and what happens when a number is not a number."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_model import IMAGE, make_batch, make_model

from pixel_jax.models import forward_hidden
from pixel_jax.parallel import make_mesh, shard, shard_batch
from pixel_jax.training.batch import pad_rows, take
from pixel_jax.training.losses import PolicyLossConfig
from pixel_jax.training.optimizer import OptimizerConfig, make_optimizer
from pixel_jax.training.state import init_state
from pixel_jax.training.steps import (
    ForwardConfig,
    NonFiniteError,
    check_report,
    check_rows,
    make_rl_step,
    make_score_step,
    make_sft_step,
)

# A large epsilon makes Adam's first update smooth in the gradient: with the usual one it is the gradient's sign, which
# rounding decides where the gradient is zero.
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, eps=1e-2, warmup=0.0)


def one_update(kind, model, batch, *, mesh=None, optimizer=OPTIMIZER, trainable=".*", **options):
    """(trained weights before, after, report) on the host."""
    config = ForwardConfig(**{"remat": False, **options})
    transform = make_optimizer(optimizer, 10)
    step = {
        "sft": lambda: make_sft_step(config, transform, mesh=mesh),
        "sft-token": lambda: make_sft_step(config, transform, normalizer="token", mesh=mesh),
        "rl": lambda: make_rl_step(config, PolicyLossConfig(), transform, later_temperature=0.9, mesh=mesh),
        "rl-token": lambda: make_rl_step(config, PolicyLossConfig(normalizer="token"), transform, mesh=mesh),
    }[kind]()
    state = init_state(model, transform, trainable=trainable, mesh=mesh)
    before = jax.device_get(state.trainable)
    state, report = step(state, batch if mesh is None else shard_batch(batch, mesh))
    return before, jax.device_get(state.trainable), jax.device_get(report)


def assert_same_update(a, b):
    (_, after, report), (_, other, again) = a, b
    np.testing.assert_allclose(report.metrics["loss"], again.metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(report.rows, again.rows, rtol=1e-5, atol=1e-5 * np.abs(report.rows).max())
    for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(other), strict=True):
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(x), (x.shape, np.abs(x - y).max())
    for x, y, z in zip(*map(jax.tree.leaves, (a[0], after, other)), strict=True):  # not only: both hardly moved
        assert np.linalg.norm(y - z) <= 1e-3 * np.linalg.norm(y - x) + 1e-7


@pytest.mark.parametrize("kind", ["sft", "sft-token", "rl", "rl-token"])
def test_micro_batches_add_up_to_the_batch(model, batch, kind):
    batch = batch._replace(weight=np.array([1, 1, 1, 0, 1, 1, 1, 1], np.float32))
    whole = one_update(kind, model, batch)
    assert_same_update(whole, one_update(kind, model, batch, micro_batches=4))
    assert_same_update(whole, one_update(kind, model, batch, remat=True, implementation="chunked", logit_chunk=7))


@pytest.mark.parametrize("kind", ["sft", "rl"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_eight_devices_equal_one(model, batch, kind, micro_batches):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    one = one_update(kind, model, batch)
    assert_same_update(one, one_update(kind, model, batch, mesh=mesh, micro_batches=micro_batches))


def test_the_state_keeps_its_layout_and_compiles_once(model, batch):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    optimizer = make_optimizer(OPTIMIZER, 10)
    state = init_state(model, optimizer, mesh=mesh)
    layout = [x.sharding for x in jax.tree.leaves(state)]
    split = [x for x in jax.tree.leaves(state) if x.addressable_shards[0].data.size < x.size]
    assert len(split) > 30  # weights and both moments
    step = make_sft_step(ForwardConfig(), optimizer, mesh=mesh)
    for _ in range(2):
        state, _ = step(state, shard_batch(batch, mesh))
    assert all(x.sharding.is_equivalent_to(s, x.ndim) for x, s in zip(jax.tree.leaves(state), layout, strict=True))
    assert step._cache_size() == 1
    assert int(state.step) == 2


def test_only_what_matches_is_trained(model, batch):
    optimizer = make_optimizer(OPTIMIZER, 10)
    state = init_state(model, optimizer, trainable="(?!visual)")
    frozen = jax.device_get(state.rest)
    assert sum(x.size for x in jax.tree.leaves(frozen)) == sum(x.size for x in jax.tree.leaves(model.visual))
    state, _ = make_sft_step(ForwardConfig(), optimizer)(state, batch)
    jax.tree.map(np.testing.assert_array_equal, frozen, jax.device_get(state.rest))
    for a, b in zip(jax.tree.leaves(model.language_model), jax.tree.leaves(state.model.language_model), strict=True):
        assert not np.array_equal(a, b)
    with pytest.raises(ValueError, match="nothing_like_it"):
        init_state(model, optimizer, trainable="nothing_like_it")


def test_trained_weights_are_float32_and_frozen_ones_stay(model, batch):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    optimizer = make_optimizer(OPTIMIZER, 10)
    state = init_state(half, optimizer, trainable="(?!visual)")
    assert {x.dtype for x in jax.tree.leaves(state.trainable)} == {np.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(state.rest)} == {jnp.bfloat16}
    exact = make_sft_step(ForwardConfig(), optimizer)(init_state(model, optimizer), batch)[1]
    state, report = make_sft_step(ForwardConfig(compute_dtype="bfloat16"), optimizer)(state, batch)
    assert {x.dtype for x in jax.tree.leaves(state.trainable)} == {np.dtype("float32")}
    np.testing.assert_allclose(report.metrics["loss"], exact.metrics["loss"], rtol=0.05)


def test_the_model_given_survives_and_the_state_is_donated(model, batch):
    optimizer = make_optimizer(OPTIMIZER, 10)
    state = init_state(model, optimizer)
    make_sft_step(ForwardConfig(), optimizer)(state, batch)
    assert not any(x.is_deleted() for x in jax.tree.leaves(model))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.trainable))


@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_tokens_that_were_not_chosen_carry_no_loss(model, batch, kind):
    """What follows the last chosen token, what padding holds, and rows of weight zero change nothing at all."""
    tokens, old = batch.tokens.copy(), batch.old_logprobs.copy()
    tokens[~batch.valid] = 17
    old[~batch.chosen] = 5.0
    changed = batch._replace(tokens=tokens, old_logprobs=old)
    a, b = one_update(kind, model, batch), one_update(kind, model, changed)
    jax.tree.map(np.testing.assert_array_equal, a[1], b[1])
    short = take(batch, slice(0, 6))
    assert_same_update(one_update(kind, model, short), one_update(kind, model, pad_rows(short, 8)))
    # but chosen tokens, images and advantages do matter
    for other in (
        batch._replace(tokens=np.where(batch.chosen, 3, batch.tokens)),
        batch._replace(visual=batch.visual._replace(patches=255 - batch.visual.patches)),
    ):
        assert one_update(kind, model, other)[2].metrics["loss"] != a[2].metrics["loss"]


def test_scores_are_those_of_the_plain_forward(model, batch):
    logprobs, entropy = make_score_step(ForwardConfig(), temperature=0.7)(model, batch)
    hidden = forward_hidden(model, batch.tokens, batch.valid, batch.visual)
    table = jax.nn.log_softmax(model.logits(hidden) / 0.7)
    assert not np.asarray(logprobs)[~batch.chosen].any()
    for row, column in zip(*np.nonzero(batch.chosen), strict=True):
        before = np.flatnonzero(batch.valid[row, :column])[-1]
        np.testing.assert_allclose(logprobs[row, column], table[row, before, batch.tokens[row, column]], rtol=1e-5)
        expected = -jnp.sum(jnp.exp(table[row, before]) * table[row, before])
        np.testing.assert_allclose(entropy[row, column], expected, rtol=1e-4)


def test_scores_do_not_depend_on_micro_batches_or_mesh(model, batch):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    expected = make_score_step(ForwardConfig(), later_temperature=0.9)(model, batch)[0]
    for config, on in ((ForwardConfig(micro_batches=2), None), (ForwardConfig(micro_batches=2), mesh)):
        scorer = make_score_step(config, later_temperature=0.9, mesh=on)
        args = (model, batch) if on is None else (shard(model, on), shard_batch(batch, on))
        np.testing.assert_allclose(scorer(*args)[0], expected, rtol=1e-5, atol=1e-5)


def test_later_turns_have_their_temperature(model, batch):
    first, later = (make_score_step(ForwardConfig(), temperature=t)(model, batch)[0] for t in (1.0, 0.5))
    mixed = make_score_step(ForwardConfig(), temperature=1.0, later_temperature=0.5)(model, batch)[0]
    np.testing.assert_allclose(mixed[:, :14], first[:, :14], rtol=1e-6)
    np.testing.assert_allclose(mixed[:, 17:], later[:, 17:], rtol=1e-6)
    assert not np.allclose(first[:, 17], later[:, 17])


def test_on_policy_the_ratio_is_one_and_the_gap_is_measured(model, batch):
    optimizer = make_optimizer(OPTIMIZER, 10)
    old = np.asarray(make_score_step(ForwardConfig())(model, batch)[0])
    batch = batch._replace(old_logprobs=old, logprobs=np.where(batch.chosen, old - 0.25, 0).astype(np.float32))
    _, report = make_rl_step(ForwardConfig(), PolicyLossConfig(), optimizer)(init_state(model, optimizer), batch)
    metrics = check_report(report, 0)
    np.testing.assert_allclose(metrics["ratio"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(metrics["gap"], 0.25, rtol=1e-5)
    assert metrics["clip_fraction"] == 0 and abs(metrics["kl"]) < 1e-6
    expected = -np.sum(batch.chosen.sum(1) * batch.advantage) / (200 * 8)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)


def test_a_good_row_becomes_likelier_and_a_bad_one_less_likely(model, batch):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-3, warmup=0.0), 20)
    scorer = make_score_step(ForwardConfig())
    before = np.asarray(scorer(model, batch)[0]).sum(1)
    sign = np.array([1, -1] * 4, np.float32)
    batch = batch._replace(advantage=sign, old_logprobs=np.asarray(scorer(model, batch)[0]))
    step, state = make_rl_step(ForwardConfig(), PolicyLossConfig(), optimizer), init_state(model, optimizer)
    for _ in range(3):
        state, _ = step(state, batch)
    after = np.asarray(scorer(state.model, batch)[0]).sum(1)
    assert ((after - before) * sign > 0).all()


def test_a_loss_that_is_no_number_names_its_rows(model, batch):
    optimizer = make_optimizer(OPTIMIZER, 10)
    advantage = batch.advantage.copy()
    advantage[[2, 5]] = np.nan, np.inf
    step = make_rl_step(ForwardConfig(), PolicyLossConfig(), optimizer)
    _, report = step(init_state(model, optimizer), batch._replace(advantage=advantage))
    with pytest.raises(NonFiniteError, match=r"step 7: the loss of 2 of 8 rows is not finite \(2: nan, 5: "):
        check_report(report, 7)
    weight = np.where(np.isfinite(advantage), 1, 0).astype(np.float32)
    _, report = step(init_state(model, optimizer), batch._replace(advantage=advantage, weight=weight))
    assert np.isfinite(check_report(report, 8)["grad_norm"])
    with pytest.raises(NonFiniteError, match=r"rewards of 1 of 3 rows .*\(1: inf\)"):
        check_rows(np.array([0.0, np.inf, 1.0]), "rewards")


def test_an_uneven_split_is_an_error(model, batch):
    optimizer = make_optimizer(OPTIMIZER, 10)
    step = make_sft_step(ForwardConfig(micro_batches=3), optimizer)
    with pytest.raises(ValueError, match="8 rows .* 3 micro-batches"):
        step(init_state(model, optimizer), batch)


def test_the_text_model_learns_a_row_by_heart(batch):
    """Thirty steps of tuning bring the loss down tenfold: masks, alignment and the optimiser all work together."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=3e-3, warmup=0.1), 30)
    step, state = make_sft_step(ForwardConfig(), optimizer), init_state(make_model(), optimizer, trainable="(?!visual)")
    losses = []
    for i in range(30):
        state, report = step(state, batch)
        losses.append(check_report(report, i)["loss"])
    assert losses[-1] < losses[0] / 10
    assert (batch.tokens == IMAGE).any() and optax.global_norm(state.rest) > 0


def test_gradient_of_padding_only_is_zero(model):
    batch = make_batch(4)._replace(weight=np.zeros(4, np.float32))
    before, after, report = one_update("rl", model, batch)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert report.metrics["loss"] == 0
