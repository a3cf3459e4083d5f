"""Decoders with recurrent layers beside attention: what is no token, segments, caches, blocks of layers, names of weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import DELTA, pair, values
from tiny_qwen import relative

import pixel_jax
from pixel_jax.files import FileError
from pixel_jax.models import LanguageModel, config_from_hf
from pixel_jax.models.checkpoint import layer_numbers, named_weights
from pixel_jax.models.decoder import Prefix
from pixel_jax.models.delta_rule import CHUNK
from pixel_jax.models.families import read_config
from pixel_jax.models.flops import forward_flops, padded_work
from pixel_jax.models.lora import add_lora

KINDS = ["linear_attention", "linear_attention", "full_attention"]
LENGTH = 70  # more than a chunk
backbone, step = jax.jit(LanguageModel.backbone), jax.jit(LanguageModel.step)


@pytest.fixture(scope="module")
def model():
    """Two blocks of three layers."""
    config = config_from_hf({"model_type": "qwen3_5_text", **DELTA, "num_hidden_layers": 6, "layer_types": 2 * KINDS})
    model = LanguageModel(config, jax.random.key(0))

    def noise(path, w):
        longer = 3.0 if "A_log" in str(path) else 0.0  # see `tiny_families.torch_model`
        return w + 0.2 * jax.random.normal(jax.random.key(len(str(path))), w.shape) - longer

    return jax.tree_util.tree_map_with_path(noise, model)


@pytest.fixture
def wide(model):
    """The same in float64, in which equal functions do not differ by more than the test can tell."""
    with jax.enable_x64(True):
        yield jax.tree.map(lambda w: w.astype(jnp.float64), model)


def inputs(model, valid, seed=0):
    """Random embeddings [B, T, D] and the positions of the tokens among them."""
    x = jnp.array(np.random.default_rng(seed).standard_normal((*valid.shape, 32)), model.dtype)
    zeros = jnp.zeros(valid.shape, jnp.int32)
    nothing = np.zeros((len(valid), 0, 3), np.int32), np.zeros((len(valid), 0))
    return x, model.positions(zeros, jnp.array(valid), *nothing, jnp.zeros(len(valid), jnp.int32))[0]


def test_what_is_no_token_changes_nothing(wide, rng):
    """Padding on either side and gaps: the tokens have the hidden states of a row without them."""
    valid = rng.random((3, LENGTH)) < 0.7
    valid[1, :5] = False
    valid[2, -9:] = False
    x, positions = inputs(wide, valid)
    got = backbone(wide, x, positions, jnp.array(valid))
    assert jnp.isfinite(got).all()
    for row in range(3):
        own = np.flatnonzero(valid[row])
        alone, there = np.zeros((1, LENGTH), bool), jnp.zeros((1, LENGTH, 32))
        alone[0, : len(own)] = True
        there = there.at[0, : len(own)].set(x[row, own])
        positions_alone = inputs(wide, alone)[1]
        expected = backbone(wide, there, positions_alone, jnp.array(alone))
        assert relative(got[row, own], expected[0, : len(own)]) < 1e-10


def test_segments_do_not_know_each_other(wide):
    """Rows of packed examples, one of which begins at the border of a chunk of tokens, and gaps."""
    segments = np.array([[0, 1, 2]]).repeat([10, 56, 4], axis=1)
    valid = np.ones((1, LENGTH), bool)
    valid[0, [3, 10, 69]] = False
    x, positions = inputs(wide, valid)
    read = jax.jit(lambda *arrays: LanguageModel.backbone(wide, *arrays[:3], segments=arrays[3]))
    got = read(x, positions, jnp.array(valid), jnp.array(segments))
    for number in range(3):
        own = valid & (segments == number)
        assert relative(got[own], backbone(wide, x, positions, jnp.array(own))[own]) < 1e-10


def test_steps_equal_the_full_forward(wide):
    """Layer by layer as block by block; rows of unlike length behind prefixes of unlike length, which two rows share."""
    valid = np.ones((2, 12), bool)
    x, positions = inputs(wide, valid)
    full = backbone(wide, x, positions, jnp.array(valid))
    cuts, ends = np.array([7, 5]), np.array([3, 1, 2, 4])  # tokens of the prefixes, and of the four rows behind them
    before = jnp.arange(7) < cuts[:, None]
    left = np.arange(7) >= 7 - cuts[:, None]  # padded on the left
    at = np.where(left, np.arange(7) - (7 - cuts[:, None]), 0)
    moved = jnp.take_along_axis(x, jnp.array(at)[..., None], axis=1)
    moved_positions = jnp.take_along_axis(positions, jnp.array(at)[None], axis=2)
    for arrays in ((x[:, :7], positions[:, :, :7], before), (moved, moved_positions, jnp.array(left))):
        hidden, cache = jax.jit(LanguageModel.prefill)(wide, *arrays)
        last = [np.flatnonzero(row)[-1] for row in np.asarray(arrays[2])]
        assert relative(hidden[jnp.arange(2), jnp.array(last)], full[jnp.arange(2), cuts - 1]) < 1e-10
        prefix = Prefix.of(cache, 4)
        own = prefix.continued(wide.empty_cache(4, 8))
        layers, of_row = wide.unstack(), np.array([0, 0, 1, 1])
        seen = np.zeros(4, int)
        for width in (2, 1, 1):  # a row without a token in a step stays as it is
            now = np.minimum(width, ends - seen)
            index = np.minimum(cuts[of_row] + seen, 11)[:, None] + np.arange(width)
            index = np.minimum(index, 11)
            here = np.arange(width) < now[:, None]
            tokens = x[of_row[:, None], index]
            places = positions[:, of_row[:, None], index]
            out, after = step(wide, layers, tokens, places, jnp.array(here), own, prefix)
            assert relative(out[here], full[of_row[:, None], index][here]) < 1e-10
            for old, new in zip(own.recurrent, after.recurrent, strict=True):
                for a, b in zip(old, new, strict=True):
                    assert (a[now == 0] == b[now == 0]).all() and (a[now > 0] != b[now > 0]).any()
            own, seen = after, seen + now
        assert (own.length == ends).all()


@pytest.mark.torch
def test_more_than_a_chunk_as_transformers(rng):
    ours, theirs = pair("qwen3_5_text")
    import torch

    ids = rng.integers(0, 50, (1, LENGTH))
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids), use_cache=False).logits.numpy()
    assert relative(pixel_jax.forward(ours, input_ids=ids), expected) < 1e-5


def test_a_split_row_is_refused(model):
    valid = np.ones((1, 4), bool)
    x, positions = inputs(model, valid)
    mesh = jax.sharding.AbstractMesh((1, 1, 2, 1), ("data", "fsdp", "sequence", "tensor"))
    with pytest.raises(ValueError, match="sequence = 2 splits the tokens of a row"):
        model.backbone(x, positions, jnp.array(valid), mesh=mesh)


def test_stacks_know_their_layers(model):
    numbers = {key: list(layer_numbers(model, key, weight)) for _, key, weight in named_weights(model)}
    assert numbers["model.layers.{}.self_attn.q_proj.weight"] == [2, 5]
    assert numbers["model.layers.{}.linear_attn.A_log"] == [0, 1, 3, 4]
    assert numbers["model.layers.{}.mlp.up_proj.weight"] == list(range(6))
    assert numbers["model.norm.weight"] == [0]


def test_sizes(model):
    """Of matrices, of what is kept of a row, and operations, against the arrays and XLA's count of a wide decoder."""
    text = model.config.text
    layers = [w for _, key, w in named_weights(model) if ".layers." in key and "conv1d" not in key and w.ndim == 3]
    assert text.layer_weights == sum(w.size for w in layers)
    cache = model.empty_cache(1, 50)
    assert text.cache_bytes(50, 4) == sum(x.nbytes for x in jax.tree.leaves(cache._replace(length=())))
    sizes = {"hidden_size": 256, "intermediate_size": 512, "linear_key_head_dim": 64, "linear_value_head_dim": 96}
    wide = dataclasses.replace(text, num_hidden_layers=2, layer_types=tuple(KINDS[1:]), **sizes)
    config = dataclasses.replace(model.config, text=wide)
    abstract = jax.eval_shape(lambda key: LanguageModel(config, key), jax.random.key(0))
    rows, length = 2, 256
    like = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    x, positions = like(rows, length, 256), like(3, rows, length, dtype=jnp.int32)
    lowered = backbone.lower(abstract, x, positions, like(rows, length, dtype=bool))
    work = padded_work(rows, length, 0, 0, config)
    expected = forward_flops(config, work._replace(predictions=0))
    # XLA counts the body of the scan over chunks once.
    heads, chunks = wide.linear_num_value_heads, length // CHUNK
    turn = 2 * rows * heads * (3 * CHUNK * 64 * 96 + CHUNK**2 * 96)
    solve = rows * heads * chunks * CHUNK**2 * (64 + 96)  # a call into a library
    counted = lowered.cost_analysis()["flops"] + (chunks - 1) * turn + solve
    assert counted == pytest.approx(expected.layers + expected.attention, rel=0.05)


def test_adapters_keep_their_layers(model, tmp_path):
    """On attention, on recurrent layers and on the MLP of both: PEFT's names have the numbers of the layers."""
    from safetensors.numpy import load_file

    targets = r"model\.layers.*\.(q_proj|in_proj_qkv|in_proj_b|out_proj|up_proj)"
    adapted = add_lora(model, jax.random.key(1), rank=2, alpha=4.0, targets=targets)
    fill = lambda path, w: w + 0.1 if "lora_b" in str(path) else w
    adapted = jax.tree_util.tree_map_with_path(fill, adapted)
    pixel_jax.save_adapter(adapted, tmp_path)
    names = {name.split("layers.")[1] for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert {"5.self_attn.q_proj.lora_A.weight", "4.linear_attn.in_proj_b.lora_B.weight"} <= names
    assert not names & {"1.self_attn.q_proj.lora_A.weight", "5.linear_attn.out_proj.lora_A.weight"}
    again = pixel_jax.load_adapter(model, tmp_path)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(adapted), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["full_attention"] * 3}, "has no layer of the other kind"),
        ({"layer_types": KINDS[1:]}, "layer_types names 2 layers, num_hidden_layers says 3"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types is .* not a list of 'full_attention' and"),
        ({"attn_output_gate": False}, "attn_output_gate false is not supported"),
        ({"linear_num_key_heads": 3}, "linear_num_value_heads 4 is no multiple of linear_num_key_heads 3"),
        ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim is 0"),
        ({"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor is 1.5, not a number from 0 to 1"),
        ({"rope_parameters": {"mrope_section": [1, 1, 1]}}, "must add up to half of the rotated part of a head, 8"),
    ],
)
def test_what_is_not_supported_is_refused(change, message):
    contents = values("qwen3_5")
    contents["text_config"].update(change)
    with pytest.raises(FileError, match=message):
        config_from_hf(contents)


def test_the_dtype_may_stand_in_the_text_config(tmp_path):
    """Files of Qwen3.5 name it there, and mix float32 into bfloat16."""
    contents = values("qwen3_5")
    contents["text_config"]["dtype"] = "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(contents))
    assert read_config(tmp_path)[1] == "bfloat16"


@pytest.mark.parametrize("width", [1, 4])
def test_bfloat16(model, width):
    """What is kept has one type from step to step, as a loop needs it; the state is float32."""
    small = jax.tree.map(lambda w: w.astype(jnp.bfloat16), model)
    valid = np.ones((1, width), bool)
    x, positions = inputs(small, valid)
    cache = small.empty_cache(1, width)
    kinds = lambda cache: jax.tree.map(lambda y: (y.shape, y.dtype), cache)
    _, prefilled = jax.eval_shape(lambda: small.prefill(x, positions, jnp.array(valid)))
    out, after = jax.eval_shape(lambda: small.step(small.unstack(), x, positions, jnp.array(valid), cache))
    assert out.dtype == jnp.bfloat16 and cache.recurrent[0].memory.dtype == jnp.float32
    assert kinds(after) == kinds(prefilled) == kinds(cache)


def test_hessian_vector_product(wide):
    """Forward mode over the gradient of a whole decoder with rematerialised layers, against finite differences in float64."""
    valid = np.array([[False, True, True, True, False, True]])
    x, positions = inputs(wide, valid)
    tangent = jax.tree.map(lambda w: jax.random.normal(jax.random.key(w.size), w.shape, w.dtype), wide)
    read = lambda m: m.backbone(x, positions, jnp.array(valid), remat=True)[0, jnp.array([1, 2, 3, 5])]
    gradient = jax.jit(jax.grad(lambda m: jnp.sum(jnp.sin(read(m)))))
    moved = lambda step: jax.tree.map(lambda w, t: w + step * t, wide, tangent)
    _, product = jax.jit(lambda m, t: jax.jvp(gradient, (m,), (t,)))(wide, tangent)
    above, below = gradient(moved(1e-6)), gradient(moved(-1e-6))
    for ours, a, b in zip(*map(jax.tree.leaves, (product, above, below)), strict=True):
        expected = (a - b) / 2e-6
        np.testing.assert_allclose(ours, expected, atol=1e-5 * max(float(jnp.abs(expected).max()), 1e-3))


def test_weights_that_predict_further_tokens_are_passed_over(model, tmp_path, caplog):
    from safetensors.numpy import load_file, save_file

    pixel_jax.save_pretrained(model, None, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "mtp.norm.weight": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    with caplog.at_level("WARNING", logger="absl"):
        again, _ = pixel_jax.from_pretrained(tmp_path)
    assert "1 tensors that this network has no use for are not read: mtp.norm.weight" in caplog.text
    assert again.config == model.config
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True))
