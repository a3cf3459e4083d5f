"""Weights on their way to devices: what is read, in what pieces, and how much memory it takes."""

import json
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save, save_file

from pixel_jax import terminal
from pixel_jax.files import FileError
from pixel_jax.models import LanguageModel, Qwen2_5_VLConfig, TextConfig, VisionConfig, loading
from pixel_jax.models.checkpoint import named_weights
from pixel_jax.models.loading import Wanted, load_arrays
from pixel_jax.models.tensors import open_safetensors
from pixel_jax.parallel.mesh import make_mesh

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 5)])
def test_tensors_are_those_of_the_library(dtype, shape, tmp_path, rng):
    values = {"a": rng.standard_normal(shape).astype(dtype), "b": np.arange(7, dtype=np.int64)}
    save_file(values, tmp_path / "x.safetensors")
    found = open_safetensors(tmp_path / "x.safetensors")
    assert set(found) == {"a", "b"} and found["b"].dtype == "I64"
    assert found["a"].values().dtype == dtype and found["a"].shape == shape
    np.testing.assert_array_equal(found["a"].values(), values["a"])


FILE = save({"a": np.ones((2, 3), np.float32), "b.c": np.ones(5, np.float16)}, metadata={"format": "pt"})


@given(st.lists(st.tuples(st.integers(0, len(FILE) - 1), st.binary(min_size=1, max_size=3)), max_size=3), st.data())
def test_a_damaged_file_is_read_as_the_library_reads_it_or_refused(tmp_path_factory, changes, data):
    content = bytearray(FILE)
    for at, piece in changes:
        content[at : at + len(piece)] = piece
    content = content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(content)
    try:
        with safe_open(path, framework="numpy") as file:
            theirs = {key: file.get_slice(key) for key in file.keys()}
            theirs = {key: (tuple(x.get_shape()), x.get_dtype()) for key, x in theirs.items()}
    except SafetensorError:
        theirs = None
    try:
        ours = open_safetensors(path)
    except FileError as error:
        assert str(path) in str(error)
        if theirs is not None:  # what we refuse beyond: a key that is there twice, bytes that are no UTF-8
            assert "occurs twice" in str(error) or "not JSON" in str(error) or "dtype" in str(error)
        return
    assert theirs is not None and {key: (x.shape, x.dtype) for key, x in ours.items()} == theirs


def test_every_shard_is_read_once_and_holds_its_part(tmp_path, rng, monkeypatch):
    """Of a stack and of a single weight, split, replicated, both; converted on the way, in blocks of a few numbers."""
    monkeypatch.setattr(loading, "BLOCK", 7)
    layers = {f"w.{i}": rng.standard_normal((8, 6)).astype(np.float32) for i in range(3)}
    scalars = {f"s.{i}": np.array(i, np.float32) for i in range(3)}
    save_file({**layers, **scalars, "one": np.arange(24, dtype=np.float16)}, tmp_path / "x.safetensors")
    tensors = open_safetensors(tmp_path / "x.safetensors")
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, jax.devices()[:4])
    place = lambda *spec: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    read = []
    monkeypatch.setattr(
        loading, "_read", lambda *args, read_shard=loading._read: read.append(args[1]) or read_shard(*args)
    )
    wanted = [
        Wanted((3, 8, 6), place(None, "tensor", "fsdp"), [tensors[f"w.{i}"] for i in range(3)]),
        Wanted((24,), place("tensor"), [tensors["one"]]),
        Wanted((3,), place(), [tensors[f"s.{i}"] for i in range(3)]),
    ]
    stack, one, few = load_arrays(wanted, np.dtype(ml_dtypes.bfloat16), "test")
    np.testing.assert_array_equal(stack, np.stack(list(layers.values())).astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(one, np.arange(24).astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(few, np.arange(3).astype(ml_dtypes.bfloat16))
    assert [len(shard.devices) for shard in read] == [1, 1, 1, 1, 2, 2, 4]
    assert [x.sharding for x in (stack, one, few)] == [x.sharding for x in wanted]


def test_a_bar_shows_how_much_is_read(tmp_path, monkeypatch):
    tensors = {f"w.{i}": np.zeros(1, np.float32) for i in range(4)}
    save_file(tensors, tmp_path / "x.safetensors")
    opened = open_safetensors(tmp_path / "x.safetensors")
    texts = []
    monkeypatch.setattr(terminal.Waiting, "at", lambda self, far: texts.append((self.what, far)))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    load_arrays([Wanted((1,), place, [opened[name]]) for name in tensors], np.dtype(np.float32), "reading x")
    assert [what for what, _ in texts] == ["reading x"] * 4
    assert [far.split()[0] for _, far in texts] == [f"{'#' * n}{'-' * (20 - n)}" for n in (5, 10, 15, 20)]


LARGE = Qwen2_5_VLConfig(
    TextConfig(
        vocab_size=40_000,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
    ),
    VisionConfig(depth=2, hidden_size=1280, out_hidden_size=2048, fullatt_block_indexes=(1,)),
)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model of 2 GB in bfloat16, in four files."""
    directory = tmp_path_factory.mktemp("large")
    abstract = jax.eval_shape(lambda key: LanguageModel(LARGE, key), jax.random.key(0))
    keys = [
        (key.format(i), weight.shape[1:] if weight.axes[0] == "layers" else weight.shape)
        for _, key, weight in named_weights(abstract)
        for i in range(weight.shape[0] if weight.axes[0] == "layers" else 1)
    ]
    index, size = {}, 0
    for number in range(4):
        part = {key: np.full(shape, number + 1, ml_dtypes.bfloat16) for key, shape in keys[number::4]}
        name = f"model-{number + 1:05d}-of-00004.safetensors"
        save_file(part, directory / name)
        index |= dict.fromkeys(part, name)
        size += sum(x.nbytes for x in part.values())
    assert 2e9 < size < 2.2e9
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (directory / "config.json").write_text(json.dumps(LARGE.to_hf()))
    return directory


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads /proc, which Linux has")
@pytest.mark.parametrize("devices", [1, 8])
def test_memory_while_loading(large, devices):
    """At any moment below the local weights and twice the largest local shard."""
    worker = pathlib.Path(__file__).parent / "loading_worker.py"
    run = subprocess.run([sys.executable, worker, large, str(devices)], capture_output=True, text=True, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    print(found)
    assert found["weights"] > 2e9
    assert found["rise"] < found["weights"] + 2 * found["largest"]
