"""The photographs of the set: those that come with scikit-image and scikit-learn, and a folder of larger ones.

A photograph belongs to one split. Pictures of one scene (several sizes of a wallpaper, a night version) count as one photograph,
the largest of them.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pixel_jax.data.images import ImageError, image_size, read_image
from pixel_jax.files import read_bytes

# Of scikit-image's own directory and scikit-learn's, none of which is fetched. The photographs that objects are cut out of
# (`things.CUT_OUTS`) are no backgrounds, because the same objects lie in all splits.
SCIKIT_IMAGE = (
    "astronaut.png", "brick.png", "camera.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
    "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
SCIKIT_LEARN = ("china.jpg", "flower.jpg")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LEAST_SIDE = 400  # pixels of the shorter side of a picture in a folder; smaller ones are icons and previews
ALIKE = 8  # bits of 64 that may differ between two pictures of one scene
SHARES = {"train": 0.6, "val": 0.1, "test": 0.3}  # of the photographs
NAME_OF_A_SIZE = ("images", "images_dark", "contents", "screenshots")  # folders inside a wallpaper of KDE


class PhotographError(ValueError):
    """A folder without usable photographs. The message names it."""


@dataclasses.dataclass(frozen=True)
class Photograph:
    """A photograph that things are hidden in."""

    name: str  # unique, the same on every machine
    path: pathlib.Path
    size: tuple[int, int]  # (width, height)

    def digest(self) -> str:
        """The SHA-256 of its file."""
        return hashlib.sha256(read_bytes(self.path)).hexdigest()


@functools.lru_cache(maxsize=4)
def pixels(photograph: Photograph) -> Image.Image:
    """The pixels of a photograph, as `pixel_jax.data.images.read_image` returns them."""
    return Image.fromarray(read_image(photograph.path))


def packaged() -> list[Photograph]:
    """The photographs of scikit-image and scikit-learn, by their names.

    Raises:
        PhotographError: a package is missing, or lacks a photograph.
    """
    try:
        import skimage
        import sklearn
    except ImportError as error:
        raise PhotographError(f"{error}: `pip install scikit-image scikit-learn` has the photographs") from None
    folders = {
        pathlib.Path(skimage.__file__).parent / "data": SCIKIT_IMAGE,
        pathlib.Path(sklearn.__file__).parent / "datasets" / "images": SCIKIT_LEARN,
    }
    return [_photograph(folder / name, name) for folder, names in folders.items() for name in names]


def in_folder(folder: str | os.PathLike) -> tuple[list[Photograph], list[str]]:
    """The photographs in a folder and below it, one of each scene, by their names.

    Returns:
        The photographs, and what was left out with the reason, a line each.

    Raises:
        PhotographError: there are none.
    """
    root, left_out = pathlib.Path(folder), []
    if not root.is_dir():
        raise PhotographError(f"{root} is no folder")
    found: dict[str, Photograph] = {}
    for path in sorted(x for x in root.rglob("*") if x.suffix.lower() in SUFFIXES and x.is_file()):
        name = scene_name(path.relative_to(root))
        try:
            one = _photograph(path, name)
        except PhotographError as error:
            left_out.append(str(error))
            continue
        if min(one.size) < LEAST_SIDE:
            left_out.append(f"{path}: {one.size[0]} x {one.size[1]} pixels, smaller than {LEAST_SIDE}")
            continue
        best = found.get(name)
        if best is None or area(one) > area(best):
            found[name] = one
    chosen: list[Photograph] = []
    hashes: list[int] = []
    for one in sorted(found.values(), key=lambda x: (-area(x), x.name)):
        bits = outline_of(one)
        twin = next((x for x, other in zip(chosen, hashes, strict=True) if (bits ^ other).bit_count() <= ALIKE), None)
        if twin is None:
            chosen.append(one)
            hashes.append(bits)
        else:
            left_out.append(f"{one.path}: of the same scene as {twin.path}")
    if not chosen:
        raise PhotographError(f"{root} holds no photographs ({', '.join(SUFFIXES)} of at least {LEAST_SIDE} pixels)")
    return sorted(chosen, key=lambda x: x.name), left_out


def scene_name(path: pathlib.Path) -> str:
    """The name of a picture's scene: of KDE's `NAME/contents/images/1920x1080.jpg` NAME, else the path without its ending."""
    parts = [part for part in path.parent.parts if part not in NAME_OF_A_SIZE]
    if len(parts) < len(path.parent.parts):
        return "/".join(parts)
    return "/".join([*parts, path.stem])


def area(photograph: Photograph) -> int:
    """The number of its pixels."""
    return photograph.size[0] * photograph.size[1]


def outline_of(photograph: Photograph) -> int:
    """64 bits that two pictures of a scene nearly share: whether brightness rises from one of 8 x 9 cells to the next."""
    small = np.asarray(pixels(photograph).convert("L").resize((9, 8), Image.Resampling.BOX), np.int32)
    return int("".join("01"[int(x)] for x in (small[:, 1:] > small[:, :-1]).ravel()), 2)


def split_of(photographs: Sequence[Photograph], seed: int) -> dict[str, list[Photograph]]:
    """The photographs of each split; which one a photograph is in follows from its name, the seed and its rank among all.

    Raises:
        PhotographError: there are fewer than splits.
    """
    if len(photographs) < len(SHARES):
        raise PhotographError(f"{len(photographs)} photographs are too few for the splits {', '.join(SHARES)}")
    order = sorted(photographs, key=lambda x: hashlib.sha256(f"{seed} {x.name}".encode()).digest())
    counts = {name: max(1, round(share * len(order))) for name, share in SHARES.items()}
    counts["train"] = len(order) - counts["val"] - counts["test"]
    splits, start = {}, 0
    for name, count in counts.items():
        splits[name] = order[start : start + count]
        start += count
    return splits


def _photograph(path: pathlib.Path, name: str) -> Photograph:
    try:
        height, width = image_size(path)
    except ImageError as error:
        raise PhotographError(str(error)) from None
    return Photograph(name, path, (width, height))
