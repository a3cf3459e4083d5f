"""The three steps: accumulation, meshes, freezing, masks, and what happens when a number is not a number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pixel_jax.models import forward_hidden
from pixel_jax.models.lora import add_lora
from pixel_jax.parallel import make_mesh, shard, shard_batch, shardings
from pixel_jax.parallel.sharding import value_of
from pixel_jax.planning.hlo import WorkCounter
from pixel_jax.training.losses import PolicyLossConfig
from pixel_jax.training.optimizer import OptimizerConfig, make_optimizer
from pixel_jax.training.state import init_state
from pixel_jax.training.steps import (
    ForwardConfig,
    NonFiniteError,
    check_report,
    check_rows,
    head_logprobs,
    make_rl_step,
    make_score_step,
    make_sft_step,
)

# A large epsilon makes Adam's first update smooth in the gradient: with the usual one it is the gradient's sign, which
# rounding decides where the gradient is zero.
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, eps=1e-2, warmup=0.0)


@functools.cache
def compiled(kind, on_mesh=False, **options):
    """The step of a kind: compiled once for all tests, because compiling is most of what they do."""
    config, optimizer, mesh = ForwardConfig(**{"remat": False, **options}), make_optimizer(OPTIMIZER, 10), None
    if on_mesh:
        mesh = make_mesh(MESH)
    if kind == "sft":
        return make_sft_step(config, optimizer, mesh=mesh)
    if kind == "rl":
        return make_rl_step(config, PolicyLossConfig(), optimizer, later_temperature=0.9, mesh=mesh)
    return make_score_step(config, temperature=1.0, later_temperature=0.5, mesh=mesh)


def fresh(model, on_mesh=False, trainable=".*"):
    return init_state(
        model, make_optimizer(OPTIMIZER, 10), trainable=trainable, mesh=make_mesh(MESH) if on_mesh else None
    )


def one_update(kind, model, batch, *, on_mesh=False, **options):
    """(trained weights before, after, report) on the host."""
    state = fresh(model, on_mesh)
    before = jax.device_get(state.trainable)
    batch = shard_batch(batch, make_mesh(MESH)) if on_mesh else batch
    state, report = compiled(kind, on_mesh, **options)(state, batch)
    return before, jax.device_get(state.trainable), jax.device_get(report)


def assert_same_update(a, b):
    (before, after, report), (_, other, again) = a, b
    np.testing.assert_allclose(report.metrics["loss"], again.metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(report.rows, again.rows, rtol=1e-5, atol=1e-5 * np.abs(report.rows).max())
    moved = apart = 0.0
    for x, y, z in zip(*map(jax.tree.leaves, (before, after, other)), strict=True):
        np.testing.assert_allclose(y, z, rtol=1e-5, atol=2e-6)
        moved, apart = moved + np.sum((y - x) ** 2), apart + np.sum((y - z) ** 2)
    assert apart <= (1e-4) ** 2 * moved  # and not only because both hardly moved


@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_micro_batches_add_up_to_the_batch(model, batch, kind):
    batch = batch._replace(weight=np.array([1, 1, 1, 0, 1, 1, 1, 1], np.float32))
    assert_same_update(one_update(kind, model, batch), one_update(kind, model, batch, micro_batches=4))


def test_how_the_model_is_run_does_not_change_the_update(model, batch):
    options = {"remat": True, "implementation": "chunked", "logit_chunk": 7}
    assert_same_update(one_update("sft", model, batch), one_update("sft", model, batch, **options))


@pytest.mark.parametrize("kind, micro_batches", [("sft", 1), ("rl", 2)])
def test_eight_devices_equal_one(model, batch, kind, micro_batches):
    one = one_update(kind, model, batch)
    assert_same_update(one, one_update(kind, model, batch, on_mesh=True, micro_batches=micro_batches))


def test_the_head_is_gathered_once_however_many_chunks(model):
    """And its gradient added up once: what devices send does not grow with the chunks."""
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    on = lambda x, *spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
    places = shardings(model, mesh)
    model = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), model, places)
    hidden = on(jax.ShapeDtypeStruct((8, 64, model.config.text.hidden_size), jnp.float32), "fsdp")
    target = on(jax.ShapeDtypeStruct((8, 64), jnp.int32), "fsdp")

    @functools.partial(jax.jit, static_argnums=3)
    def gradient(model, hidden, target, chunk):
        def loss(model):
            return jnp.sum(head_logprobs(model, hidden, target, 1.0, chunk, mesh)[0])

        return jax.lax.with_sharding_constraint(jax.grad(loss)(model), places).head

    def sent(chunk):
        return sum(WorkCounter(gradient.lower(model, hidden, target, chunk).compile().as_text()).total().sent.values())

    head = value_of(model.head.weight)
    assert sent(4) < 1.2 * sent(32)
    assert sent(32) < 4 * head.size * head.dtype.itemsize


def test_the_state_keeps_its_layout_and_compiles_once(model, batch):
    mesh, state, step = make_mesh(MESH), fresh(model, on_mesh=True), compiled("sft", True, micro_batches=1)
    layout = [x.sharding for x in jax.tree.leaves(state)]
    split = [x for x in jax.tree.leaves(state) if x.addressable_shards[0].data.size < x.size]
    assert len(split) > 30  # weights and both moments
    for _ in range(2):
        state, _ = step(state, shard_batch(batch, mesh))
    assert all(x.sharding.is_equivalent_to(s, x.ndim) for x, s in zip(jax.tree.leaves(state), layout, strict=True))
    assert step._cache_size() == 1
    assert int(state.step) == 2


def test_one_device_compiles_once(model, batch):
    read = jax.device_put(model, jax.devices()[0])  # as `from_pretrained` leaves it: bound to its device
    step, state = make_sft_step(ForwardConfig(remat=False), make_optimizer(OPTIMIZER, 10)), fresh(read)
    for _ in range(3):
        state, _ = step(state, batch)
    assert step._cache_size() == 1


def test_only_what_matches_is_trained(model, batch):
    state = fresh(model, trainable="(?!visual)")
    frozen = jax.device_get(state.rest)
    assert sum(x.size for x in jax.tree.leaves(frozen)) == sum(x.size for x in jax.tree.leaves(model.visual))
    state, _ = compiled("sft")(state, batch)
    jax.tree.map(np.testing.assert_array_equal, frozen, jax.device_get(state.rest))
    for a, b in zip(jax.tree.leaves(model.language_model), jax.tree.leaves(state.model.language_model), strict=True):
        assert not np.array_equal(a, b)
    with pytest.raises(ValueError, match="nothing_like_it"):
        fresh(model, trainable="nothing_like_it")


def test_adapters_alone_are_trained(model, batch):
    adapted = add_lora(model, jax.random.key(0), rank=2, alpha=4.0, targets=r"model\..*\.(q_proj|v_proj)")
    state = fresh(adapted, trainable=".*lora_")
    assert len(state.trainable) == 4
    frozen = jax.device_get(state.rest)
    state, report = compiled("sft")(state, batch)
    jax.tree.map(np.testing.assert_array_equal, frozen, jax.device_get(state.rest))
    np.testing.assert_allclose(report.metrics["loss"], one_update("sft", model, batch)[2].metrics["loss"], rtol=1e-5)
    assert all(np.any(np.asarray(x) != 0) for x in jax.tree.leaves(state.trainable))  # B has left zero


def test_trained_weights_are_float32_and_frozen_ones_stay(model, batch):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    state = fresh(half, trainable="(?!visual)")
    assert {x.dtype for x in jax.tree.leaves(state.trainable)} == {np.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(state.rest)} == {jnp.dtype(jnp.bfloat16)}
    state, report = compiled("sft", compute_dtype="bfloat16")(state, batch)
    assert {x.dtype for x in jax.tree.leaves(state.trainable)} == {np.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(state.rest)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(report.metrics["loss"], one_update("sft", model, batch)[2].metrics["loss"], rtol=0.05)


def test_the_model_given_survives_and_the_state_is_donated(model, batch):
    state = fresh(model)
    compiled("sft")(state, batch)
    assert not any(x.is_deleted() for x in jax.tree.leaves(model))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.trainable))


@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_tokens_that_were_not_chosen_carry_no_loss(model, batch, kind):
    """What follows the last chosen token, what padding holds, and rows of weight zero change nothing at all."""
    tokens, old = batch.tokens.copy(), batch.old_logprobs.copy()
    tokens[~batch.valid] = 17
    old[~batch.loss_mask] = 5.0
    changed = batch._replace(tokens=tokens, old_logprobs=old)
    a, b = one_update(kind, model, batch), one_update(kind, model, changed)
    jax.tree.map(np.testing.assert_array_equal, a[1], b[1])
    weight = np.array([1, 1, 1, 1, 1, 1, 0, 0], np.float32)
    some = batch._replace(weight=weight)
    others = some._replace(
        tokens=np.where(weight[:, None] > 0, batch.tokens, 5), advantage=np.where(weight > 0, batch.advantage, np.inf)
    )
    a, b = one_update(kind, model, some), one_update(kind, model, others)
    jax.tree.map(np.testing.assert_array_equal, a[1], b[1])
    if kind == "rl":
        np.testing.assert_allclose(a[2].metrics["loss"], a[2].rows.sum() / (200 * 6), rtol=1e-5)
    # but chosen tokens, images and advantages do matter
    for other in (
        batch._replace(tokens=np.where(batch.loss_mask, 3, batch.tokens)),
        batch._replace(visual=batch.visual._replace(patches=255 - batch.visual.patches)),
    ):
        other = one_update(kind, model, other._replace(weight=weight))
        assert other[2].metrics["loss"] != a[2].metrics["loss"]


def test_scores_are_those_of_the_plain_forward_at_each_turns_temperature(model, batch):
    logprobs, entropy = compiled("score")(model, batch)
    hidden = forward_hidden(model, batch.tokens, batch.valid, batch.visual)
    logits = model.logits(hidden)
    tables = {t: np.asarray(jax.nn.log_softmax(logits / t)) for t in (1.0, 0.5)}
    assert not np.asarray(logprobs)[~batch.loss_mask].any()
    for row, column in zip(*np.nonzero(batch.loss_mask), strict=True):
        before = np.flatnonzero(batch.valid[row, :column])[-1]
        table = tables[1.0 if column < 14 else 0.5][row, before]
        np.testing.assert_allclose(logprobs[row, column], table[batch.tokens[row, column]], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(entropy[row, column], -np.sum(np.exp(table) * table), rtol=1e-4, atol=1e-5)


def test_scores_do_not_depend_on_micro_batches_or_mesh(model, batch):
    expected, mesh = compiled("score")(model, batch)[0], make_mesh(MESH)
    np.testing.assert_allclose(compiled("score", micro_batches=2)(model, batch)[0], expected, rtol=1e-5, atol=1e-5)
    sharded = compiled("score", True, micro_batches=2)(shard(model, mesh), shard_batch(batch, mesh))[0]
    np.testing.assert_allclose(sharded, expected, rtol=1e-5, atol=1e-5)


def test_on_policy_the_ratio_is_one_and_the_mismatch_is_measured(model, batch):
    """Twice the same batch: what one update did is what the ratio of the next one sees."""
    scorer = make_score_step(ForwardConfig(remat=False), later_temperature=0.9)
    old = np.asarray(scorer(model, batch)[0])
    batch = batch._replace(old_logprobs=old, logprobs=np.where(batch.loss_mask, old - 0.25, 0).astype(np.float32))
    state, report = compiled("rl")(fresh(model), batch)
    metrics = check_report(report, 0)
    np.testing.assert_allclose(metrics["ratio"], 1.0, rtol=1e-5)
    np.testing.assert_allclose(metrics["sampler_trainer_mismatch"], 0.25, rtol=1e-5)
    assert metrics["clip_fraction"] == 0 and abs(metrics["kl"]) < 1e-6
    expected = -np.sum(batch.loss_mask.sum(1) * batch.advantage) / (200 * 8)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    new = np.asarray(scorer(state.model, batch)[0])
    _, report = compiled("rl")(state, batch)
    np.testing.assert_allclose(report.metrics["ratio"], np.exp(new - old)[batch.loss_mask].mean(), rtol=1e-4)


def test_good_rows_become_likelier_and_bad_ones_less_likely(model, batch):
    scorer = make_score_step(ForwardConfig(remat=False), later_temperature=0.9)
    old = np.asarray(scorer(model, batch)[0])
    sign = np.array([1, -1] * 4, np.float32)
    state = fresh(model)
    for _ in range(3):
        state, _ = compiled("rl")(state, batch._replace(advantage=sign, old_logprobs=old))
    change = (np.asarray(scorer(state.model, batch)[0]) - old).sum(1)
    assert change[::2].mean() > 0 > change[1::2].mean()


def test_a_loss_that_is_no_number_names_its_rows(model, batch):
    advantage = batch.advantage.copy()
    advantage[[2, 5]] = np.nan, np.inf
    _, report = compiled("rl")(fresh(model), batch._replace(advantage=advantage))
    with pytest.raises(NonFiniteError, match=r"step 7: the loss of 2 of 8 rows is not finite \(2: nan, 5: "):
        check_report(report, 7)
    weight = np.where(np.isfinite(advantage), 1, 0).astype(np.float32)
    _, report = compiled("rl")(fresh(model), batch._replace(advantage=advantage, weight=weight))
    assert np.isfinite(check_report(report, 8)["grad_norm"])
    with pytest.raises(NonFiniteError, match=r"rewards of 1 of 3 rows .*\(1: inf\)"):
        check_rows(np.array([0.0, np.inf, 1.0]), "rewards")


def test_an_uneven_split_is_an_error(model, batch):
    with pytest.raises(ValueError, match="8 rows .* 3 micro-batches"):
        compiled("sft", micro_batches=3)(fresh(model), batch)


def test_the_text_model_learns_a_row_by_heart(model, batch):
    """Thirty steps of tuning bring the loss down to a third: masks, alignment and the optimiser all work together."""
    state, losses = fresh(model, trainable="(?!visual)"), []
    for i in range(30):
        state, report = compiled("sft")(state, batch)
        losses.append(check_report(report, i)["loss"])
    assert losses[-1] < losses[0] / 3


def test_gradient_of_padding_only_is_zero(model, batch):
    batch = batch._replace(weight=np.zeros(8, np.float32))
    before, after, report = one_update("rl", model, batch)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert report.metrics["loss"] == 0
