"""Adapters as PEFT writes and reads them: the same logits on both sides, whatever the ranks and scales are."""

import importlib.util
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_families
from safetensors.numpy import load_file, save_file
from tiny_qwen import relative

import pixel_jax
from pixel_jax.files import FileError
from pixel_jax.models.layers import LoRAWeight
from pixel_jax.models.lora import add_lora, linears, merge_lora, split, unmerge_lora
from pixel_jax.models.peft import CONFIG, PREFIX, WEIGHTS
from pixel_jax.parallel.mesh import make_mesh
from tests.models.test_lora import trained

IDS = np.array([[1, 5, 7, 9, 2, 33, 12]])
TEXT = r"model\.layers\.\{\}\.(self_attn\.(q|v)_proj|mlp\.down_proj)|visual\.blocks\.\{\}\.attn\.qkv|lm_head"
missing = [name for name in ("peft", "accelerate") if importlib.util.find_spec(name) is None]
needs_peft = pytest.mark.skipif(bool(missing), reason="pip install peft accelerate")


def logits(model, ids=IDS):
    return pixel_jax.forward(model, input_ids=ids)


def same(ours, others):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(others), strict=True)
    return all(x.dtype == y.dtype and (np.asarray(x) == np.asarray(y)).all() for x, y in pairs)


def adapted(model, rank=2, alpha=6.0, targets=TEXT):
    return trained(add_lora(model, jax.random.key(0), rank=rank, alpha=alpha, targets=targets))


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    """An adapter of ours."""
    path = tmp_path_factory.mktemp("adapter") / "a"
    pixel_jax.save_adapter(adapted(model), path, base="some/model")
    return path


@pytest.fixture
def copy(directory, tmp_path):
    """The same, to be damaged."""
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    return tmp_path


def edit(path, **fields):
    values = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**values, **fields}))


def edit_tensors(path, change):
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


def test_round_trip_is_exact(model, directory):
    again = pixel_jax.load_adapter(model, directory)
    assert same(again, adapted(model)) and relative(logits(again), logits(model)) > 1e-2
    config = json.loads((directory / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "some/model" and config["r"] == 2 and config["lora_alpha"] == 6
    # "v_proj" is of the decoder alone; "down_proj" is of the vision tower, too, and means its layers only by whole names
    named = [f"model.language_model.layers.{i}.mlp.down_proj" for i in range(3)]
    assert config["target_modules"] == sorted(["lm_head", "q_proj", "qkv", "v_proj", *named])


def test_other_types(model, tmp_path):
    pixel_jax.save_adapter(adapted(model), tmp_path, dtype=jnp.bfloat16)
    assert {str(x.dtype) for x in load_file(tmp_path / WEIGHTS).values()} == {"bfloat16"}
    again = pixel_jax.load_adapter(model, tmp_path)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), split(adapted(model), LoRAWeight)[0])
    assert same(split(again, LoRAWeight)[0], rounded)


def test_onto_a_mesh_with_the_model(model, directory, tmp_path):
    pixel_jax.save_pretrained(model, None, tmp_path)
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, jax.devices()[:4])
    spread, _ = pixel_jax.from_pretrained(tmp_path, mesh=mesh, adapter=directory)
    assert same(spread, adapted(model))
    b = spread.language_model.layers.self_attn.q_proj.lora_b[...]
    assert b.shape == (3, 32, 2) and b.addressable_shards[0].data.shape == (3, 16, 2)
    pixel_jax.save_adapter(spread, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (directory / WEIGHTS).read_bytes()


def test_merging_and_unmerging(model, directory, tmp_path):
    """The merged directory and the adapter beside it give back the model of the run."""
    of_run = adapted(model)
    pixel_jax.save_pretrained(merge_lora(of_run), None, tmp_path)
    again = unmerge_lora(pixel_jax.from_pretrained(tmp_path, adapter=directory)[0])
    assert relative(logits(again), logits(of_run)) < 1e-5
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(of_run), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    assert relative(logits(pixel_jax.from_pretrained(tmp_path, adapter=directory)[0]), logits(of_run)) > 1e-2


def test_layers_without_an_adapter_and_of_other_ranks(model, tmp_path):
    """They are filled up with zeros here, and are not in the file."""
    whole = adapted(model, rank=3, targets=r"model.*q_proj")
    q = whole.language_model.layers.self_attn.q_proj
    q.lora_a[...] = q.lora_a[...].at[0].set(0).at[2, 1:].set(0)
    q.lora_b[...] = q.lora_b[...].at[0].set(0).at[2, :, 1:].set(0)
    pixel_jax.save_adapter(whole, tmp_path)
    name = "model.language_model.layers.{}.self_attn.q_proj"
    shapes = {key.removeprefix(PREFIX): x.shape for key, x in load_file(tmp_path / WEIGHTS).items() if "lora_A" in key}
    assert shapes == {f"{name.format(1)}.lora_A.weight": (3, 32), f"{name.format(2)}.lora_A.weight": (1, 32)}
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == [name.format(1), name.format(2)]
    assert {config["r"], *config["rank_pattern"].values()} == {1, 3}
    assert same(pixel_jax.load_adapter(model, tmp_path), whole)


def test_released_names_are_read(model, directory, copy):
    """Those of transformers before 4.52."""
    old = lambda key: key.replace("model.model.language_model.", "model.model.").replace(
        "model.model.visual", "model.visual"
    )
    edit_tensors(copy, lambda tensors: [tensors.update({old(key): tensors.pop(key)}) for key in list(tensors)])
    names = [x.replace("language_model.", "") for x in json.loads((copy / CONFIG).read_text())["target_modules"]]
    edit(copy, target_modules=names)
    assert same(pixel_jax.load_adapter(model, copy), adapted(model))


Q = f"{PREFIX}model.language_model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop(Q), r"1 missing tensors: model.language_model.layers.1.self_attn.q_proj.lora_A"),
    (lambda t: t.clear(), "missing tensors"),
    (lambda t: t.update({Q: np.zeros((2, 31), np.float32)}), r"q_proj.lora_A.* has shape \(2, 31\), expected \(2, 32\)"),
    (lambda t: t.update({Q: np.zeros((3, 32), np.float32)}), r"q_proj.lora_A.* has shape \(3, 32\), expected \(2, 32\)"),
    (lambda t: t.update({Q: np.full((2, 32), np.nan, np.float32)}), "q_proj.lora_A.* holds NaN"),
    (lambda t: t.update({Q: np.zeros((2, 32), np.int32)}), "dtype I32"),
    (lambda t: t.update({Q.replace("q_proj", "o_proj"): t[Q]}), "o_proj.* not among the target_modules"),
    (lambda t: t.update({Q.replace("layers.1", "layers.7"): t[Q]}), "no linear layer of this model: .* made for 'some/model'"),
    (lambda t: t.update({Q.replace("language_model.", ""): t[Q]}), "twice, in two spellings"),
    (lambda t: t.update({Q.replace("lora_A.weight", "lora_magnitude_vector"): t[Q]}), "lora_magnitude.*DoRA.*merge it"),
    (lambda t: t.update({Q.replace("A.weight", "B.bias"): t[Q]}), "B.bias.*lora_bias: merge"),
    (lambda t: t.update({f"{PREFIX}lm_head.base_layer.weight": np.zeros((64, 32), np.float32)}), "another than the model's"),
])  # fmt: skip
def test_tensors_that_are_refused(model, copy, change, message):
    edit_tensors(copy, change)
    with pytest.raises(FileError, match=message):
        pixel_jax.load_adapter(model, copy)


@pytest.mark.parametrize(("fields", "message"), [
    ({"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA' is supported: merge it"),
    ({"use_dora": True}, "use_dora is True, which is not supported: DoRA; merge it"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is .'lm_head'.*trains whole modules"),
    ({"bias": "lora_only"}, "bias is 'lora_only', only 'none'"),
    ({"lora_bias": True}, "lora_bias is True"),
    ({"a_later_kind": {"x": 1}}, "a_later_kind is .* not supported"),
    ({"init_lora_weights": "pissa"}, "'pissa', which changes the base weights"),
    ({"target_modules": None}, "target_modules is None, neither"),
    ({"target_modules": "("}, "pattern '.' is no regular expression"),
    ({"exclude_modules": r"(\w|\w\w|\.)*[A-Z]"}, "takes more than 1 s"),
    ({"alpha_pattern": {r"(\w|\w\w|\.)*[A-Z]": 1}}, "takes more than 1 s"),
    ({"r": 0}, "r is 0, not a whole number from 1"),
    ({"r": 3}, r"has shape \(2, .* expected \(3, "),
    ({"rank_pattern": {"q_proj": "2"}}, "rank_pattern is '2'"),
    ({"rank_pattern": []}, None),
    ({"alpha_pattern": 3}, "alpha_pattern is 3, not an object"),
    ({"lora_alpha": "x"}, "lora_alpha is 'x', not a number"),
    ({"use_rslora": 1}, "use_rslora is 1, not true"),
    ({"layers_to_transform": [0, 1]}, "not among the target_modules"),
    ({"exclude_modules": ["qkv"]}, "qkv.* not among the target_modules"),
])  # fmt: skip
def test_configurations_that_are_refused(model, copy, fields, message):
    edit(copy, **fields)
    if message is None:
        assert same(pixel_jax.load_adapter(model, copy), adapted(model))
        return
    with pytest.raises(FileError, match=message):
        pixel_jax.load_adapter(model, copy)


def test_no_adapter_there(model, directory, copy):
    with pytest.raises(
        FileNotFoundError, match="is no adapter of PEFT: it has no adapter_config.json. There is nothing at"
    ):
        pixel_jax.load_adapter(model, copy / "nowhere")
    with pytest.raises(FileNotFoundError, match="is no adapter of PEFT: it has no adapter_config.json$"):
        pixel_jax.load_adapter(model, directory.parent)
    run = copy / "model" / "adapter"
    run.mkdir(parents=True)
    (run / CONFIG).touch()
    with pytest.raises(FileNotFoundError, match=f"has no adapter_config.json. It holds one: {run}"):
        pixel_jax.load_adapter(model, run.parent)
    (copy / WEIGHTS).rename(copy / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="a pickle, which is never read"):
        pixel_jax.load_adapter(model, copy)
    with pytest.raises(ValueError, match="the model has no adapter to save"):
        pixel_jax.save_adapter(model, copy)
    with pytest.raises(ValueError, match="has an adapter already, on .*: merge it first"):
        pixel_jax.load_adapter(adapted(model), directory)


def test_on_the_merged_model_it_is_said(model, directory, copy, tmp_path, capsys):
    for name in ("base", "merged"):
        pixel_jax.save_pretrained(model, None, tmp_path / name)
    edit(copy, base_model_name_or_path=str(tmp_path / "base"), lora_dropout=0.1)
    pixel_jax.from_pretrained(tmp_path / "base", adapter=copy)
    said = capsys.readouterr().err
    assert "belongs to" not in said and "lora_dropout is 0.1: there is no dropout here" in said
    pixel_jax.from_pretrained(tmp_path / "merged", adapter=copy)
    assert f"belongs to the model {tmp_path / 'base'}, and is put on {tmp_path / 'merged'}" in capsys.readouterr().err


CONFIGS = {
    "list": {"target_modules": ["q_proj", "v_proj", "qkv"], "r": 4, "lora_alpha": 6},
    "regex": {"target_modules": r".*layers\.\d+\.self_attn\.[qk]_proj", "r": 3, "lora_alpha": 5},
    "patterns": {
        "target_modules": ["q_proj", "up_proj", "lm_head"],
        "r": 4,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, r".*visual.*up_proj": 6},
        "alpha_pattern": {r"layers\.[02]\.mlp\.up_proj": 3, "lm_head": 16},
    },
    "rslora": {"target_modules": ["o_proj", "down_proj"], "r": 5, "use_rslora": True, "rank_pattern": {"down_proj": 2}},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "all linear": {"target_modules": "all-linear", "exclude_modules": ["lm_head"], "r": 1},
    "bfloat16": {"target_modules": ["k_proj"], "r": 8},
}


@pytest.mark.torch
@needs_peft
@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_peft(kind, pair, tmp_path):
    """Theirs read by us, ours read by them."""
    import copy

    import peft
    import torch

    ours, theirs = pair
    run = lambda model: model(input_ids=torch.tensor(IDS)).logits.numpy()
    with torch.no_grad():
        plain = run(theirs)
        wrapped = peft.get_peft_model(copy.deepcopy(theirs), peft.LoraConfig(**CONFIGS[kind]))
        generator = torch.Generator().manual_seed(0)
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
        if kind == "bfloat16":
            for name, weight in wrapped.named_parameters():
                if "lora_" in name:
                    weight.data = weight.data.bfloat16()
        wrapped.save_pretrained(tmp_path / "theirs")
        expected = run(wrapped.float().eval())
        found = pixel_jax.load_adapter(ours, tmp_path / "theirs")
        stored = {str(x.dtype) for x in load_file(tmp_path / "theirs" / WEIGHTS).values()}
        assert stored == {kind if kind == "bfloat16" else "float32"}
        assert relative(expected, plain) > 1e-2 and relative(logits(found), expected) < 1e-5
        pixel_jax.save_adapter(found, tmp_path / "ours")
        back = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "ours")
        count = lambda model: sum("lora_A" in name for name, _ in model.named_parameters())
        assert count(back) == count(wrapped)
        assert relative(run(back), expected) < 1e-6
        assert relative(run(back.merge_and_unload()), logits(merge_lora(found))) < 1e-5


@pytest.mark.torch
@needs_peft
@pytest.mark.parametrize(
    "fields", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["up_proj"]}, {"lora_bias": True}]
)
def test_what_peft_can_and_we_cannot_is_refused(fields, pair, tmp_path):
    import copy

    import peft

    ours, theirs = pair
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, **fields)
    peft.get_peft_model(copy.deepcopy(theirs), config).save_pretrained(tmp_path)
    with pytest.raises(FileError, match=f"{next(iter(fields))} is .* not supported|only 'none' is supported"):
        pixel_jax.load_adapter(ours, tmp_path)


@pytest.mark.torch
@needs_peft
@pytest.mark.parametrize("family", tiny_families.parameters(tiny_families.VALUES))
def test_every_linear_layer_of_every_family(family, tmp_path):
    """PEFT finds all of them under our names, and leaves none without factors."""
    import copy

    import peft
    import torch

    ours, theirs = tiny_families.pair(family)
    whole = adapted(ours, rank=2, targets=".*")
    pixel_jax.save_adapter(whole, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of missing or unknown tensors
        back = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path)
    with torch.no_grad():
        found = back(input_ids=torch.tensor(IDS)).logits.numpy()
    assert relative(logits(whole), found) < 1e-5 and relative(logits(ours), found) > 1e-2
    tensors = sum("lora_" in name for name, _ in back.named_parameters())
    assert tensors == len(load_file(tmp_path / WEIGHTS))
    layers = sum(isinstance(x, torch.nn.Linear) for name, x in back.named_modules() if name.endswith("base_layer"))
    tied = ours.config.tie_word_embeddings
    assert layers == sum(isinstance(x, torch.nn.Linear) for x in theirs.modules()) - tied


def test_every_linear_layer_has_a_name_of_its_own(model, tmp_path):
    """As many tensors as factors; nothing collides."""
    whole = adapted(model, rank=1, targets=".*")
    pixel_jax.save_adapter(whole, tmp_path)
    count = sum(linear.weight.shape[0] if linear.weight.ndim == 3 else 1 for _, linear in linears(whole))
    assert len(load_file(tmp_path / WEIGHTS)) == 2 * count
    assert same(pixel_jax.load_adapter(model, tmp_path), whole)
