"""Safetensors directories in the Hugging Face layout, tensor by tensor.

The place of a weight in the module tree is its key: `language_model.layers.self_attn.q_proj.weight`, whose first axis is
`layers`, holds `model.layers.{i}.self_attn.q_proj.weight` for every i. Two spellings of keys are in circulation and both are
read; the released one is written.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pixel_jax.files import FileError, open_regular, read_json
from pixel_jax.models.config import WeightNames
from pixel_jax.models.layers import LoRAWeight, is_variable
from pixel_jax.models.model import Model

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5 * 2**30
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def named_weights(model: nnx.Module) -> Iterator[tuple[tuple, str, nnx.Variable]]:
    """(path in the tree, our name, weight) of every weight; a stacked weight's key has `{}` for the layer."""
    for path, weight in jax.tree_util.tree_flatten_with_path(model, is_leaf=is_variable)[0]:
        names = [str(getattr(entry, "name", getattr(entry, "key", None))) for entry in path]
        if names[0] == "language_model":
            names[0] = "model"
        if weight.axes[0] == "layers":
            names.insert(next(i for i, name in enumerate(names) if name in ("layers", "blocks")) + 1, "{}")
        yield path, ".".join(names), weight


# What some files hold beside weights: it follows from the configuration.
BUFFERS = re.compile(r".*\.(rotary_emb\.inv_freq|embeddings\.position_ids)")


def is_weight_file(name: str) -> bool:
    """Whether a file of this name in a model directory holds weights, or says where they are."""
    return bool(re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", name))


class WeightReader:
    """The tensors of a directory, by our names of them; files are mapped, not read."""

    def __init__(self, directory: Path, files: contextlib.ExitStack, names: WeightNames):
        self.directory = directory
        self.tensors = {}  # our name -> (open file, key in the file, file name)
        # As transformers: one file, where there is one, whatever an index beside it says.
        if os.path.lexists(directory / SINGLE):
            index = None
            if os.path.lexists(directory / INDEX):
                logging.warning("%s is read; %s beside it is not", directory / SINGLE, INDEX)
        elif os.path.lexists(directory / INDEX):
            index = _read_index(directory)
        else:
            raise FileNotFoundError(f"{directory} holds neither {SINGLE} nor {INDEX}")
        opened = {}
        for name in sorted({SINGLE} if index is None else set(index.values())):
            opened[name] = files.enter_context(_open_tensors(directory / name))
        if index is None:
            index = {key: SINGLE for key in opened[SINGLE].keys()}
        held = {name: set(file.keys()) for name, file in opened.items()}
        for key, name in index.items():
            if key not in held[name]:
                raise FileError(f"{directory / INDEX} says that {name!r} holds tensor {key!r}, which it does not")
            if BUFFERS.fullmatch(key):
                continue
            _, twin, other = self.tensors.setdefault(names.ours(key), (opened[name], key, name))
            if twin != key:
                raise FileError(
                    f"{directory}: {twin!r} in {other} and {key!r} in {name} are two spellings of one tensor"
                )

    def tensor(self, key: str, shape: tuple[int, ...]):
        """A tensor of the given shape; slicing it reads that slice."""
        file, original, name = self.tensors[key]
        view = file.get_slice(original)
        if tuple(view.get_shape()) != shape:
            raise self.error(key, f"has shape {tuple(view.get_shape())}, expected {shape}")
        if view.get_dtype() not in FLOATS:
            raise self.error(key, f"has dtype {view.get_dtype()}, expected one of {', '.join(FLOATS)}")
        return view

    def error(self, key: str, problem: str) -> FileError:
        _, original, name = self.tensors[key]
        return FileError(f"{self.directory}: tensor {original!r} in {name} {problem}")


def _read_index(directory: Path) -> dict[str, str]:
    """Key -> name of the file that holds it."""
    path = directory / INDEX
    values = read_json(path)
    index = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise FileError(f"{path}: no readable index of tensors (weight_map, from keys to file names)")
    for name in sorted(set(index.values())):
        if name != Path(name).name or name in ("", ".."):
            raise FileError(f"{path} points outside the directory: {name!r}")
        if not os.path.lexists(directory / name):
            raise FileNotFoundError(f"{path} names {name!r}, which does not exist")
    return index


def _open_tensors(path: Path) -> safe_open:
    open_regular(path).close()  # a named pipe would be waited for
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path}: truncated or damaged ({error})") from None


def load_weights(model: Model, directory: Path, shardings, dtype=None, *, config_dtype: str | None = None) -> Model:
    """An abstract model (`jax.eval_shape`) -> the same with the weights of a directory.

    Args:
        shardings: pytree like the model's arrays, a `jax.sharding.Sharding` each; a process reads only what its devices hold.
        dtype: of the weights; None keeps the files', if that is one for all.
        config_dtype: what `config.json` says, which decides where the files mix several.

    Raises:
        FileError: the tensors are not those of the model, or hold what is no number. The message names them.
        FileNotFoundError: the directory has no weights.
    """
    with contextlib.ExitStack() as files:
        reader = WeightReader(directory, files, model.config.names)
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
            raise FileError(f"{directory}: {len(missing)} missing tensors: {_few(missing)}")
        if unused:
            raise FileError(f"{directory}: {len(unused)} tensors that this model does not use: {_few(unused)}")
        abstract, structure = jax.tree.flatten(model)
        shapes = [value.shape for value in abstract]
        if dtype is None:
            dtype = _one_dtype(reader, wanted, shapes, config_dtype)
        places = jax.tree.leaves(shardings)
        loaded = [
            _load(reader, keys, shape, place, dtype) for keys, shape, place in zip(wanted, shapes, places, strict=True)
        ]
    return jax.tree.unflatten(structure, loaded)


def _one_dtype(reader: WeightReader, wanted: list, shapes: list, config_dtype: str | None) -> str:
    """The dtype that all weights get where nobody asks for one."""
    by_dtype: dict[str, str] = {}  # dtype -> a key that has it
    for keys, shape in zip(wanted, shapes, strict=True):
        for key in [keys] if isinstance(keys, str) else keys:
            view = reader.tensor(key, shape if isinstance(keys, str) else shape[1:])
            by_dtype.setdefault(FLOATS[view.get_dtype()], key)
    if len(by_dtype) == 1:
        return next(iter(by_dtype))
    mixed = " and ".join(f"{name} ({key})" for name, key in sorted(by_dtype.items()))
    if config_dtype is None:
        raise FileError(
            f"{reader.directory}: the weights mix {mixed}, and config.json names no torch_dtype that they are meant to have"
        )
    logging.warning(
        "%s: the weights mix %s; all are read as %s, as config.json says", reader.directory, mixed, config_dtype
    )
    return config_dtype


def _load(reader: WeightReader, keys: str | list[str], shape: tuple[int, ...], place: jax.sharding.Sharding, dtype):
    def read(key: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
        values = reader.tensor(key, shape)[index]
        if not _is_finite(values):
            raise reader.error(key, "holds NaN or infinity")
        return values

    if isinstance(keys, str):
        whole = lambda index: read(keys, shape, index)
    else:
        whole = lambda index: np.stack([read(key, shape[1:], index[1:]) for key in keys[index[0]]])
    return jax.make_array_from_callback(shape, place, lambda index: np.asarray(whole(index), dtype))


def _is_finite(values: np.ndarray) -> bool:
    """Whether all numbers are. Of the bits: for bfloat16 `np.isfinite` takes five times as long."""
    if not values.size:
        return True
    unsigned = np.dtype(f"u{values.itemsize}")
    infinity = np.array(np.inf, values.dtype).view(unsigned)
    magnitude = unsigned.type(2 ** (8 * values.itemsize - 1) - 1)
    flat = values.reshape(-1).view(unsigned)
    pieces = (flat[i : i + 2**20] for i in range(0, flat.size, 2**20))  # that stay in the processor's cache
    return all((piece & magnitude).max() < infinity for piece in pieces)


def _check_tied(reader: WeightReader, model: Model) -> None:
    """A file may hold the head of a tied model too, if it is the embedding."""
    shape = model.language_model.embed_tokens.weight.shape
    head, embedding = (reader.tensor(key, shape)[:] for key in ("lm_head.weight", "model.embed_tokens.weight"))
    if not np.array_equal(head, embedding):
        raise FileError(
            "config.json says tie_word_embeddings, but lm_head.weight differs from model.embed_tokens.weight"
        )


def save_weights(model: Model, directory: Path, dtype=None) -> None:
    """Write the released layout into an empty directory: one file, or shards of at most `MAX_SHARD_BYTES` with an index.

    dtype: of what is written; None: each weight's own.
    """
    plan, sizes = [[]], [0]  # per shard: (key, weight, layer or None)
    for _, key, weight in named_weights(model):
        if isinstance(weight, LoRAWeight):
            raise ValueError(f"{key}: merge the adapter (`merge_lora`) before saving; the directory holds base weights")
        stacked = weight.axes[0] == "layers"
        for layer in range(weight.shape[0]) if stacked else [None]:
            itemsize = jnp.dtype(dtype or weight.dtype).itemsize
            size = itemsize * weight.size // (weight.shape[0] if stacked else 1)
            if sizes[-1] and sizes[-1] + size > MAX_SHARD_BYTES:
                plan.append([])
                sizes.append(0)
            plan[-1].append((model.config.names.in_file(key.format(layer)), weight, layer))
            sizes[-1] += size
    weight_map = {}
    for number, tensors in enumerate(plan, start=1):
        name = SINGLE if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        values = {
            key: _to_host(weight[...] if layer is None else weight[layer], dtype) for key, weight, layer in tensors
        }
        weight_map |= dict.fromkeys(values, name)
        if jax.process_index() == 0:
            save_file(values, directory / name, metadata={"format": "pt"})
    if len(plan) > 1 and jax.process_index() == 0:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))


def _to_host(x: jax.Array, dtype=None) -> np.ndarray:
    """The whole array, also when other processes hold parts of it; in `dtype`, unless that is None."""
    x = x if dtype is None else x.astype(dtype)
    if not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        x = multihost_utils.process_allgather(x, tiled=True)
    return np.ascontiguousarray(x)


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
