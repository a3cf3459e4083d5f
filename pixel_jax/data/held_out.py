"""Examples that a run is judged by and never trained on: chosen by what they hold, so that other rows move none of them.

Examples about the same pictures are held out together, or not at all: a model that was trained on a picture knows it.
"""

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

from pixel_jax.data.digests import Digests, digest_sources
from pixel_jax.data.example import Example
from pixel_jax.state_files import read_note, write_json

FILE = "held_out.json"


def keys_of(examples: Sequence[Example], digests: Digests) -> list[str]:
    """What an example is about: a digest of its pictures."""
    found = digest_sources([example.images for example in examples], digests)
    return [hashlib.sha256("\n".join(pictures).encode()).hexdigest()[:32] for pictures in found]


def choose(keys: Sequence[str], count: int, seed: int) -> set[str]:
    """Keys whose examples are held out: as many examples as fit `count`, none of which shares its key with others.

    The order in which keys are tried follows from each key and the seed alone.
    """
    sizes: dict[str, int] = {}
    for key in keys:
        sizes[key] = sizes.get(key, 0) + 1
    found: set[str] = set()
    for key in sorted(sizes, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest()):
        if sizes[key] <= count:
            found.add(key)
            count -= sizes[key]
    return found


def settled(directory: pathlib.Path, keys: Sequence[str], count: int, seed: int, *, begun: bool) -> set[str]:
    """The keys that the run in `directory` holds out: where it has begun those that it noted, else new ones, which are noted."""
    if begun:
        noted = read_note(directory / FILE, _is_note)
        return set(noted["keys"]) if noted is not None else set()
    found = choose(keys, count, seed)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / FILE, {"keys": sorted(found), "seed": seed})
    return found


def _is_note(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(x, str) for x in value.get("keys", [None]))
