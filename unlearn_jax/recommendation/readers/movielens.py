"""Files of MovieLens-100K as GroupLens releases it: u.data (user, item, rating, time) and u.item (latin-1, parted by "|")."""

import pathlib
import re

from pixel_jax.files import FileError, read_bytes
from unlearn_jax.recommendation.ratings import Rated, Ratings, as_said


def read_movielens(directory: pathlib.Path) -> Ratings:
    """Reads the ratings, and the titles without their years.

    Raises:
        FileError: a line has too few fields, or names an unknown item.
    """
    titles = {}
    for row in _lines(directory / "u.item", "|", 2):
        titles[row[0]] = as_said(re.sub(r"\s*\(\d{4}\)$", "", row[1]))
    rated: dict[str, list[tuple[float, str, float]]] = {}
    for user, item, rating, at in _lines(directory / "u.data", "\t", 4):
        if item not in titles:
            raise FileError(f"{directory / 'u.data'}: item {item!r} is not in u.item")
        rated.setdefault(user, []).append((float(at), item, float(rating)))
    in_time = {user: sorted(found, key=lambda x: x[0]) for user, found in rated.items()}
    return Ratings(titles, {user: tuple(Rated(x, r) for _, x, r in found) for user, found in in_time.items()})


def _lines(path: pathlib.Path, mark: str, fields: int) -> list[list[str]]:
    rows = []
    for number, line in enumerate(read_bytes(path).decode("latin-1").split("\n"), 1):
        if not line.strip():
            continue
        row = line.rstrip("\r").split(mark)
        if len(row) < fields:
            raise FileError(f"{path}:{number} has {len(row)} fields, not {fields}")
        rows.append(row if mark == "|" else row[:fields])
    return rows
