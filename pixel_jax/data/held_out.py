"""Chooses the held-out examples, on which a run is evaluated and never trained.

The order in which examples are tried follows from their own digests, so that it does not change when rows are added.
Examples about the same pictures are held out together or not at all, because a model that was trained on a picture knows it.
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
    """The key of each example: a digest of its pictures."""
    pictures = digest_sources([example.images for example in examples], digests)
    return [hashlib.sha256("\n".join(x).encode()).hexdigest()[:32] for x in pictures]


def choose(keys: Sequence[str], count: int, seed: int) -> set[str]:
    """Chooses the keys whose examples are held out: at most `count` examples, and all examples of a key or none.

    The order in which keys are tried follows from each key and the seed alone.
    """
    sizes: dict[str, int] = {}
    for key in keys:
        sizes[key] = sizes.get(key, 0) + 1
    chosen: set[str] = set()
    for key in sorted(sizes, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest()):
        if sizes[key] <= count:
            chosen.add(key)
            count -= sizes[key]
    return chosen


def settled(directory: pathlib.Path, keys: Sequence[str], count: int, seed: int, *, begun: bool) -> set[str]:
    """Returns the keys that the run in `directory` holds out: the recorded ones if it has `begun`, else new ones."""
    if begun:
        noted = read_note(directory / FILE, _is_note)
        return set(noted["keys"]) if noted is not None else set()
    chosen = choose(keys, count, seed)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / FILE, {"keys": sorted(chosen), "seed": seed})
    return chosen


def _is_note(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(x, str) for x in value.get("keys", [None]))
