"""Reads and writes models as Hugging Face directories, and computes logits for arrays in the Hugging Face layout."""

import functools
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.files import FileError, read_json, settle, sync_directory
from pixel_jax.models.checkpoint import is_weight_file, load_weights, open_weights, save_weights, wait_until_written
from pixel_jax.models.config import CONFIG, ModelConfig
from pixel_jax.models.families import read_config
from pixel_jax.models.gguf_files import find_gguf, read_gguf
from pixel_jax.models.model import LanguageModel, Model
from pixel_jax.models.peft import CONFIG as ADAPTER
from pixel_jax.models.peft import FOLDER, WEIGHTS, PEFTConfig, load_adapter, open_adapter
from pixel_jax.models.processor import Processor
from pixel_jax.models.side_files import is_side_file
from pixel_jax.models.tensors import Tensor
from pixel_jax.terminal import warn

ADAPTER_FILES = (f"{FOLDER}/{ADAPTER}", f"{FOLDER}/{WEIGHTS}")  # of an adapter that was merged into the model beside it
UNFINISHED = ".saving"  # folder in a model directory, in which a model is written until it is complete


def from_pretrained(
    path: str | os.PathLike[str],
    mesh: jax.sharding.Mesh | None = None,
    dtype=None,
    adapter: str | os.PathLike[str] | None = None,
) -> tuple[Model, Processor | None]:
    """Reads a directory with config.json and safetensors files, or a GGUF file.

    Args:
        path: the directory, or the file.
        mesh: shards the weights by their logical axes; None: one device.
        dtype: of the weights. None keeps the files'; if they mix several, all get the one that `config.json` names.
        adapter: directory of an adapter (`load_adapter`) to put on the model.

    Returns:
        The model, and its processor, or None if the directory has neither tokenizer nor preprocessor files.

    Raises:
        FileNotFoundError: it is no model directory.
        FileError: a file is not what it should be. The message names it, and the field or tensor at fault.
    """
    directory = Path(path)
    config, tensors, processor, config_dtype = open_model(directory)
    if adapter is not None:  # before the weights are read, which takes long
        _warn_of_another(directory, open_adapter(Path(adapter)), adapter)
    abstract = jax.eval_shape(functools.partial(LanguageModel, config), jax.random.key(0))
    if mesh is None:
        one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: one_device, abstract)
    else:
        from pixel_jax.parallel.sharding import shardings as shardings_of

        shardings = shardings_of(abstract, mesh)
    model = load_weights(abstract, tensors, directory, shardings, dtype, config_dtype=config_dtype)
    if adapter is not None:
        model = load_adapter(model, adapter)
    return model, processor


class ModelFiles(NamedTuple):
    """An opened model, whose weights have not been read."""

    config: ModelConfig
    tensors: Mapping[str, Tensor]  # by our names of them
    processor: Processor | None
    config_dtype: str | None  # that `config.json` names


def open_model(path: str | os.PathLike[str]) -> ModelFiles:
    """Opens a directory or a GGUF file, and reads everything but the weights.

    Raises:
        FileNotFoundError: it is no model directory.
        FileError: a file is not what it should be.
    """
    directory, gguf = _located(path)
    if gguf is not None:
        return ModelFiles(*read_gguf(gguf), None)
    config, config_dtype = read_config(directory)
    tensors = open_weights(directory, config.names)
    return ModelFiles(config, tensors, Processor.from_directory(directory, config), config_dtype)


def read_network(path: str | os.PathLike[str]) -> ModelConfig:
    """Reads the configuration of a model directory or GGUF file.

    Raises:
        FileNotFoundError: it is no model directory.
        FileError: a file is not what it should be.
    """
    directory, gguf = _located(path)
    return read_config(directory)[0] if gguf is None else read_gguf(gguf)[0]


def _located(path: str | os.PathLike[str]) -> tuple[Path, Path | None]:
    """Returns the path of a model, and its GGUF file if it has no `config.json`; FileNotFoundError if it has neither."""
    directory = Path(path)
    if (directory / CONFIG).exists():
        return directory, None
    if (gguf := find_gguf(directory)) is not None:
        return directory, gguf
    raise FileNotFoundError(f"{directory} is not a model directory: it has no {CONFIG}{_what_it_is(directory)}")


def _what_it_is(directory: Path) -> str:
    """Says what a path holds instead of a model, as the end of a message."""
    if not directory.exists():
        return f". There is nothing at {directory.absolute()}, and models are not downloaded: give the directory of one"
    if (directory / ADAPTER).is_file():
        try:
            base = read_json(directory / ADAPTER, limit=2**24)["base_model_name_or_path"]
        except (FileError, LookupError, TypeError):
            base = "its base model"
        return f". It holds an adapter ({ADAPTER}): give the directory of {repr(base)[:100]}, and this one as `adapter`"
    if directory.is_file():
        return ". It is a file: give the directory that it is in, or a GGUF file"
    if (directory / UNFINISHED).is_dir():
        return f". Saving a model there was cut short ({UNFINISHED}): save it again"
    if inside := sorted(str(path.parent) for path in directory.glob(f"*/{CONFIG}")):
        return f". It holds {'one' if len(inside) == 1 else 'several'}: {', '.join(inside[:3])}"
    if any(is_weight_file(path.name) for path in directory.glob("*.safetensors*")):
        return ", which belongs beside its weights: copy or download it, too"
    return ": give a directory with one and safetensors files, as Hugging Face's have them"


def _warn_of_another(directory: Path, config: PEFTConfig, adapter: str | os.PathLike[str]) -> None:
    """Warns if an adapter names another directory as its base: on its merged model it would count twice."""
    base = config.base
    if base is not None and (Path(base) / CONFIG).is_file() and Path(base).resolve() != directory.resolve():
        warn(f"the adapter {adapter} belongs to the model {base}, and is put on {directory}")


def save_pretrained(model: Model, processor: Processor | None, path: str | os.PathLike[str], dtype=None) -> None:
    """Writes a model, whose adapters have been merged, as a directory that `from_pretrained` reads.

    Afterwards the directory holds this model and no part of an earlier one. The earlier model is whole until the new one is on
    the disk; while it is replaced there is no `config.json`, so that neither can be read. If the weights are spread over several
    processes, all must call it; the first writes, and none returns before the model is complete.

    Args:
        model: without adapters.
        processor: its tokenizer's and preprocessor's files, and `generation_config.json`, are written as they were read.
            None leaves those in the directory as they are.
        path: the directory, which is created if it does not exist.
        dtype: of the weights in the files; None: each has its own.
    """
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    unfinished = directory / UNFINISHED
    if jax.process_index() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
    save_weights(model, unfinished, dtype)
    if jax.process_index() == 0:
        values = {**model.config.to_hf(), "torch_dtype": jnp.dtype(dtype or dtype_of(model)).name}
        (unfinished / CONFIG).write_text(json.dumps(values, indent=2))
        if processor is not None:
            processor.save(unfinished)
        _put_in_place(unfinished, directory, sides=processor is not None)
    wait_until_written(model, directory)


def dtype_of(model: Model) -> str:
    """The dtype of a model's weights for `config.json`: that of its embedding."""
    return jnp.dtype(model.dtype).name


def _put_in_place(unfinished: Path, directory: Path, sides: bool) -> None:
    """Moves a saved model into its directory, and removes the files of an older one; with `sides` its side files, too."""
    names = {str(path.relative_to(unfinished)) for path in unfinished.rglob("*") if path.is_file()}
    for name in names:
        settle(unfinished / name)
    sync_directory(unfinished)
    before = {str(path.relative_to(directory)) for path in (*directory.glob("*"), *directory.glob("*/*"))}
    (directory / CONFIG).unlink(missing_ok=True)
    sync_directory(directory)
    for name in names - {CONFIG}:
        (directory / name).parent.mkdir(exist_ok=True)
        os.replace(unfinished / name, directory / name)
    for name in before - names:
        if is_weight_file(name) or name in ADAPTER_FILES or (sides and is_side_file(name)):
            (directory / name).unlink()
    sync_directory(directory)
    os.replace(unfinished / CONFIG, directory / CONFIG)
    sync_directory(directory)
    shutil.rmtree(unfinished)


def forward(
    model: Model,
    *,
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None = None,
    pixel_values: np.ndarray | None = None,
    image_grid_thw: np.ndarray | None = None,
    pixel_values_videos: np.ndarray | None = None,
    video_grid_thw: np.ndarray | None = None,
    second_per_grid_ts: np.ndarray | None = None,
    position_ids: np.ndarray | None = None,
) -> np.ndarray:
    """Computes logits float32 [batch, length, vocab] for arrays in the Hugging Face layout, of any size.

    input_ids, attention_mask: [batch, length], padding on either side; logits at padding are meaningless
    pixel_values(_videos):     [patches of all images (videos) of the batch, 1176], in the order in which their placeholder
                               tokens appear, row by row
    image/video_grid_thw:      [items, 3]
    second_per_grid_ts:        [videos], 1.0 if not given
    position_ids:              [3, batch, length], computed if not given
    Lengths, patches and items are padded to powers of two, so that few shapes are compiled.
    """
    tokens = np.asarray(input_ids, np.int32)
    if tokens.ndim != 2:
        raise ValueError(f"input_ids must be [batch, length], got shape {tokens.shape}")
    vocab = model.config.text.vocab_size
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab:
        raise ValueError(f"input_ids must lie in [0, {vocab}), got {tokens.min()} to {tokens.max()}")
    valid = np.ones(tokens.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
    if valid.shape != tokens.shape:
        raise ValueError(f"attention_mask has shape {valid.shape}, input_ids {tokens.shape}")
    rows: list[list] = [[] for _ in tokens]
    if model.config.vision is not None:
        images = _Items("image", *patched(pixel_values, image_grid_thw, model.config), model.config)
        seconds_of = {"seconds": second_per_grid_ts, "default_seconds": 1.0}
        videos = _Items("video", pixel_values_videos, video_grid_thw, model.config, **seconds_of)
        rows = [_row_items(r, tokens[r][valid[r]], images, videos, model.config) for r in range(len(tokens))]
        for items in (images, videos):
            if items.used != len(items.grids):
                raise ValueError(f"input_ids show {items.used} {items.kind}s, the grids describe {len(items.grids)}")
    elif pixel_values is not None or pixel_values_videos is not None:
        raise ValueError(f"a model of the family {model.config.model_type!r} sees no images and no videos")

    batch, length = tokens.shape
    padded = _bucket(length, 32)
    grow = lambda x, axis: np.pad(x, [(0, padded - length if i == axis else 0) for i in range(x.ndim)])
    pixels, hw, grids, seconds = _pack(rows, model.config)
    if position_ids is not None:
        position_ids = np.asarray(position_ids, np.int32)
        if position_ids.shape != (3, batch, length):
            raise ValueError(f"position_ids must be {(3, batch, length)}, got shape {position_ids.shape}")
        position_ids = grow(position_ids, 2)
    logits = _logits(model, grow(tokens, 1), grow(valid, 1), pixels, hw, grids, seconds, position_ids)
    return np.asarray(logits)[:, :length]


@jax.jit
def _logits(model, tokens, valid, pixels, hw, grids, seconds, positions):
    """Logits of pixels [B, S, P, 1176] and hw [B, S, 2] (None: nothing to see); positions [3, B, T] or None."""
    tokens = jnp.where(valid, tokens, 0)
    features = None
    if pixels is not None:
        features = model.encode(pixels.reshape(-1, *pixels.shape[2:]), hw.reshape(-1, 2))
        features = features.reshape(*pixels.shape[:2], *features.shape[1:])
    if positions is None:
        start = jnp.zeros(tokens.shape[:1], jnp.int32)
        positions, _ = model.positions(tokens, valid, grids, seconds, start)
    return model.logits(model.backbone(model.embed(tokens, features, grids), positions, valid))


def patched(pixel_values, grids, config: ModelConfig):
    """Pixel values and grids of images; those of a family whose images have one size are [images, 3, height, width]."""
    vision = config.vision
    assert vision is not None
    if vision.fixed_grid is None or pixel_values is None:
        return pixel_values, grids
    (high, wide), side = vision.fixed_grid, vision.patch_size
    pixels = np.asarray(pixel_values, np.float32)
    expected = (vision.in_channels, high * side, wide * side)
    if pixels.ndim != 4 or pixels.shape[1:] != expected:
        raise ValueError(
            f"pixel values of images must be [images, {', '.join(map(str, expected))}], got {pixels.shape}"
        )
    cells = pixels.reshape(len(pixels), vision.in_channels, high, side, wide, side).transpose(0, 2, 4, 1, 3, 5)
    return cells.reshape(-1, vision.patch_dim), np.tile([1, high, wide], (len(pixels), 1))


class _Items:
    """The images or the videos of a batch, handed out in order."""

    def __init__(self, kind, pixels, grids, config, seconds=None, default_seconds=0.0):
        self.kind, self.used, self.offset = kind, 0, 0
        if (pixels is None) != (grids is None):
            raise ValueError(f"pixel values and grids of {kind}s must be given together")
        self.pixels = (
            np.zeros((0, config.vision.patch_dim), np.float32) if pixels is None else np.asarray(pixels, np.float32)
        )
        self.grids = np.zeros((0, 3), np.int32) if grids is None else np.asarray(grids, np.int32)
        if self.grids.ndim != 2 or self.grids.shape[1] != 3:
            raise ValueError(f"{kind} grids must be [items, 3], got shape {self.grids.shape}")
        merge = config.vision.spatial_merge_size
        for grid in self.grids:
            if grid.min() < 1 or grid[1] % merge or grid[2] % merge:
                raise ValueError(f"{kind} grid {grid.tolist()} must be positive, height and width multiples of {merge}")
        expected = (int(self.grids.prod(axis=1).sum()), config.vision.patch_dim)
        if self.pixels.shape != expected:
            raise ValueError(f"pixel values of {kind}s have shape {self.pixels.shape}, their grids need {expected}")
        if kind == "video" and config.splits_videos:
            self.grids = np.repeat(self.grids, self.grids[:, 0], axis=0)
            self.grids[:, 0] = 1
            seconds = None  # the text says when
        self.seconds = np.full(len(self.grids), default_seconds, np.float32)
        if seconds is not None:
            if np.shape(seconds) != (len(self.grids),):
                raise ValueError(f"second_per_grid_ts has shape {np.shape(seconds)} for {len(self.grids)} videos")
            self.seconds = np.asarray(seconds, np.float32)

    def next(self):
        """Takes the next item: (grid, patches [t, h * w, 1176], seconds)."""
        grid, seconds = self.grids[self.used], self.seconds[self.used]
        count = int(grid.prod())
        patches = self.pixels[self.offset : self.offset + count].reshape(grid[0], -1, self.pixels.shape[1])
        self.used, self.offset = self.used + 1, self.offset + count
        return grid, patches, seconds


def _row_items(row: int, tokens: np.ndarray, images: _Items, videos: _Items, config: ModelConfig) -> list:
    """The items that the placeholder tokens of a row stand for, in order of appearance."""
    assert config.vision is not None
    visual = tokens[np.isin(tokens, config.visual_tokens)]
    row_items, at = [], 0
    while at < len(visual):
        items = images if visual[at] == config.visual_tokens[0] else videos
        if items.used == len(items.grids):
            raise ValueError(f"row {row} shows more {items.kind}s than the {len(items.grids)} given")
        row_items.append(items.next())
        need = math.prod(config.vision.token_grid(tuple(row_items[-1][0].tolist()))) // config.vision.merge_unit
        have = int((visual[at : at + need] == visual[at]).sum())
        if have != need:
            grid = row_items[-1][0].tolist()
            raise ValueError(
                f"row {row}: {items.kind} {items.used - 1} with grid {grid} needs {need} tokens, has {have}"
            )
        at += need
    return row_items


def _pack(rows: list[list], config: ModelConfig):
    """Items of each row -> pixels [B, S, P, 1176], hw [B, S, 2], grids [B, K, 3], seconds [B, K]; first two None if empty."""
    most = max(len(items) for items in rows)
    if most == 0:
        return None, None, np.zeros((len(rows), 0, 3), np.int32), np.zeros((len(rows), 0), np.float32)
    assert config.vision is not None
    num_slices = _bucket(max(sum(int(grid[0]) for grid, _, _ in items) for items in rows), 1)
    num_patches = _bucket(max(patches.shape[1] for items in rows for _, patches, _ in items), 16)
    pixels = np.zeros((len(rows), num_slices, num_patches, config.vision.patch_dim), np.float32)
    hw = np.zeros((len(rows), num_slices, 2), np.int32)
    grids = np.zeros((len(rows), _bucket(most, 1), 3), np.int32)
    seconds = np.zeros(grids.shape[:2], np.float32)
    for r, items in enumerate(rows):
        at = 0
        for k, (grid, patches, interval) in enumerate(items):
            grids[r, k], seconds[r, k] = config.vision.token_grid(tuple(grid.tolist())), interval
            pixels[r, at : at + grid[0], : patches.shape[1]] = patches
            hw[r, at : at + grid[0]] = grid[1:]
            at += int(grid[0])
    return pixels, hw, grids, seconds


def _bucket(n: int, least: int) -> int:
    """The smallest power of two that is at least n and `least`."""
    return max(least, 1 << (n - 1).bit_length())
