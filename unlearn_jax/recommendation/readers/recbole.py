"""Files of RecBole: NAME.inter and NAME.item, tables whose columns are called name:type.

The format is that of https://recbole.io/docs/user_guide/data/atomic_files.html; RecBole's wheel has MovieLens-100K in it.
"""

import csv
import pathlib

from pixel_jax.files import FileError, read_bytes
from unlearn_jax.recommendation.ratings import Rated, Ratings, as_said


def read_recbole(directory: pathlib.Path) -> Ratings:
    """Reads the ratings and titles of the only data set in a directory.

    Raises:
        FileError: the directory holds no or several data sets, or a file lacks a column.
    """
    files = sorted(directory.glob("*.inter"))
    if len(files) != 1:
        raise FileError(f"{directory} holds {len(files)} files *.inter, not one")
    items = _table(files[0].with_suffix(".item"), ("item_id", "movie_title"))
    titles = {row["item_id"]: as_said(row["movie_title"]) for row in items}
    rated: dict[str, list[tuple[float, str, float]]] = {}
    for row in _table(files[0], ("user_id", "item_id", "rating", "timestamp")):
        if row["item_id"] not in titles:
            raise FileError(f"{files[0]}: item {row['item_id']!r} is not in {files[0].with_suffix('.item').name}")
        rated.setdefault(row["user_id"], []).append((float(row["timestamp"]), row["item_id"], float(row["rating"])))
    # Films of one second stay in the order of the file.
    in_time = {user: sorted(found, key=lambda x: x[0]) for user, found in rated.items()}
    return Ratings(titles, {user: tuple(Rated(x, r) for _, x, r in found) for user, found in in_time.items()})


def _table(path: pathlib.Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    lines = read_bytes(path).decode("utf-8").splitlines()
    table = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    rows = [{name.split(":")[0]: value for name, value in row.items() if name is not None} for row in table]
    for number, row in enumerate(rows, 2):
        if lacking := [name for name in columns if row.get(name) is None]:
            raise FileError(f"{path}:{number} has no {lacking[0]!r}")
    return rows
