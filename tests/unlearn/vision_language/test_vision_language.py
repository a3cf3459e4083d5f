"""The loss of a LoRA-adapted Qwen2.5-VL as `unlearn_jax` sees it: the numbers of tuning, its curvature, one device and eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from pixel_jax.models import LanguageModel
from pixel_jax.models.layers import LoRAWeight
from pixel_jax.models.lora import add_lora, combine, split
from pixel_jax.models.released import released
from pixel_jax.parallel import make_mesh
from pixel_jax.parallel.sharding import shardings, undivided
from pixel_jax.training.batch import pack, take
from pixel_jax.training.steps import ForwardConfig, trajectory_logprobs
from tests.training.tiny_model import IMAGE, VOCAB, make_batch, make_model
from unlearn_jax import CorrectResponse, Dataset, ModifyQuery, Remove, erase
from unlearn_jax.curvature import product
from unlearn_jax.objective import Objective, dataset_objective
from unlearn_jax.vision_language import adapter_loss, examples


@pytest.fixture(scope="module")
def model():
    """With an adapter that does something: a few hundred numbers on the values of both layers."""
    fresh, rest = split(add_lora(make_model(), jax.random.key(1), rank=1, alpha=2.0, targets=r".*v_proj"), LoRAWeight)
    rng = np.random.default_rng(0)
    return combine({name: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype) for name, x in fresh.items()}, rest)


@pytest.fixture(scope="module")
def batch():
    return make_batch(8)


def wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if hasattr(x, "dtype") else x, tree)


def test_examples_hold_what_is_learned(batch):
    found = examples(batch, [f"row-{i}" for i in range(8)])
    assert found["id"].tolist()[:2] == ["row-0", "row-1"] and found["tokens"].shape == (8, 24)
    for i in range(8):
        (learned,) = np.nonzero(batch.loss_mask[i])
        mask = found["loss_mask"][i]
        np.testing.assert_array_equal(found["labels"][i, mask], batch.tokens[i, learned])
        before = [max(j for j in np.flatnonzero(batch.valid[i]) if j < t) for t in learned]
        np.testing.assert_array_equal(found["places"][i, mask], before)
    # The prompt's padding lies between the first learned token and what predicts it in row 0, not in row 2.
    assert found["places"][0, 0] == 7 and found["places"][2, 0] == 9


def test_examples_leave_out_what_no_row_uses(batch):
    grow = lambda x, axis, value=0: np.pad(x, [(0, 40 * (i == axis)) for i in range(x.ndim)], constant_values=value)
    visual = batch.visual._replace(
        patches=grow(grow(batch.visual.patches, 1), 2),
        slices=grow(batch.visual.slices, 1, -1),
        grids=grow(batch.visual.grids, 1),
        seconds=grow(batch.visual.seconds, 1),
    )
    roomy = batch._replace(visual=visual, **{k: grow(getattr(batch, k), 1) for k in ("tokens", "valid", "loss_mask")})
    found, exact = examples(roomy), examples(batch)
    assert found["visual"]["patches"].shape == (8, 1, 16, 588) and found["tokens"].shape == (8, 32)
    for name in ("slices", "grids", "seconds"):
        np.testing.assert_array_equal(found["visual"][name], exact["visual"][name])
    with pytest.raises(ValueError, match="packed rows hold several examples"):
        examples(pack(batch._replace(advantage=np.zeros(8, np.float32))))


@pytest.mark.parametrize("options", [{"remat": False, "implementation": "dense"}, {"implementation": "chunked"}])
def test_losses_are_those_of_tuning(model, batch, options):
    loss, adapter = adapter_loss(model, **options)
    found = examples(batch)
    found.pop("id")
    sums = Objective.of(loss, found, np.ones(8), micro_batch=4).per_example(adapter)
    logprobs, _ = jax.jit(lambda model: trajectory_logprobs(model, batch, ForwardConfig(remat=False)))(model)
    np.testing.assert_allclose(sums, -np.where(batch.loss_mask, logprobs, 0).sum(axis=1), rtol=2e-5)
    assert all("lora" in name for name in adapter)


def test_gauss_newton_product_is_the_dense_matrix(x64, model, batch):
    """In float64, on all directions: sum over tokens of J' (diag p - p p') J, with J from the other attention."""
    loss, adapter = wide(adapter_loss(model, remat=False, implementation="chunked"))
    dataset = Dataset.of(examples(take(batch, slice(3))))
    objective = dataset_objective(loss, adapter, dataset, micro_batch=3)
    flat, unravel = jax.flatten_util.ravel_pytree(adapter)
    assert flat.dtype == jnp.float64 and 50 < flat.size < 500
    plain, _ = wide(adapter_loss(model, remat=False, implementation="dense"))
    outputs = lambda flat, example: plain.outputs(unravel(flat), example)
    rows = jax.tree.map(lambda x: x[0], objective.examples)
    z, J = jax.jit(jax.vmap(lambda x: (outputs(flat, x), jax.jacfwd(outputs)(flat, x))))(rows)
    p = jax.nn.softmax(z)
    bent = p[..., None] * J - p[..., None] * jnp.einsum("ntv,ntvk->ntk", p, J)[:, :, None]
    scale = objective.coefficients[0][:, None] * rows["loss_mask"]
    dense = jnp.einsum("nt,ntvj,ntvk->jk", scale, J, bent)
    ours = toys.dense(lambda v: product(objective, adapter, v, "ggn"), adapter)
    np.testing.assert_allclose(ours, dense, atol=1e-10 * np.abs(dense).max())


def edits(dataset):
    """One row removed, one answer corrected, one question changed."""
    answer, question = dataset.example(1), dataset.example(2)
    last = np.flatnonzero(answer["loss_mask"])[-1]
    labels, tokens = answer["labels"].copy(), answer["tokens"].copy()
    labels[last] = tokens[answer["places"][last] + 1] = 55
    asked = question["tokens"].copy()
    asked[0] = 51
    row = lambda **fields: {name: x[None] for name, x in fields.items()}
    return [
        Remove([0]),
        CorrectResponse([1], row(labels=labels, tokens=tokens)),
        ModifyQuery([2], row(tokens=asked)),
    ]


@pytest.mark.slow
def test_an_edit_on_one_device_and_on_eight(model, batch):
    loss, adapter = adapter_loss(model, remat=False, implementation="dense")
    dataset = Dataset.of(examples(batch))
    config = {"weight_decay": 1e-2, "newton_steps": 1, "damping": 0.1, "micro_batch": 16, "solver": {"rtol": 1e-4}}
    meshes = (None, make_mesh({"data": 8}))
    one, eight = (erase(loss, adapter, dataset, edits(dataset), config, mesh=mesh) for mesh in meshes)
    apart = toys.relative_error(eight.delta, one.delta)
    assert one.report.edited == 3 and one.report.actual < 0 and one.report.delta_norm > 1e-3
    assert apart < 1e-5


def narrow_7b():
    """Qwen2.5-VL-7B with its heads, key-value heads and kinds of layers, two of each stack, and narrow ones."""
    network = released("qwen2.5-vl-7b")
    text = dataclasses.replace(
        network.text, vocab_size=VOCAB, hidden_size=28 * 8, intermediate_size=64, num_hidden_layers=2,
        mrope_section=(1, 1, 2),
    )  # fmt: skip
    vision = dataclasses.replace(
        network.vision, depth=2, hidden_size=128, intermediate_size=32, out_hidden_size=28 * 8,
        fullatt_block_indexes=(1,),
    )  # fmt: skip
    ids = {"image_token_id": IMAGE, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    return dataclasses.replace(network, text=text, vision=vision, **ids)


@pytest.mark.slow
def test_an_edit_of_a_sharded_7b_is_that_of_one_device(x64, batch):
    """Weights over `fsdp` and `tensor`, a key-value head on each of four devices, examples over `fsdp`; in float64."""
    network = narrow_7b()
    assert (network.text.num_attention_heads, network.text.num_key_value_heads) == (28, 4)
    plain = LanguageModel(network, jax.random.key(0))
    plain = jax.tree.map(lambda x: np.float32(4) * x if x.ndim > 1 and x.shape[-1] > 1 else x, plain)
    plain = add_lora(plain, jax.random.key(1), rank=2, alpha=4.0, targets=r"model\.layers\..*")
    adapter, rest = split(plain, LoRAWeight)
    rng = np.random.default_rng(0)
    adapter = {name: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype) for name, x in adapter.items()}
    plain = wide(combine(adapter, rest))
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 4})
    spread = jax.device_put(plain, shardings(plain, mesh))
    key = spread.language_model.layers.self_attn.k_proj.weight
    assert {x.data.size for x in key.addressable_shards} == {key.size // 8} and not undivided(plain, dict(mesh.shape))
    dataset, found = Dataset.of(examples(batch)), []
    config = {"weight_decay": 1e-2, "newton_steps": 1, "damping": 1.0, "micro_batch": 8}
    config["solver"] = {"rtol": 1e-5, "max_steps": 8}
    for model, places in ((plain, None), (spread, mesh)):
        loss, at = adapter_loss(model, remat=False, implementation="dense")
        found.append(erase(loss, at, dataset, edits(dataset), config, mesh=places))
    one, eight = found
    assert one.report.edited == 3 and one.report.actual < 0 and one.report.delta_norm > 1e-3
    assert toys.relative_error(eight.delta, one.delta) < 1e-7
    assert len(jax.tree.leaves(eight.adapter)[0].sharding.device_set) == 8


def test_the_base_is_an_argument_of_the_program(model, batch):
    """Another base, the same compiled program."""
    loss, adapter = adapter_loss(model, remat=False, implementation="dense")
    dataset = Dataset.of(examples(batch))
    objective = dataset_objective(loss, adapter, dataset, micro_batch=4)
    value = objective.value(adapter)
    compiled = Objective.value._cache_size()
    base = jax.tree.map(lambda x: 1.5 * x, loss.outputs.args[0])
    moved = dataclasses.replace(loss, outputs=jax.tree_util.Partial(loss.outputs.func, base))
    assert abs(dataclasses.replace(objective, loss=moved).value(adapter) - value) > 1e-3
    assert Objective.value._cache_size() == compiled
