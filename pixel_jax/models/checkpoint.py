"""Safetensors directories in the Hugging Face layout, tensor by tensor.

The place of a weight in the module tree is its key: `language_model.layers.self_attn.q_proj.weight`, whose first axis is
`layers`, holds `model.layers.{i}.self_attn.q_proj.weight` for every i. Two spellings of keys are in circulation and both are
read; the released one is written.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pixel_jax.models.layers import LoRAWeight, is_variable
from pixel_jax.models.qwen2_5_vl import Qwen2_5_VL

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5 * 2**30
FLOATS = ("F32", "BF16", "F16", "F64")


def named_weights(model: nnx.Module) -> Iterator[tuple[tuple, str, nnx.Variable]]:
    """(path in the tree, released key, weight) of every weight; a stacked weight's key has `{}` for the layer."""
    for path, weight in jax.tree_util.tree_flatten_with_path(model, is_leaf=is_variable)[0]:
        names = [str(getattr(entry, "name", getattr(entry, "key", None))) for entry in path]
        if names[0] == "language_model":
            names[0] = "model"
        if weight.axes[0] == "layers":
            names.insert(next(i for i, name in enumerate(names) if name in ("layers", "blocks")) + 1, "{}")
        yield path, ".".join(names), weight


def released_key(key: str) -> str:
    """Either spelling -> the released one."""
    for newer, released in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if key.startswith(newer):
            return released + key[len(newer) :]
    return key


class Reader:
    """The tensors of a directory, by released key; files are mapped, not read."""

    def __init__(self, directory: Path, files: contextlib.ExitStack):
        self.tensors = {}  # released key -> (open file, key in the file, file name)
        if (directory / INDEX).exists():
            try:
                index = json.loads((directory / INDEX).read_text())["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{directory / INDEX}: no readable index of tensors ({error!r})") from None
        elif (directory / SINGLE).exists():
            index = None
        else:
            raise FileNotFoundError(f"{directory} holds neither {SINGLE} nor {INDEX}")
        opened = {}
        for name in sorted({SINGLE} if index is None else set(index.values())):
            if Path(name).name != name:
                raise ValueError(f"{directory / INDEX} points outside the directory: {name!r}")
            if not (directory / name).exists():
                raise FileNotFoundError(f"{directory / INDEX} names {name!r}, which does not exist")
            try:
                opened[name] = files.enter_context(safe_open(directory / name, framework="numpy"))
            except SafetensorError as error:
                raise ValueError(f"{directory / name}: truncated or damaged ({error})") from None
        if index is None:
            index = {key: SINGLE for key in opened[SINGLE].keys()}
        held = {name: set(file.keys()) for name, file in opened.items()}
        for key, name in index.items():
            if key not in held[name]:
                raise ValueError(f"{directory / INDEX} says that {name!r} holds tensor {key!r}, which it does not")
            self.tensors[released_key(key)] = (opened[name], key, name)

    def tensor(self, key: str, shape: tuple[int, ...]):
        """A tensor of the given shape; slicing it reads that slice."""
        file, original, name = self.tensors[key]
        view = file.get_slice(original)
        if tuple(view.get_shape()) != shape:
            raise ValueError(f"tensor {original!r} in {name} has shape {tuple(view.get_shape())}, expected {shape}")
        if view.get_dtype() not in FLOATS:
            raise ValueError(f"tensor {original!r} in {name} has dtype {view.get_dtype()}, expected one of {FLOATS}")
        return view


def load_weights(model: Qwen2_5_VL, directory: Path, shardings, dtype=None) -> Qwen2_5_VL:
    """An abstract model (`jax.eval_shape`) -> the same with the weights of a directory.

    shardings: pytree like the model's arrays, a `jax.sharding.Sharding` each; a process reads only what its devices hold
    dtype:     of the weights; None keeps the files'
    """
    with contextlib.ExitStack() as files:
        reader = Reader(directory, files)
        wanted = []  # per weight: the keys of its layers, or the one key of an unstacked weight
        for _, key, weight in named_weights(model):
            stacked = weight.axes[0] == "layers"
            wanted.append([key.format(i) for i in range(weight.shape[0])] if stacked else key)
        needed = {key for keys in wanted for key in ([keys] if isinstance(keys, str) else keys)}
        missing = sorted(needed - reader.tensors.keys())
        unused = sorted(reader.tensors.keys() - needed)
        if model.config.tie_word_embeddings and "lm_head.weight" in unused:
            _check_tied(reader, model)
            unused.remove("lm_head.weight")
        if missing:
            raise ValueError(f"{directory}: {len(missing)} missing tensors: {_few(missing)}")
        if unused:
            raise ValueError(f"{directory}: {len(unused)} tensors that this model does not use: {_few(unused)}")
        abstract, structure = jax.tree.flatten(model)
        places = jax.tree.leaves(shardings)
        loaded = [
            _load(reader, keys, value.shape, place, dtype)
            for keys, value, place in zip(wanted, abstract, places, strict=True)
        ]
    return jax.tree.unflatten(structure, loaded)


def _load(reader: Reader, keys: str | list[str], shape: tuple[int, ...], place: jax.sharding.Sharding, dtype):
    if isinstance(keys, str):
        tensor = reader.tensor(keys, shape)
        read = lambda index: tensor[index]
    else:
        tensors = [reader.tensor(key, shape[1:]) for key in keys]
        read = lambda index: np.stack([tensor[index[1:]] for tensor in tensors[index[0]]])
    return jax.make_array_from_callback(shape, place, lambda index: np.asarray(read(index), dtype))


def _check_tied(reader: Reader, model: Qwen2_5_VL) -> None:
    """A file may hold the head of a tied model too, if it is the embedding."""
    shape = model.language_model.embed_tokens.weight.shape
    head, embedding = (reader.tensor(key, shape)[:] for key in ("lm_head.weight", "model.embed_tokens.weight"))
    if not np.array_equal(head, embedding):
        raise ValueError(
            "config.json says tie_word_embeddings, but lm_head.weight differs from model.embed_tokens.weight"
        )


def save_weights(model: Qwen2_5_VL, directory: Path) -> None:
    """Write the released layout: one file, or shards of at most `MAX_SHARD_BYTES` with an index."""
    plan, sizes = [[]], [0]  # per shard: (key, weight, layer or None)
    for _, key, weight in named_weights(model):
        if isinstance(weight, LoRAWeight):
            raise ValueError(f"{key}: merge the adapter (`merge_lora`) before saving; the directory holds base weights")
        stacked = weight.axes[0] == "layers"
        for layer in range(weight.shape[0]) if stacked else [None]:
            size = weight.dtype.itemsize * weight.size // (weight.shape[0] if stacked else 1)
            if sizes[-1] and sizes[-1] + size > MAX_SHARD_BYTES:
                plan.append([])
                sizes.append(0)
            plan[-1].append((key.format(layer), weight, layer))
            sizes[-1] += size
    weight_map = {}
    for number, tensors in enumerate(plan, start=1):
        name = SINGLE if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        values = {key: _to_host(weight[...] if layer is None else weight[layer]) for key, weight, layer in tensors}
        weight_map |= dict.fromkeys(values, name)
        if jax.process_index() == 0:
            save_file(values, directory / name, metadata={"format": "pt"})
    if len(plan) > 1 and jax.process_index() == 0:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))


def _to_host(x: jax.Array) -> np.ndarray:
    """The whole array, also when other processes hold parts of it."""
    if not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        x = multihost_utils.process_allgather(x, tiled=True)
    return np.ascontiguousarray(x)


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
