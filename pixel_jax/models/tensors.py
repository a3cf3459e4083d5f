"""Tensors in files: safetensors files are mapped and their headers checked; values are only read when they are used."""

import math
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from pixel_jax.files import FileError, open_regular, parse_json

FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Bits of an element of the other types of the format.
OTHERS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16"), 16),
    **dict.fromkeys(("I32", "U32"), 32),
    **dict.fromkeys(("I64", "U64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
MAX_HEADER = 100_000_000  # bytes, as in the safetensors library
POINTER = b"version https://git-lfs"  # the beginning of what a clone without Git LFS has instead of a file


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file."""

    name: str  # in the file
    file: Path
    shape: tuple[int, ...]
    dtype: str  # the file's name for it
    # Returns the whole tensor; of a mapped file a view, of which only used parts are read.
    values: Callable[[], np.ndarray]

    def error(self, problem: str) -> FileError:
        """Returns an error about the tensor, which names it and its file."""
        return FileError(f"{self.file.parent}: tensor {self.name!r} in {self.file.name} {problem}")

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises FileError if the tensor has another shape, or its numbers are not floating-point."""
        if self.shape != shape:
            raise self.error(f"has shape {self.shape}, expected {shape}")
        if self.dtype not in FLOATS:
            raise self.error(f"has dtype {self.dtype}, expected one of {', '.join(FLOATS)}")


def open_safetensors(path: Path) -> dict[str, Tensor]:
    """Opens the tensors of a safetensors file, by name; the file is mapped as long as one of them is in use.

    Raises:
        FileError: it is no regular file, or its header does not describe its contents.
    """
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        if file.read(len(POINTER)) == POINTER:
            raise FileError(f"{path} is a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`")
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise _damaged(path, f"a header of {length} bytes in a file of {size}")
        header = parse_json(file.read(length), f"{path}: truncated or damaged: its header")
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    start, tensors, ranges = 8 + length, {}, []
    for name, fields in header.items():
        dtype, shape, begin, end = _entry(path, name, fields)
        if end > size - start:
            raise _damaged(path, f"tensor {name!r} ends at byte {start + end} of {size}")
        ranges.append((begin, end))
        view = _view(content, dtype, shape, start + begin)
        tensors[name] = Tensor(name, path, shape, dtype, view)
    ranges.sort()
    if [0, *(end for _, end in ranges)] != [*(begin for begin, _ in ranges), size - start]:
        raise _damaged(path, "its tensors overlap, or leave bytes between or behind them")
    return tensors


def _entry(path: Path, name: str, fields: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Reads (dtype, shape, first byte, last byte + 1) of a tensor from a header."""
    whole = lambda x: isinstance(x, list) and all(type(n) is int and 0 <= n < 2**63 for n in x)
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"tensor {name!r} has no dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    bits = FLOATS[dtype].itemsize * 8 if dtype in FLOATS else OTHERS.get(dtype) if isinstance(dtype, str) else None
    if bits is None or not whole(shape) or not whole(offsets) or len(offsets) != 2:
        raise _damaged(path, f"tensor {name!r} has dtype {dtype!r}, shape {shape!r}, data_offsets {offsets!r}")
    begin, end = offsets
    if end < begin or 8 * (end - begin) != math.prod(shape) * bits:
        raise _damaged(path, f"tensor {name!r} of shape {shape} and dtype {dtype} has {end - begin} bytes")
    return dtype, tuple(shape), begin, end


def _view(content: mmap.mmap, dtype: str, shape: tuple[int, ...], start: int) -> Callable[[], np.ndarray]:
    def values() -> np.ndarray:
        count = math.prod(shape)
        # NumPy refuses an empty view at the end of a buffer.
        flat = np.frombuffer(content, FLOATS[dtype], count, start) if count else np.empty(0, FLOATS[dtype])
        return flat.reshape(shape)

    return values


def _damaged(path: Path, what: str) -> FileError:
    return FileError(f"{path}: truncated or damaged: {what}; copy or download the file again")


def is_finite(values: np.ndarray) -> bool:
    """Whether all numbers are finite. It compares bits, because `np.isfinite` takes five times as long for bfloat16."""
    if not values.size:
        return True
    unsigned = np.dtype(f"u{values.itemsize}")
    infinity = np.array(np.inf, values.dtype).view(unsigned)
    magnitude = unsigned.type(2 ** (8 * values.itemsize - 1) - 1)
    flat = values.reshape(-1).view(unsigned)
    pieces = (flat[i : i + 2**20] for i in range(0, flat.size, 2**20))  # small enough for the processor's cache
    return all((piece & magnitude).max() < infinity for piece in pieces)


def to_safetensors(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Returns the bytes of a safetensors file with these tensors, as transformers and PEFT read it."""
    from safetensors.numpy import save

    return save(dict(tensors), metadata={"format": "pt"})
