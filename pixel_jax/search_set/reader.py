"""Baselines without a model: python -m pixel_jax.search_set.reader SET.

A reader that knows the font, the shapes and where the marks lie compares each option with what it sees there: in the zoom, or in
the overview enlarged again. It says whether an item can be read at all, and that its overview does not give it away. The set's
test splits are read; `SET/reader.json` has the numbers.
"""

import argparse
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pixel_jax.data.example import Example
from pixel_jax.data.own import read_own
from pixel_jax.evaluation.evidence import boxes_of
from pixel_jax.evaluation.stats import proportion
from pixel_jax.search_set import things
from pixel_jax.search_set.items import TIERS, Tier, place_in_frame, shape_mark
from pixel_jax.state_files import write_json
from pixel_jax.terminal import print_table, table

HEAD = ("tier", "kind", "difficulty", "items", "question only %", "overview, told where %", "zoom, told where %")
Box = Sequence[int]


def fine(image: np.ndarray, factor: int) -> np.ndarray:
    """What of an image [h, w] an overview that is `factor` times smaller does not show, of mean 0 and length 1."""
    blurred = Image.fromarray(image.astype(np.float32)).resize(
        (max(1, image.shape[1] // factor), max(1, image.shape[0] // factor)), Image.Resampling.BOX
    )
    rest = image - np.asarray(blurred.resize(image.shape[::-1], Image.Resampling.BICUBIC))
    rest = rest - rest.mean()
    return rest / (np.linalg.norm(rest) + 1e-6)


def likeness(picture: np.ndarray, box: Box, text: str, factor: int) -> float:
    """How much what lies in a box of a picture, uint8 [h, w, 3], looks like a letter or digit in black or white."""
    x1, y1, x2, y2 = map(int, box)
    seen = picture[y1:y2, x1:x2].mean(axis=2)
    shape = Image.fromarray(things.glyph(text, y2 - y1)).resize((x2 - x1, y2 - y1), Image.Resampling.BICUBIC)
    return float(abs(np.sum(fine(seen, factor) * fine(np.asarray(shape), factor))))


def letter_in(box: Box, shape: str, text: str, height: int) -> Box:
    """Where the letter lies that is inside the frame in a box, as `items.framed` draws it."""
    high, wide = things.glyph(text, height).shape
    x, y = place_in_frame(shape, int(box[2] - box[0]), (wide, high))
    return int(box[0]) + x, int(box[1]) + y, int(box[0]) + x + wide, int(box[1]) + y + high


def colour_of(picture: np.ndarray, box: Box, shape: str, options: Sequence[str], tier: Tier) -> str:
    """The option whose colour the outline of a shape has, beside the rest of its box."""
    x1, y1, x2, y2 = map(int, box)
    seen, lines = picture[y1:y2, x1:x2].astype(float), shape_mark(shape, (0, 0, 0), x2 - x1, tier).cover > 0.5
    change = seen[lines].mean(axis=0) - seen[~lines].mean(axis=0)

    def alike(name: str) -> float:
        wanted = np.array(things.COLOURS[name], float) - seen.mean(axis=(0, 1))
        return float(change @ wanted / (np.linalg.norm(wanted) + 1e-6))

    return max(options, key=alike)


def read_item(picture: np.ndarray, example: Example, tier: Tier) -> str:
    """The option that a picture shows, read where the marks lie."""
    fields, boxes = example.fields, boxes_of(example)
    assert boxes is not None
    options, kind, question = fields["options"], fields["kind"], example.question.splitlines()[0]

    def alike(box: Box, text: str) -> float:
        return likeness(picture, box, text, tier.factor)

    match kind:
        case "colour":
            return colour_of(picture, boxes[0], question.split()[4].rstrip("?"), options, tier)
        case "letter" | "digit":
            framed = kind == "letter" and fields["difficulty"] == "hard"
            frame, height = question.split()[-1].rstrip("?"), tier.marks[-1]
            where = lambda text: letter_in(boxes[0], frame, text, height) if framed else boxes[0]
            return max(options, key=lambda text: alike(where(text), text))
        case "larger":
            left, right = (max(things.DIGITS, key=lambda text: alike(box, text)) for box in boxes)  # noqa: B023
            return "left" if left > right else "right"
        case _:  # which of the two letters lies where
            one, other = question.split("letter ")[1][0], question.split("letter ")[-1][0]
            same = alike(boxes[0], one) + alike(boxes[1], other) >= alike(boxes[0], other) + alike(boxes[1], one)
            first, second = (boxes[0], boxes[1]) if same else (boxes[1], boxes[0])
            axis = int("above" in options)
            before, after = (("left", "right"), ("above", "below"))[axis]
            return before if first[axis] < second[axis] else after


def overview_of(picture: np.ndarray, tier: Tier) -> np.ndarray:
    """The overview of a picture, enlarged to its size again."""
    small = Image.fromarray(picture).resize(tier.overview, Image.Resampling.BICUBIC)
    return np.asarray(small.resize(tier.size, Image.Resampling.BICUBIC))


def read_set(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Reads the test splits of a set: for each tier, kind and difficulty the items and the shares that are right.

    The share of "question only" is what guessing among the options gives on average.
    """
    views: dict[str, Callable[[np.ndarray, Tier], np.ndarray]] = {
        "overview": overview_of,
        "zoom": lambda picture, tier: picture,
    }
    rows = []
    for tier in (TIERS[name] for name in TIERS if (folder / name / "test").is_dir()):
        groups: dict[tuple[str, str], dict[str, list]] = {}
        for example in read_own(folder / tier.name / "test"):
            (picture,), options = example.query().images, example.fields["options"]
            group = groups.setdefault(
                (example.fields["kind"], example.fields["difficulty"]), {"guess": [], **{x: [] for x in views}}
            )
            group["guess"].append(1 / len(options))
            for name, view in views.items():
                read = read_item(view(picture, tier), example, tier)
                group[name].append(example.answer[0] in (read, "ABCD"[options.index(read)]))
        rows += [
            {"tier": tier.name, "kind": kind, "difficulty": difficulty, "items": len(group["guess"]),
             "guess": float(np.mean(group["guess"])), **{name: proportion(group[name]) for name in views}}
            for (kind, difficulty), group in sorted(groups.items())
        ]  # fmt: skip
    return rows


def percent(share: dict[str, float]) -> str:
    """A share with its interval."""
    return f"{100 * share['mean']:.0f} [{100 * share['low']:.0f}, {100 * share['high']:.0f}]"


def main() -> None:
    """Reads the set that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m pixel_jax.search_set.reader", description=__doc__)
    parser.add_argument("set", type=pathlib.Path, help="the folder of the set")
    folder = parser.parse_args().set
    rows = read_set(folder)
    write_json(folder / "reader.json", {"rows": rows})
    print_table(
        table(
            HEAD,
            [
                [
                    x["tier"],
                    x["kind"],
                    x["difficulty"],
                    str(x["items"]),
                    f"{100 * x['guess']:.0f}",
                    percent(x["overview"]),
                    percent(x["zoom"]),
                ]
                for x in rows
            ],
            words=3,
        )
    )


if __name__ == "__main__":
    main()
