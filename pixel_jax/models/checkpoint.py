"""Safetensors directories in the Hugging Face layout, tensor by tensor.

The path of a weight in the module tree is its key: `language_model.layers.self_attn.q_proj.weight`, whose first axis is
`layers`, holds `model.layers.{i}.self_attn.q_proj.weight` for every i. Two spellings of keys are in circulation and both are
read; the released one is written.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from safetensors.numpy import save_file

from pixel_jax.arrays import Params
from pixel_jax.files import FileError, read_json
from pixel_jax.models.config import WeightNames
from pixel_jax.models.layers import LoRAWeight
from pixel_jax.models.loading import Wanted, load_arrays
from pixel_jax.models.model import Model
from pixel_jax.models.tensors import FLOATS, Tensor, open_safetensors
from pixel_jax.parallel.processes import barrier
from pixel_jax.parallel.sharding import is_variable

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 5 * 2**30


def named_weights(model: Params) -> Iterator[tuple[tuple, str, nnx.Variable]]:
    """Yields (path in the tree, our name, weight) of every weight; a stacked weight's name has `{}` for the layer."""
    for path, weight in jax.tree_util.tree_flatten_with_path(model, is_leaf=is_variable)[0]:
        names = [str(getattr(entry, "name", getattr(entry, "key", None))) for entry in path]
        if names[0] == "language_model":
            names[0] = "model"
        if weight.axes[0] == "layers":
            names.insert(next(i for i, name in enumerate(names) if name in ("layers", "blocks")) + 1, "{}")
        yield path, ".".join(names), weight


def layer_numbers(model: Model, key: str, weight: nnx.Variable) -> Sequence[int]:
    """The numbers of the layers of a stacked weight called `key`, in the order of its stack; [0] if it is not stacked."""
    if weight.axes[0] != "layers":
        return [0]
    count = weight.shape[0]
    return model.config.text.layer_numbers(key, count) if key.startswith("model.") else range(count)


# Tensors in some files that are not weights, because they follow from the configuration.
BUFFERS = re.compile(r".*\.(rotary_emb\.inv_freq|embeddings\.position_ids)")


def is_weight_file(name: str) -> bool:
    """Whether a file of this name in a model directory holds weights, or is their index."""
    return bool(re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", name))


def open_weights(directory: Path, names: WeightNames) -> dict[str, Tensor]:
    """Opens the tensors of a directory, by our names of them, `names.ours`; files are mapped, not read.

    Raises:
        FileError: a file is damaged, the index is wrong, or a tensor is there in both spellings.
        FileNotFoundError: the directory has no weights.
    """
    # As in transformers, a single file has precedence over an index beside it.
    if os.path.lexists(directory / SINGLE):
        if os.path.lexists(directory / INDEX):
            logging.warning("%s is read; %s beside it is not", directory / SINGLE, INDEX)
        stored = list(open_safetensors(directory / SINGLE).values())
    elif os.path.lexists(directory / INDEX):
        index = _read_index(directory)
        opened = {name: open_safetensors(directory / name) for name in sorted(set(index.values()))}
        for key, name in index.items():
            if key not in opened[name]:
                raise FileError(f"{directory / INDEX} says that {name!r} holds tensor {key!r}, which it does not")
        stored = [opened[name][key] for key, name in index.items()]
    else:
        raise FileNotFoundError(f"{directory} holds neither {SINGLE} nor {INDEX}: {_what_to_do(directory)}")
    unread = [tensor.name for tensor in stored if names.unread and re.fullmatch(names.unread, tensor.name)]
    if unread:
        logging.warning(
            "%s: %d tensors that this network has no use for are not read: %s", directory, len(unread), few(unread)
        )
    tensors: dict[str, Tensor] = {}
    for tensor in stored:
        if BUFFERS.fullmatch(tensor.name) or tensor.name in unread:
            continue
        twin = tensors.setdefault(names.ours(tensor.name), tensor)
        if twin is not tensor:
            raise FileError(
                f"{directory}: {twin.name!r} in {twin.file.name} and {tensor.name!r} in {tensor.file.name} are two "
                "spellings of one tensor"
            )
    return tensors


def _what_to_do(directory: Path) -> str:
    """Says how a directory without readable weights gets some."""
    pickles = sorted(path.name for path in directory.glob("*.bin"))
    if pickles:
        return f"{pickles[0]} is a pickle, which is never read; transformers' save_pretrained writes the model anew"
    return "copy or download them, too"


def _read_index(directory: Path) -> dict[str, str]:
    """Reads {key: name of the file that holds it}."""
    path = directory / INDEX
    values = read_json(path)
    index = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise FileError(f"{path}: no readable index of tensors (weight_map, from keys to file names)")
    for name in sorted(set(index.values())):
        if name != Path(name).name or name in ("", ".."):
            raise FileError(f"{path} points outside the directory: {name!r}")
        if not os.path.lexists(directory / name):
            raise FileNotFoundError(f"{path} names {name!r}, which does not exist: copy or download it, too")
    return index


def load_weights(
    model: Model,
    tensors: Mapping[str, Tensor],
    where: Path,
    shardings,
    dtype=None,
    *,
    config_dtype: str | None = None,
) -> Model:
    """Loads the weights of an abstract model (`jax.eval_shape`) from files.

    Args:
        model: abstract.
        tensors: by our names of them, as `open_weights` returns them.
        where: the directory or file, for messages.
        shardings: pytree like the model's arrays, a `jax.sharding.Sharding` each; a process reads only its devices' shards.
        dtype: of the weights; None keeps the files', if all have the same.
        config_dtype: the dtype in `config.json`, which is used if the files mix several.

    Raises:
        FileError: the tensors are not those of the model, or hold NaN or infinity. The message names them.
    """
    wanted = []  # per weight: the keys of its layers, or the one key of an unstacked weight
    for _, key, weight in named_weights(model):
        wanted.append([key.format(number) for number in layer_numbers(model, key, weight)])
    needed = {key for keys in wanted for key in keys}
    missing = sorted(needed - tensors.keys())
    unused = sorted(tensors.keys() - needed)
    if model.config.tie_word_embeddings and "lm_head.weight" in unused:
        _check_tied(tensors, model)
        unused.remove("lm_head.weight")
    if missing:
        raise FileError(f"{where}: {len(missing)} missing tensors: {few(missing)}")
    if unused:
        raise FileError(f"{where}: {len(unused)} tensors that this model does not use: {few(unused)}")
    abstract, structure = jax.tree.flatten(model)
    parts = [[tensors[key] for key in keys] for keys in wanted]
    by_dtype: dict[str, str] = {}  # dtype -> a key that has it
    for (_, _, weight), keys, array in zip(named_weights(model), wanted, abstract, strict=True):
        shape = array.shape[1:] if weight.axes[0] == "layers" else array.shape
        for key in keys:
            tensors[key].check(shape)
            by_dtype.setdefault(FLOATS[tensors[key].dtype].name, key)
    dtype = jnp.dtype(_one_dtype(by_dtype, where, config_dtype) if dtype is None else dtype)
    sources = zip(abstract, jax.tree.leaves(shardings), parts, strict=True)
    weights = [Wanted(array.shape, sharding, tensors) for array, sharding, tensors in sources]
    return jax.tree.unflatten(structure, load_arrays(weights, dtype, f"reading {where}"))


def _one_dtype(by_dtype: Mapping[str, str], where: Path, config_dtype: str | None) -> str:
    """The dtype of all weights if none is asked for."""
    if len(by_dtype) == 1:
        return next(iter(by_dtype))
    mixed = " and ".join(f"{name} ({key})" for name, key in sorted(by_dtype.items()))
    if config_dtype is None:
        raise FileError(
            f"{where}: the weights mix {mixed}, and config.json names no torch_dtype that they are meant to have"
        )
    logging.warning("%s: the weights mix %s; all are read as %s, as config.json says", where, mixed, config_dtype)
    return config_dtype


def _check_tied(tensors: Mapping[str, Tensor], model: Model) -> None:
    """Checks the head of a tied model, which a file may hold if it equals the embedding."""
    head, embedding = (tensors[key] for key in ("lm_head.weight", "model.embed_tokens.weight"))
    for tensor in (head, embedding):
        tensor.check((model.config.text.vocab_size, model.config.text.hidden_size))
    if not np.array_equal(head.values(), embedding.values()):
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
        for index, number in enumerate(layer_numbers(model, key, weight)):
            itemsize = jnp.dtype(dtype or weight.dtype).itemsize
            size = itemsize * weight.size // (weight.shape[0] if stacked else 1)
            if sizes[-1] and sizes[-1] + size > MAX_SHARD_BYTES:
                plan.append([])
                sizes.append(0)
            plan[-1].append((model.config.names.in_file(key.format(number)), weight, index if stacked else None))
            sizes[-1] += size
    weight_map = {}
    for number, tensors in enumerate(plan, start=1):
        name = SINGLE if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        values = {
            key: to_host(weight[...] if layer is None else weight[layer], dtype) for key, weight, layer in tensors
        }
        weight_map |= dict.fromkeys(values, name)
        if jax.process_index() == 0:
            save_file(values, directory / name, metadata={"format": "pt"})
    if len(plan) > 1 and jax.process_index() == 0:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))


def to_host(x: jax.Array, dtype=None) -> np.ndarray:
    """Copies a whole array to the host, gathered from all processes that hold shards; in `dtype`, unless that is None."""
    x = x if dtype is None else x.astype(dtype)
    if not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        x = multihost_utils.process_allgather(x, tiled=True)
    return np.ascontiguousarray(x)


def wait_until_written(model: Model, directory: Path) -> None:
    """Waits for the writing process if the weights are spread over several processes, which then all take part in saving."""
    if not all(x.is_fully_addressable for x in jax.tree.leaves(model)):
        barrier(f"{directory} is written")


def few(names: list[str]) -> str:
    """Lists the first of many names."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
