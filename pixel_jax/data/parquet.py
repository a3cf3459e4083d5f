"""Rows of Parquet files, read a few at a time."""

import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from pixel_jax.files import open_regular
from pixel_jax.terminal import brief

BATCH = 256  # rows that are in memory together, pictures included if the file holds them


def error_kinds() -> tuple[type[Exception], ...]:
    """The errors of a damaged file: pyarrow's, the system's, and that of a column name that is no UTF-8."""
    try:
        from pyarrow import ArrowException
    except ImportError:
        return (OSError, UnicodeDecodeError)
    return (ArrowException, OSError, UnicodeDecodeError)


def open_parquet(path: pathlib.Path, opened: BinaryIO, error: Callable[[str], Exception]):
    """Opens a file as pyarrow's. Raises `error` if it is no Parquet file, or pyarrow is missing."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise error(f"{path} is a Parquet file: `pip install pyarrow` to read it") from None
    try:
        return parquet.ParquetFile(opened)
    except error_kinds() as reason:
        raise error(f"{path} cannot be read: {reason}") from None


def column_names(path: pathlib.Path, error: Callable[[str], Exception]) -> list[str]:
    """The names of the columns of a Parquet file. Raises `error` if it cannot be read."""
    with open_regular(path, error) as opened, open_parquet(path, opened, error) as file:
        try:
            return file.schema_arrow.names
        except error_kinds() as reason:
            raise error(f"{path} cannot be read: {reason}") from None


def parquet_rows(
    path: pathlib.Path, columns: Sequence[str] | None, error: Callable[[str], Exception]
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Iterates over the rows of a Parquet file: the position of each, for messages, and a function that reads it.

    Args:
        path: the file.
        columns: the columns to read; None: all.
        error: raised if the file cannot be read, lacks a column, or has two of one name.
    """

    def read(batch, index: int, where: str) -> dict[str, Any]:
        row = {}
        for name in batch.schema.names:
            try:
                row[name] = batch.column(name)[index].as_py()
            except ValueError as reason:  # also pyarrow's own: a text that is no UTF-8
                raise error(f"{where}: {name!r} cannot be read: {reason}") from None
        return row

    number = 0
    try:
        with open_regular(path, error) as opened, open_parquet(path, opened, error) as file:
            names = file.schema_arrow.names
            if missing := [name for name in columns or () if name not in names]:
                raise error(f"{path} has no column {missing[0]!r}, only {brief(names)}")
            if twice := [name for name in names if names.count(name) > 1]:
                raise error(f"{path} has two columns {brief(twice[0])}")
            for batch in file.iter_batches(batch_size=BATCH, columns=None if columns is None else list(columns)):
                for index in range(batch.num_rows):
                    number += 1
                    where = f"{path}, row {number}"
                    yield where, lambda batch=batch, index=index, where=where: read(batch, index, where)
    except error_kinds() as reason:
        raise error(f"{path} cannot be read: {reason}") from None
