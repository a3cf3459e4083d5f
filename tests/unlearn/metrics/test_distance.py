"""Distances in the weights, against the dense change, and whatever the basis of the rank."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn_jax.metrics import distance


def delta_w_norm(adapter, **options):
    """The length of the vector by which distances are taken."""
    return np.linalg.norm(distance.compress([adapter], **options)[0])


def adapter(seed, rank=2, rows=6, columns=5, layers=()):
    rng = np.random.default_rng(seed)
    pair = lambda: {
        "lora_a": rng.normal(size=(*layers, rank, columns)),
        "lora_b": rng.normal(size=(*layers, rows, rank)),
    }
    return {"q": pair(), "v": pair(), "bias": rng.normal(size=4)}


def dense(tree):
    return np.concatenate([(tree[k]["lora_b"] @ tree[k]["lora_a"]).ravel() for k in "qv"] + [tree["bias"]])


def regauge(tree, seed):
    """The same change in another basis of the rank."""
    rng = np.random.default_rng(seed)
    turned = dict(tree)
    for k in "qv":
        rank = tree[k]["lora_a"].shape[-2]
        m = rng.normal(size=(rank, rank)) + 2 * np.eye(rank)
        turned[k] = {"lora_a": np.linalg.inv(m) @ tree[k]["lora_a"], "lora_b": tree[k]["lora_b"] @ m}
    return turned


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 4]), st.sampled_from([(), (3,)]))
def test_lengths_and_angles_are_the_dense_ones(seed, rank, layers):
    """Rank 4 of three adapters exceeds both sides of the matrix."""
    one, two, start = (adapter(seed + i, rank, layers=layers) for i in range(3))
    d1, d2, d0 = dense(one), dense(two), dense(start)
    assert delta_w_norm(one) == pytest.approx(np.linalg.norm(d1), rel=1e-10)
    assert distance.delta_w_distance(one, two) == pytest.approx(np.linalg.norm(d1 - d2), rel=1e-10)
    cosine = (d1 - d0) @ (d2 - d0) / np.linalg.norm(d1 - d0) / np.linalg.norm(d2 - d0)
    assert distance.delta_w_cosine(one, two, start) == pytest.approx(cosine, abs=1e-10)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_the_basis_of_the_rank_does_not_matter(seed):
    one, two, start = (adapter(seed + i) for i in range(3))
    turned = regauge(one, seed)
    size = delta_w_norm(one)
    assert distance.delta_w_distance(one, turned) < 1e-10 * size
    assert distance.delta_w_distance(turned, two) == pytest.approx(distance.delta_w_distance(one, two), rel=1e-8)
    cosines = [distance.delta_w_cosine(x, two, start) for x in (one, turned)]
    assert cosines[0] == pytest.approx(cosines[1], abs=1e-8)


def test_small_differences_are_not_lost():
    """The difference of Gram matrices would lose everything below 1e-8."""
    one = adapter(0)
    near = {k: dict(v) if k != "bias" else v for k, v in one.items()}
    near["q"]["lora_b"] = one["q"]["lora_b"] + 1e-11
    expected = np.linalg.norm(np.full_like(one["q"]["lora_b"], 1e-11) @ one["q"]["lora_a"])
    assert distance.delta_w_distance(one, near) == pytest.approx(expected, rel=1e-3)


def test_an_edit_that_stays_has_no_direction():
    one, two = adapter(0), adapter(1)
    assert np.isnan(distance.delta_w_cosine(one, two, one))
    assert distance.delta_w_cosine(two, two, one) == pytest.approx(1)


def test_flat_names_with_their_layer():
    """Paths of pixel_jax: one dictionary whose names end in lora_a and lora_b."""
    tree = adapter(0)
    flat = {f"layers.{k}.lora_{x}": tree[k][f"lora_{x}"] for k in "qv" for x in "ab"} | {"bias": tree["bias"]}
    assert delta_w_norm(flat) == pytest.approx(np.linalg.norm(dense(tree)))


def test_other_names():
    tree = {"down": np.ones((2, 3)), "up": np.ones((4, 2))}
    assert delta_w_norm(tree, a="down", b="up") == pytest.approx(2 * np.sqrt(12))
    with pytest.raises(ValueError, match="no leaf is called 'lora_a' or 'lora_b'; there are down, up"):
        delta_w_norm(tree)
    assert delta_w_norm(tree, a=None, b=None) == pytest.approx(np.sqrt(14))


def peft(tree, name=""):
    """As `peft.get_peft_model_state_dict` calls it, or with the adapter's name as in a state of the model."""
    base = "base_model.model.model.layers.0.self_attn"
    flat = {f"{base}.{k}_proj.lora_{x.upper()}{name}.weight": tree[k][f"lora_{x}"] for k in "qv" for x in "ab"}
    return flat | {"base_model.model.bias": tree["bias"]}


def of_nnx(tree):
    """The state of flax NNX's own layers, transposed to ours: x @ lora_a @ lora_b."""

    def layer(pair):
        a, b = (pair[name].T for name in ("lora_a", "lora_b"))
        found = nnx.LoRA(a.shape[0], a.shape[1], b.shape[1], rngs=nnx.Rngs(0))
        found.lora_a[...], found.lora_b[...] = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
        return found

    class Model(nnx.Module):
        def __init__(self):
            self.q, self.v = layer(tree["q"]), layer(tree["v"])

    return nnx.state(Model(), nnx.LoRAParam)


@pytest.mark.parametrize("shape", [(6, 5), (5, 5)])
@pytest.mark.parametrize("names", [peft, lambda tree: peft(tree, ".default"), of_nnx])
def test_names_of_peft_and_of_flax(names, shape):
    """The same change in another basis of the rank is at distance 0; square weights do not tell which way round they lie."""
    one, two = (adapter(seed, rows=shape[0], columns=shape[1]) for seed in range(2))
    expected = adapter_only if names is of_nnx else lambda tree: tree
    size = delta_w_norm(expected(one))
    assert delta_w_norm(names(one)) == pytest.approx(size, rel=1e-5)
    assert distance.delta_w_distance(names(one), names(regauge(one, 7))) < 1e-5 * size
    apart = distance.delta_w_distance(expected(one), expected(two))
    assert distance.delta_w_distance(names(one), names(two)) == pytest.approx(apart, rel=1e-5)


def adapter_only(tree):
    return {k: tree[k] for k in "qv"}


def test_embeddings_of_peft():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 30)), rng.normal(size=(8, 2))  # A [r, words], B [width, r]
    tree = {"m.embed_tokens.lora_embedding_A": a, "m.embed_tokens.lora_embedding_B": b}
    assert delta_w_norm(tree) == pytest.approx(np.linalg.norm(b @ a))


def test_what_is_no_plain_low_rank_change_is_refused():
    magnitude = peft(adapter(0)) | {"base_model.model.x.lora_magnitude_vector": np.ones(3)}
    with pytest.raises(ValueError, match="lora_magnitude_vector belongs to an adapter"):
        delta_w_norm(magnitude)
    convolution = {"x.lora_A.weight": np.ones((2, 3, 3, 3)), "x.lora_B.weight": np.ones((4, 2, 1, 1))}
    with pytest.raises(ValueError, match="do not multiply"):
        delta_w_norm(convolution)


def test_scales_by_module():
    """Ranks 2 and 2 under scales of their own, as alpha / r gives them with PEFT's `rank_pattern`."""
    one, two, start = (adapter_only(adapter(seed)) for seed in range(3))
    scales = {"q": 4.0, "v": 0.25}
    scaled = [
        np.concatenate([(scales[k] * tree[k]["lora_b"] @ tree[k]["lora_a"]).ravel() for k in "qv"])
        for tree in (one, two, start)
    ]
    assert distance.delta_w_distance(one, two, scales=scales) == pytest.approx(np.linalg.norm(scaled[0] - scaled[1]))
    moved = [x - scaled[2] for x in scaled[:2]]
    cosine = moved[0] @ moved[1] / np.linalg.norm(moved[0]) / np.linalg.norm(moved[1])
    assert distance.delta_w_cosine(one, two, start, scales=scales) == pytest.approx(cosine)
    assert delta_w_norm(one, scales=2.0) == pytest.approx(2 * delta_w_norm(one))
    base = "base_model.model.model.layers.0.self_attn"
    named = {f"{base}.{k}_proj": scale for k, scale in scales.items()}
    flat = {name: x for name, x in peft(adapter(0)).items() if "lora" in name}
    assert delta_w_norm(flat, scales=named) == pytest.approx(delta_w_norm(one, scales=scales))
    with pytest.raises(ValueError, match="scales are of other modules.*k_proj, v"):
        delta_w_norm(one, scales={"q": 1.0, "k_proj": 1.0})


def test_mismatches_are_named():
    with pytest.raises(ValueError, match="lora_a"):
        delta_w_norm({"lora_a": np.ones((2, 3))})
    with pytest.raises(ValueError, match="lora_b"):
        delta_w_norm({"lora_b": np.ones((2, 3))})
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(4, 3\)"):
        delta_w_norm({"lora_a": np.ones((2, 3)), "lora_b": np.ones((4, 3))})
    with pytest.raises(ValueError, match="bias"):
        distance.delta_w_distance(adapter(0), {k: v for k, v in adapter(0).items() if k != "bias"})
