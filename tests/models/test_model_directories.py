"""Model directories as strangers leave them and as a crash leaves them: read as transformers reads them, or refused by name."""

import copy
import json
import logging
import os
import pathlib
import shutil
import stat

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny_qwen import tiny_config

import pixel_jax
from pixel_jax.config import ConfigError
from pixel_jax.files import FileError
from pixel_jax.models import Qwen2_5_VLConfig, checkpoint, io
from pixel_jax.models.processor import Processor
from pixel_jax.models.tensors import is_finite
from pixel_jax.rollouts.limits import read_limits
from tests.models.test_checkpoints import same
from tests.rollouts import scripted_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def other(model):
    """Another model of the same shapes."""
    return jax.tree.map(lambda w: w + 1, model)


def save(model, directory, monkeypatch, *, shards):
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", 200_000 if shards else 2**40)
    pixel_jax.save_pretrained(model, None, directory)


KINDS = [(before, after) for before in (False, True) for after in (False, True)]


@pytest.mark.parametrize("before, after", KINDS)
def test_the_last_save_is_what_is_read(model, other, tmp_path, monkeypatch, before, after):
    """Whether it has shards or not, and whether what lay there had; nothing of that is left, and nothing else is touched."""
    save(model, tmp_path, monkeypatch, shards=before)
    (tmp_path / "rollout.json").write_text("{}")
    save(other, tmp_path, monkeypatch, shards=after)
    assert same(pixel_jax.from_pretrained(tmp_path)[0], other)
    names = {path.name for path in tmp_path.iterdir()}
    weights = {f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)} | {INDEX} if after else {SINGLE}
    assert names == weights | {"config.json", "rollout.json"}
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {stat.S_IMODE((tmp_path / "rollout.json").stat().st_mode)}


@pytest.mark.torch
def test_transformers_reads_the_last_save(model, other, tmp_path, monkeypatch):
    import transformers

    save(model, tmp_path, monkeypatch, shards=True)
    save(other, tmp_path, monkeypatch, shards=False)
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path)
    wanted = np.asarray(other.language_model.norm.weight[...])
    assert (theirs.model.language_model.norm.weight.detach().numpy() == wanted).all()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("before, after", KINDS)
def test_a_save_that_is_cut_short(model, other, tmp_path, monkeypatch, before, after):
    """Killed before any of the calls that change the disk: the old model whole, the new one whole, or none; then it is saved
    again."""
    save(model, tmp_path / "old", monkeypatch, shards=before)
    found = []
    for last in range(60):
        directory = tmp_path / str(last)
        shutil.copytree(tmp_path / "old", directory)
        done = 0

        def killed(original, last=last):
            def call(*arguments, **more):
                nonlocal done
                done += 1
                if done > last:
                    raise Killed
                return original(*arguments, **more)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save_file", killed(save_file))
            patch.setattr(io, "settle", killed(io.settle))
            patch.setattr(io, "sync_directory", killed(io.sync_directory))
            patch.setattr(os, "replace", killed(os.replace))
            patch.setattr(pathlib.Path, "unlink", killed(pathlib.Path.unlink))
            try:
                save(other, directory, patch, shards=after)
                break
            except Killed:
                pass
        try:
            read = pixel_jax.from_pretrained(directory)[0]
        except FileNotFoundError as error:
            assert "cut short (.saving): save it again" in str(error)
            found.append("none")
        else:
            assert same(read, model) or same(read, other)
            found.append("old" if same(read, model) else "new")
        if found[-2:] == ["none"] * 2 and "again" not in found:
            found.append("again")
            save(other, directory, monkeypatch, shards=after)
            assert same(pixel_jax.from_pretrained(directory)[0], other) and not (directory / ".saving").exists()
    assert sorted(set(found)) == ["again", "new", "none", "old"]


def test_one_file_is_read_whatever_an_index_beside_it_says(model, tmp_path, monkeypatch, caplog):
    """What transformers leaves behind when it saves a small model over a large one."""
    save(model, tmp_path, monkeypatch, shards=False)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00025.safetensors"}}))
    with caplog.at_level(logging.WARNING):
        assert same(pixel_jax.from_pretrained(tmp_path)[0], model)
    assert f"{SINGLE} is read; {INDEX} beside it is not" in caplog.text


def edit(directory, change):
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE)


def test_norms_in_another_dtype(model, tmp_path, monkeypatch, caplog):
    """As training on quantised weights leaves them: all become what config.json says, and that is said."""
    save(jax.tree.map(lambda w: w.astype(jnp.bfloat16), model), tmp_path, monkeypatch, shards=False)
    widen = lambda tensors: tensors.update({k: v.astype(np.float32) for k, v in tensors.items() if "norm" in k})
    edit(tmp_path, widen)
    with caplog.at_level(logging.WARNING):
        read, _ = pixel_jax.from_pretrained(tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {jnp.dtype("bfloat16")}
    assert "mix bfloat16 (" in caplog.text and "all are read as bfloat16, as config.json says" in caplog.text
    assert np.isfinite(pixel_jax.forward(read, input_ids=np.array([[1, 5, 7]]))).all()
    values = json.loads((tmp_path / "config.json").read_text())
    values["dtype"] = values.pop("torch_dtype")  # as transformers writes it since 4.56
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert same(pixel_jax.from_pretrained(tmp_path)[0], read)
    del values["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(
        FileError, match=r"mix bfloat16 \(.*\) and float32 \(.*norm.*\), and config.json names no torch_dtype"
    ):
        pixel_jax.from_pretrained(tmp_path)
    assert same(pixel_jax.from_pretrained(tmp_path, dtype=jnp.bfloat16)[0], read)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_no_number(dtype, value):
    values = np.full((1025, 1024), -1, dtype)
    values[0, 0] = np.finfo(dtype).max if dtype != ml_dtypes.bfloat16 else ml_dtypes.finfo(dtype).max
    assert is_finite(values) and is_finite(values[:0])
    values[-1, -1] = value
    assert not is_finite(values)


@pytest.mark.parametrize("change, message", [
    (lambda t: t.update({NORM: np.full(32, np.nan, np.float32)}), f"tensor '{NORM}' in {SINGLE} holds NaN or infinity"),
    (lambda t: t.update({"model.language_model.norm.weight": t["model.norm.weight"]}),
     "'model.norm.weight' in .* two spellings of one tensor"),
    (lambda t: t.update({"model.visual.merger.ln_q.weight": t["visual.merger.ln_q.weight"]}), "two spellings"),
])  # fmt: skip
def test_tensors_that_are_refused(model, tmp_path, monkeypatch, change, message):
    save(model, tmp_path, monkeypatch, shards=False)
    edit(tmp_path, change)
    with pytest.raises(FileError, match=message):
        pixel_jax.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", [SINGLE, "config.json"])
def test_a_named_pipe_is_not_waited_for(model, tmp_path, monkeypatch, name):
    save(model, tmp_path, monkeypatch, shards=False)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(FileError, match=f"{name}' is not a regular file"):
        pixel_jax.from_pretrained(tmp_path)


def test_an_adapter_is_called_one(tmp_path):
    for content in ('{"base_model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct"}', "[", "[]", "{}"):
        (tmp_path / "adapter_config.json").write_text(content)
        base = "'Qwen/Qwen2.5-VL-7B-Instruct'" if "Qwen" in content else "'its base model'"
        with pytest.raises(
            FileNotFoundError, match=f"holds an adapter .adapter_config.json.: give the directory of {base}"
        ):
            pixel_jax.from_pretrained(tmp_path)


@pytest.mark.parametrize("content, message", [
    ("[" * 5000 + "]" * 5000, "rollout.json is nested deeper"),
    ("[1]", "rollout.json must be a mapping"),
    ('{"max_calls": "4"}', "rollout.json.max_calls"),
    ('{"max_calls": 1, "max_calls": 2}', "'max_calls' occurs twice"),
])  # fmt: skip
def test_a_malformed_rollout_file(tmp_path, content, message):
    (tmp_path / "rollout.json").write_text(content)
    with pytest.raises((FileError, ConfigError), match=message):
        read_limits(tmp_path)


# Malformed files: whatever stands in a field, either the model is read or the error is the named one.

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
HOSTILE = st.one_of(
    st.sampled_from([
        None, True, 0, -1, 1, 2, 2.5, 10**9, 2**63, -(2**70), 1e308, float("nan"), float("inf"), "", "2", "\x00", "../x", "é",
        [], [1], [[]], [None], {}, {"a": 1}, [1, 1, 2], "default", "mrope", "bfloat16", "/etc/passwd", "model.safetensors",
    ]),
    LEAVES,
    st.lists(LEAVES, max_size=3),
    st.dictionaries(st.text(max_size=5), LEAVES | st.lists(LEAVES, max_size=2), max_size=3),
)  # fmt: skip


def places(value, at=()):
    """The paths of all fields and elements."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, x in inner for place in places(x, (*at, key)))]


@st.composite
def mutated(draw, value):
    """JSON text with up to three places replaced or removed, or cut, or nested deeply."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        *outer, last = draw(st.sampled_from([place for place in places(value) if place] or [("new",)]))
        target = value
        for key in outer:
            target = target[key]
        if not isinstance(target, dict | list):
            continue
        if draw(st.integers(0, 3)) or isinstance(target, list):
            target[last] = copy.deepcopy(draw(HOSTILE))
        else:
            target.pop(last, None)
    text = json.dumps(draw(HOSTILE) if draw(st.integers(0, 20)) == 0 else value)
    return draw(
        st.sampled_from([text] * 20 + [text[: len(text) // 2], text.replace("{", '{"x":' * 300 + "{", 1), "[" * 9999])
    )


NESTED = {
    "model_type": "qwen2_5_vl",
    "text_config": {name: value for name, value in tiny_config().to_hf().items() if name != "vision_config"}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}, "head_dim": 8,
       "layer_types": ["full_attention"]},
    "vision_config": tiny_config().to_hf()["vision_config"] | {"rope_parameters": {"rope_theta": 10000.0}},
    "image_token_id": 60, "dtype": "float32",
}  # fmt: skip


@given(text=mutated(tiny_config().to_hf()) | mutated(NESTED))
def test_a_mutated_config(tmp_path_factory, text):
    directory = tmp_path_factory.mktemp("config")
    (directory / "config.json").write_text(text)
    try:
        config, _ = io.read_config(directory)
    except FileError as error:
        assert str(directory / "config.json") in str(error)
    else:
        assert Qwen2_5_VLConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
        checkpoint.jax.eval_shape(lambda: io.LanguageModel(config, jax.random.key(0)))


@pytest.fixture(scope="module")
def scripted_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("scripted")
    limits = {"min_pixels": 784, "max_pixels": 4 * 784}
    pixel_jax.save_pretrained(
        scripted_model.model(), Processor(scripted_model.vocabulary().tokenizer, **limits), directory
    )
    return directory


SIDE_FILES = ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json")


@given(data=st.data(), name=st.sampled_from(SIDE_FILES))
def test_a_mutated_processor(scripted_directory, tmp_path_factory, data, name):
    directory = tmp_path_factory.mktemp("mutated")
    files = {path.name: path.read_text() for path in scripted_directory.iterdir() if path.suffix == ".json"}
    if name == "processor_config.json":
        files[name] = json.dumps({"image_processor": json.loads(files.pop("preprocessor_config.json"))})
    files[name] = data.draw(mutated(json.loads(files[name])))
    for file, content in files.items():
        (directory / file).write_text(content)
    try:
        processor = Processor.from_directory(directory, scripted_model.model().config)
    except FileError as error:
        assert str(directory) in str(error)
    else:
        assert processor(["zoom in", "3"])["input_ids"].shape[0] == 2
        (directory / "saved").mkdir()
        processor.save(directory / "saved")
        for file in (directory / "saved").iterdir():
            assert file.read_text() == files[file.name]


@given(
    text=mutated({"metadata": {"total_size": 1}, "weight_map": {NORM: "model-00001-of-00001.safetensors", "b": "c"}})
)
def test_a_mutated_index(tmp_path_factory, text):
    directory = tmp_path_factory.mktemp("index")
    (directory / INDEX).write_text(text)
    try:
        assert checkpoint._read_index(directory) == {}  # which ends in a list of missing tensors
    except (FileError, FileNotFoundError) as error:
        assert str(directory / INDEX) in str(error)
