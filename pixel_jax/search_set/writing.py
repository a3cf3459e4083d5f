"""Writes the set: a folder for each tier and split, with `items.jsonl` and the pictures, and `set.json`, which says what it is.

`pixel-jax eval` reads a folder as data of one's own (format "jsonl"), `pixel_jax.data.own` describes the fields. Further ones are
`options`, `box` (the marks that show the answer: a list of x1, y1, x2, y2 in pixels), `tier`, `difficulty`, `kind`, `photograph`.
"""

import dataclasses
import hashlib
import importlib.metadata
import io
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from pixel_jax.data.example import Example
from pixel_jax.data.sources import Embedded
from pixel_jax.files import write_file
from pixel_jax.search_set.items import DIFFICULTIES, TIERS, Item, Tier, background, draw_item, suitable
from pixel_jax.search_set.photographs import SHARES, Photograph, in_folder, packaged, split_of
from pixel_jax.state_files import write_json
from pixel_jax.training.progress import ProgressLine

QUALITY = 95  # of the JPEG files, with colour at full resolution
WORKERS = 4  # items drawn at a time; most of the time is Pillow's, which works without the interpreter's lock


@dataclasses.dataclass(frozen=True)
class SetConfig:
    """What makes a set. The same values and the same versions of Pillow and NumPy make the same bytes."""

    photographs: str | None = None  # a folder of large ones; None: those of the Python packages alone
    seed: int = 0
    tiers: tuple[str, ...] = tuple(TIERS)
    share: float = 1.0  # of the usual number of items of each tier

    def __post_init__(self):
        if unknown := [name for name in self.tiers if name not in TIERS]:
            raise ValueError(f"there is no tier {unknown[0]!r}; there are {', '.join(TIERS)}")
        if not self.tiers or not 0 < self.share <= 10:
            raise ValueError(f"a set needs tiers and a share above 0, at most 10: {self.tiers}, {self.share}")


@dataclasses.dataclass(frozen=True)
class Photographs:
    """The photographs of a set by split, and what of the user's folder was left out, a line each."""

    splits: Mapping[str, Sequence[Photograph]]
    left_out: Sequence[str] = ()

    @classmethod
    def of(cls, config: SetConfig) -> "Photographs":
        """Finds the photographs. Those of the packages and those of the folder are split apart, so that each split has both."""
        groups, left_out = [packaged()], []
        if config.photographs is not None:
            found, left_out = in_folder(config.photographs)
            groups.append(found)
        parts = [split_of(group, config.seed) for group in groups]
        return cls({name: [x for part in parts for x in part[name]] for name in SHARES}, left_out)


def count_of(tier: Tier, split: str, share: float = 1.0) -> int:
    """The number of items of a tier in a split."""
    return max(1, round(tier.items * SHARES[split] * share))


def make_item(photographs: Sequence[Photograph], tier: Tier, split: str, number: int, seed: int) -> Item:
    """Makes item `number` of a tier and split: kinds and difficulties take turns, all else is drawn from the four values.

    Args:
        photographs: of the split that are large enough.
        tier: of the set.
        split: a key of `SHARES`.
        number: from 0.
        seed: of the set.
    """
    rng = np.random.default_rng([seed, list(TIERS).index(tier.name), list(SHARES).index(split), number])
    kind = tier.kinds[number % len(tier.kinds)]
    difficulty = DIFFICULTIES[number // len(tier.kinds) % len(DIFFICULTIES)]
    photograph = photographs[int(rng.integers(len(photographs)))]
    return draw_item(rng, background(rng, photograph, tier.size), tier, kind, difficulty, photograph.name)


def encoded(item: Item) -> bytes:
    """The picture of an item as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(item.image).save(file, "JPEG", quality=QUALITY, subsampling=0)
    return file.getvalue()


def name_of(tier: Tier, split: str, number: int) -> str:
    """The id of an item."""
    return f"{tier.name}-{split}-{number:04d}"


def row_of(item: Item, tier: Tier, split: str, number: int) -> dict[str, Any]:
    """The line of an item. The miniature tier asks for the answer itself, the others for the letter of an option."""
    name, plain = name_of(tier, split, number), tier.name == "miniature"
    return {
        "id": name,
        "question": item.question if plain else item.lettered,
        "images": [f"images/{name}.jpg"],
        "answer": item.answer if plain else item.letter,
        "category": item.category,
        "options": list(item.options),
        "box": [list(box) for box in item.boxes],
        "tier": tier.name,
        "difficulty": item.difficulty,
        "kind": item.kind,
        "photograph": item.photograph,
    }


def example_of(item: Item, tier: Tier, split: str, number: int) -> Example:
    """The item as an example, with its picture in memory."""
    row = row_of(item, tier, split, number)
    known = {name: row.pop(name) for name in ("id", "question", "answer", "category")}
    row.pop("images")
    picture = Embedded(encoded(item), known["id"])
    return Example(
        known["id"], known["question"], (picture,), (known["answer"],), category=known["category"], fields=row
    )


def items_of(photographs: Photographs, tier: Tier, split: str, config: SetConfig) -> Iterator[Item]:
    """Makes the items of a tier and split in order, several at a time."""
    chosen = suitable(photographs.splits[split], tier)
    numbers = range(count_of(tier, split, config.share))
    with ThreadPoolExecutor(WORKERS) as pool:
        for start in range(0, len(numbers), 2 * WORKERS):  # so many are in memory
            some = numbers[start : start + 2 * WORKERS]
            yield from pool.map(lambda number: make_item(chosen, tier, split, number, config.seed), some)


def write_set(out: pathlib.Path, config: SetConfig) -> dict[str, Any]:
    """Writes the set into a folder and returns what `set.json` says.

    Raises:
        PhotographError: photographs are missing, or too small for a tier.
    """
    photographs, tiers = Photographs.of(config), [TIERS[name] for name in config.tiers]
    for tier in tiers:  # before anything is written
        for split in SHARES:
            suitable(photographs.splits[split], tier)
    progress = ProgressLine("items", sum(count_of(tier, split, config.share) for tier in tiers for split in SHARES))
    digest, counts, used = hashlib.sha256(), {}, set()
    for tier in tiers:
        for split in SHARES:
            folder = out / tier.name / split
            (folder / "images").mkdir(parents=True, exist_ok=True)
            rows = []
            for number, item in enumerate(items_of(photographs, tier, split, config)):
                data = encoded(item)
                (folder / "images" / f"{name_of(tier, split, number)}.jpg").write_bytes(data)
                digest.update(data)
                rows.append(row_of(item, tier, split, number))
                progress.update(sum(counts.values()) + len(rows), {})
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            write_file(folder / "items.jsonl", lines)
            digest.update(lines.encode())
            counts[f"{tier.name}/{split}"] = len(rows)
            used |= {row["photograph"] for row in rows}
    note = {
        "settings": dataclasses.asdict(config),
        "items": counts,
        "sha256": digest.hexdigest(),  # of all pictures and lines, in order
        "versions": {name: importlib.metadata.version(name) for name in ("pillow", "numpy")},
        "photographs": {
            one.name: {"split": split, "size": list(one.size), "sha256": one.digest()}
            for split, some in photographs.splits.items()
            for one in some
            if one.name in used
        },
        "left_out": list(photographs.left_out),
    }
    write_json(out / "set.json", note)
    return note
