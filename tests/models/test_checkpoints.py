"""Hugging Face directories: read in every layout, written so that transformers reads them, wrong ones refused by name."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_qwen import IMAGE, relative, tiny_config, torch_model

import pixel_jax
from pixel_jax.files import FileError
from pixel_jax.models import LanguageModel, Qwen2_5_VLConfig, TextConfig, VisionConfig, checkpoint
from pixel_jax.models.lora import add_lora
from pixel_jax.models.released import released
from pixel_jax.parallel.mesh import make_mesh
from pixel_jax.parallel.sharding import shardings

IDS = np.array([[1, 5, 7, 9, 2]])


@pytest.fixture
def directory(model, tmp_path):
    """A model directory of ours."""
    pixel_jax.save_pretrained(model, None, tmp_path)
    return tmp_path


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and (np.asarray(x) == np.asarray(y)).all() for x, y in pairs)


def test_round_trip_is_exact(model, directory):
    again, processor = pixel_jax.from_pretrained(directory)
    assert processor is None
    assert again.config == model.config
    assert same(again, model)
    assert "lm_head.weight" in load_file(directory / "model.safetensors")


@pytest.mark.torch
@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back(tmp_path, rng, tied):
    """transformers -> ours -> transformers: the same keys it had at release, the same logits, images included."""
    import torch
    import transformers

    theirs = torch_model(tiny_config(tied))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = pixel_jax.from_pretrained(tmp_path / "theirs")
    pixel_jax.save_pretrained(ours, None, tmp_path / "ours")
    keys = set(load_file(tmp_path / "ours" / "model.safetensors"))
    assert {"visual.merger.mlp.2.weight", "model.layers.2.mlp.up_proj.weight", "model.embed_tokens.weight"} <= keys
    assert ("lm_head.weight" in keys) != tied
    back, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = np.array([[1, *[IMAGE] * 6, 2, 3]])
    arrays = {
        "input_ids": ids,
        "pixel_values": rng.standard_normal((24, 1176), dtype=np.float32),
        "image_grid_thw": np.array([[1, 4, 6]]),
    }
    with torch.no_grad():
        first, second = (
            m(**{k: torch.tensor(v) for k, v in arrays.items()}, mm_token_type_ids=torch.tensor(ids == IMAGE).long())
            for m in (theirs, back)
        )
    assert torch.equal(first.logits, second.logits)
    assert relative(pixel_jax.forward(ours, **arrays), second.logits) < 1e-5


@pytest.mark.parametrize("nested", [False, True])
def test_both_spellings_of_keys_and_both_layouts_of_config(model, directory, nested):
    if nested:
        values = json.loads((directory / "config.json").read_text())
        text = {name: values.pop(name) for name in list(values) if name in TEXT_FIELDS}
        rope = values.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta"), "rope_type": "default"}
        values["text_config"] = text | {"rope_parameters": rope, "model_type": "qwen2_5_vl_text"}
        (directory / "config.json").write_text(json.dumps(values))
    newer = {}
    for key, value in load_file(directory / "model.safetensors").items():
        if key.startswith("model."):
            key = key.replace("model.", "model.language_model.", 1)
        elif key.startswith("visual."):
            key = "model." + key
        newer[key] = value
    save_file(newer, directory / "model.safetensors")
    again, _ = pixel_jax.from_pretrained(directory)
    assert again.config == model.config
    assert same(again, model)


TEXT_FIELDS = set(tiny_config().to_hf()) & set(tiny_config().text.__dataclass_fields__) - {"rope_scaling"}


# The fields of the released 7B configuration, as they stand in its config.json.
RELEASED_7B = {
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "vision_start_token_id": 151652,
    "vision_end_token_id": 151653, "vision_token_id": 151654, "image_token_id": 151655, "video_token_id": 151656,
    "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 128000, "max_window_layers": 28, "model_type": "qwen2_5_vl",
    "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_sliding_window": False, "vocab_size": 152064,
    "vision_config": {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "in_chans": 3, "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2,
        "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2, "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}  # fmt: skip


def test_released_config():
    config = Qwen2_5_VLConfig.from_hf(RELEASED_7B)
    assert config.text.head_dim == 128 and config.vision.head_dim == 80 and config.vision.tokens_per_second == 2
    assert Qwen2_5_VLConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    abstract = jax.eval_shape(lambda key: LanguageModel(config, key), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == 8_292_166_656  # as published


def test_a_missing_field_has_the_default_of_transformers():
    """Of the installed release. (`test_old_transformers.py` compares with older ones.)"""
    import transformers

    theirs = transformers.Qwen2_5_VLConfig()
    text = {**theirs.text_config.to_dict(), **theirs.text_config.rope_parameters}
    vision, own = theirs.vision_config.to_dict(), theirs.to_dict()
    # A text that has no sections does not run in transformers up to 4.57; 5 writes the ids of its tokens always.
    except_for = {"mrope_section", "bos_token_id", "eos_token_id"}
    for ours, values in ((TextConfig(), text), (VisionConfig(), vision)):
        for spec in dataclasses.fields(ours):
            if spec.name not in except_for and "read" in spec.metadata:
                value = values[spec.name]
                assert getattr(ours, spec.name) == (tuple(value) if isinstance(value, list) else value), spec.name
    config = Qwen2_5_VLConfig.from_hf({"model_type": "qwen2_5_vl", "vision_config": {"out_hidden_size": 8192}})
    assert config.text == TextConfig() and config.vision == VisionConfig(out_hidden_size=8192)
    for spec in dataclasses.fields(config)[2:]:
        assert getattr(config, spec.name) == own[spec.name]


def test_configuration_saved_by_transformers_4_49():
    """It leaves out what equals the class's default: of the vision tower five fields are left."""
    saved = json.loads((pathlib.Path(__file__).parent / "config_saved_by_4_49.json").read_text())
    assert set(saved["vision_config"]) == {
        "hidden_size",
        "in_chans",
        "model_type",
        "spatial_patch_size",
        "tokens_per_second",
    }
    assert Qwen2_5_VLConfig.from_hf(saved) == Qwen2_5_VLConfig.from_hf(RELEASED_7B) == released("qwen2.5-vl-7b")


def test_shards(model, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", 200_000)
    pixel_jax.save_pretrained(model, None, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) == 3
    assert max((tmp_path / name).stat().st_size for name in files) < 205_000
    again, _ = pixel_jax.from_pretrained(tmp_path)
    assert same(again, model)


def test_dtypes(model, directory):
    """Converted on the way in; bfloat16 files are read as they are."""
    half, _ = pixel_jax.from_pretrained(directory, dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(half))
    pixel_jax.save_pretrained(half, None, directory)
    assert json.loads((directory / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again, _ = pixel_jax.from_pretrained(directory)
    assert same(again, half)


def test_onto_a_mesh(model, directory):
    """Every weight lands where its axes say, and the logits stay the same."""
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, jax.devices()[:4])
    spread, _ = pixel_jax.from_pretrained(directory, mesh=mesh)
    for leaf, place in zip(jax.tree.leaves(spread), jax.tree.leaves(shardings(model, mesh)), strict=True):
        assert leaf.sharding == place
    weight = spread.language_model.layers.mlp.up_proj.weight[...]
    assert weight.addressable_shards[0].data.shape == (3, 24, 16)
    assert same(spread, model)
    assert relative(pixel_jax.forward(spread, input_ids=IDS), pixel_jax.forward(model, input_ids=IDS)) < 1e-5


def edit_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop(NORM), f"1 missing tensors: {NORM}"),
    (lambda t: t.update(extra=np.zeros(2, np.float32)), "1 tensors that this model does not use: extra"),
    (lambda t: t.update({NORM: np.zeros(31, np.float32)}), rf"'{NORM}' .* shape \(31,\), expected \(32,\)"),
    (lambda t: t.update({NORM: np.zeros(32, np.int32)}), f"'{NORM}' .* dtype I32"),
])  # fmt: skip
def test_wrong_tensors(directory, change, message):
    edit_tensors(directory, change)
    with pytest.raises(ValueError, match=message):
        pixel_jax.from_pretrained(directory)


def test_truncated_file(directory):
    path = directory / "model.safetensors"
    for keep in (path.stat().st_size - 100, 1000, 4):
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(
            ValueError, match="model.safetensors: truncated or damaged: .*; copy or download the file again"
        ):
            pixel_jax.from_pretrained(directory)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123\n")
    with pytest.raises(ValueError, match="model.safetensors is a pointer of Git LFS, .* `git lfs pull`"):
        pixel_jax.from_pretrained(directory)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_index_pointing_outside(directory, name):
    index = index_alone(directory)
    index.write_text(json.dumps({"weight_map": {NORM: name}}))
    with pytest.raises(ValueError, match=f"points outside the directory: '{name}'"):
        pixel_jax.from_pretrained(directory)


def index_alone(directory):
    """The weights under a name that only an index can give; the place of that index."""
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    return directory / "model.safetensors.index.json"


def test_wrong_index(directory):
    index = index_alone(directory)
    index.write_text(json.dumps({"weight_map": {NORM: "other.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="names 'other.safetensors', which does not exist: copy"):
        pixel_jax.from_pretrained(directory)
    index.write_text(json.dumps({"weight_map": {"ghost": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(ValueError, match="holds tensor 'ghost', which it does not"):
        pixel_jax.from_pretrained(directory)
    for content, message in (
        ("{", "index.json is not JSON"),
        ('{"weight_map": {"a": 1}}', "no readable index"),
        ("[]", "no"),
    ):
        index.write_text(content)
        with pytest.raises(FileError, match=message):
            pixel_jax.from_pretrained(directory)


def test_nothing_there(tmp_path, directory):
    with pytest.raises(FileNotFoundError, match="has no config.json. There is nothing at"):
        pixel_jax.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no config.json. It is a file: give the directory that it is in"):
        pixel_jax.from_pretrained(directory / "model.safetensors")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "config.json").touch()
    with pytest.raises(FileNotFoundError, match="has no config.json. It holds one: .*runs/a$"):
        pixel_jax.from_pretrained(tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no config.json: give a directory with one"):
        pixel_jax.from_pretrained(tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").touch()
    with pytest.raises(
        FileNotFoundError, match="has no config.json, which belongs beside its weights: copy or download it"
    ):
        pixel_jax.from_pretrained(tmp_path / "empty")
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds neither model.safetensors nor .*: copy or download them, too"):
        pixel_jax.from_pretrained(directory)
    (directory / "pytorch_model.bin").touch()
    with pytest.raises(
        FileNotFoundError, match="pytorch_model.bin is a pickle, which is never read; .* save_pretrained"
    ):
        pixel_jax.from_pretrained(directory)
    (directory / "config.json").write_text("not json")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        pixel_jax.from_pretrained(directory)


@pytest.mark.parametrize("change, message", [
    (lambda c: c.pop("hidden_size"), "must add up to half of the head dim 2048"),
    (lambda c: c.update(vision_config=[]), r"vision_config is \[\], not an object"),
    (lambda c: c.update(rope_scaling=[1]), r"rope_scaling is \[1\], not an object"),
    (lambda c: c.update(num_attention_heads=0), "num_attention_heads is 0, not a whole number from 1"),
    (lambda c: c.update(num_hidden_layers=-1), "num_hidden_layers is -1, not a whole number"),
    (lambda c: c.update(num_hidden_layers="2"), "num_hidden_layers is '2', not a whole number"),
    (lambda c: c.update(num_hidden_layers=2.5), "num_hidden_layers is 2.5, not a whole number"),
    (lambda c: c.update(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, not .* to 1000"),
    (lambda c: c.update(num_hidden_layers=True), "num_hidden_layers is True"),
    (lambda c: c["vision_config"].update(patch_size=0), "vision_config.patch_size is 0"),
    (lambda c: c.update(rms_norm_eps=float("nan")), "rms_norm_eps is nan, not a positive number"),
    (lambda c: c.update(rope_theta=0), "rope_theta is 0, not a positive number"),
    (lambda c: c.update(rope_theta=float("inf")), "rope_theta is inf, not a positive number"),
    (lambda c: c.update(image_token_id=None), "image_token_id is None"),
    (lambda c: c.update(eos_token_id=["</s>"]), "eos_token_id is '</s>'"),
    (lambda c: c.update(tie_word_embeddings="no"), "tie_word_embeddings is 'no', not true or false"),
    (lambda c: c.update(head_dim=16), "head_dim 16 is not supported, only 8"),
    (lambda c: c.update(layer_types=["full_attention", "sliding_attention"]), "layer_types 'sliding_attention' is not"),
    (lambda c: c["vision_config"].update(rope_parameters={"rope_theta": 5e5}), "rope_theta 500000.0 is not supported"),
    (lambda c: c.update(model_type="llama"), "model_type is 'llama', expected 'qwen2_5_vl'"),
    (lambda c: c.update(rope_scaling={"type": "yarn"}), "rope type 'yarn' is not supported"),
    (lambda c: c.update(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
    (lambda c: c.update(use_sliding_window=True), "use_sliding_window True is not supported"),
    (lambda c: c.update(num_key_value_heads=3), "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
    (lambda c: c["rope_scaling"].update(mrope_section=[1, 1, 1]), r"mrope_section \(1, 1, 1\) must add up"),
    (lambda c: c["vision_config"].update(out_hidden_size=8), "out_hidden_size 8 differs from .* 32"),
])  # fmt: skip
def test_wrong_config(change, message):
    values = json.loads(json.dumps(tiny_config().to_hf()))
    change(values)
    with pytest.raises(FileError, match=f"config.json: .*{message}"):
        Qwen2_5_VLConfig.from_hf(values)


def test_head_in_the_file_of_a_tied_model(tmp_path):
    """Accepted if it is the embedding, refused if it is not."""
    tied = jax.jit(LanguageModel, static_argnums=0)(tiny_config(tied=True), jax.random.key(0))
    pixel_jax.save_pretrained(tied, None, tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": embedding}))
    again, _ = pixel_jax.from_pretrained(tmp_path)
    assert same(again, tied)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(ValueError, match="tie_word_embeddings, but lm_head.weight differs"):
        pixel_jax.from_pretrained(tmp_path)


def test_adapters_are_not_dropped_silently(model, tmp_path):
    adapted = add_lora(model, jax.random.key(0), rank=1, alpha=1, targets="lm_head")
    with pytest.raises(ValueError, match="lm_head.lora_a: merge the adapter"):
        pixel_jax.save_pretrained(adapted, None, tmp_path)
