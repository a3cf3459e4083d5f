"""The released files of TOFU and MUSE as a corpus.

TOFU (Hugging Face `locuslab/TOFU`): JSON lines `full.json`, `forget01.json`, ..., with `question` and `answer`;
`*_perturbed.json` have `paraphrased_answer` (a text) and `perturbed_answer` (a list) as well, `real_authors_perturbed.json` and
`world_facts_perturbed.json` only the latter. Fields of the last two were read in the authors' repository (locuslab/tofu,
`data/`), those of the others in its configuration and loaders; `holdout01.json`, ... are taken to be like `forget01.json`.

MUSE (Hugging Face `muse-bench/MUSE-News`, `-Books`): `raw/forget`, `raw/retain1`, `raw/retain2` (or `raw/retain1` alone),
`privleak/holdout` of texts, `knowmem/forget_qa`, `knowmem/retain_qa` of `question` and `answer`, `verbmem/forget` of `prompt` and
`gt`; each a JSON array, JSON lines, or Parquet. The array of `knowmem` was read in the authors' repository; `text`, `prompt`,
`gt` in the data sets' cards. A text may stand alone or in the field `text`.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

from pixel_jax.files import parse_json, read_bytes
from unlearn_jax.people.corpus import SHARES, Corpus, QuestionRow

LIMIT = 2**28  # bytes of a file


class CorpusError(ValueError):
    """Files that differ from the released ones. The message names the file and the remedy."""


def read_tofu(directory: pathlib.Path) -> Corpus:
    """Reads TOFU's files in a directory.

    Raises:
        CorpusError: `full.json`, or every forget set, is missing; a field is missing or of another type; a question of a
            forget set is not in `full.json`.
    """
    full = list(_rows(_find(directory, "full"), "question", "answer"))
    alternatives: dict[tuple[str, str], QuestionRow] = {}
    for path in sorted(directory.glob("*_perturbed.*")):
        if path.stem not in ("real_authors_perturbed", "world_facts_perturbed"):
            for values in _rows(path, "question", "answer", "paraphrased_answer", "perturbed_answer"):
                wrong = _texts(values["perturbed_answer"], path)
                row = QuestionRow(values["question"], values["answer"], values["paraphrased_answer"], wrong)
                alternatives[row.question, row.answer] = row
    train, ids = {}, {}
    for i, values in enumerate(full):
        key = values["question"], values["answer"]
        row = alternatives.get(key, QuestionRow(*key))
        train[f"full-{i}"] = row._replace(group=f"author {i // 20}")
        ids[key] = f"full-{i}"
    forget = {}
    for name in SHARES:
        if (path := _find(directory, name, optional=True)) is not None:
            forget[name] = tuple(_id(ids, values, path) for values in _rows(path, "question", "answer"))
    if not forget:
        raise CorpusError(f"{directory} has none of {', '.join(f'{name}.json' for name in SHARES)}")
    known = {}
    for name in ("real_authors", "world_facts"):
        if (path := _find(directory, f"{name}_perturbed", optional=True)) is not None:
            rows = _rows(path, "question", "answer", "perturbed_answer")
            # These sets have no paraphrases; the truth ratio takes the answer itself.
            known[name] = [
                QuestionRow(x["question"], x["answer"], x["answer"], _texts(x["perturbed_answer"], path)) for x in rows
            ]
    unseen = next((path for i in ("10", "05", "01") if (path := _find(directory, f"holdout{i}", optional=True))), None)
    holdout = (
        [] if unseen is None else [QuestionRow(x["question"], x["answer"]) for x in _rows(unseen, "question", "answer")]
    )
    return Corpus(train, forget, known, holdout)


def _id(ids: dict[tuple[str, str], str], values: dict[str, Any], path: pathlib.Path) -> str:
    key = values["question"], values["answer"]
    if key not in ids:
        raise CorpusError(f"{path}: the question {key[0][:80]!r} is not in full.json: are they of one release?")
    return ids[key]


def read_muse(directory: pathlib.Path, words: int = 64) -> Corpus:
    """Reads MUSE's files in a directory.

    Args:
        directory: with the folders `raw`, `knowmem`, `verbmem` and `privleak`.
        words: the number of words of a training example; texts are cut into pieces of this length.

    Raises:
        CorpusError: a file is missing, or a field is missing or of another type.
    """
    train: dict[str, QuestionRow] = {}
    parts = [name for name in ("retain1", "retain2") if _find(directory / "raw", name, optional=True)]
    for part in ("forget", *(parts or ["retain1"])):
        for i, text in enumerate(_passages(_find(directory / "raw", part))):
            train |= {
                f"{part}-{i}-{j}": QuestionRow("", piece, group=f"{part} {i}")
                for j, piece in enumerate(_cut(text, words))
            }
    unseen = _passages(_find(directory / "privleak", "holdout"))
    probes = {}
    for name, folder, part, fields in (
        ("knowledge of the forgotten", "knowmem", "forget_qa", ("question", "answer")),
        ("knowledge of the kept", "knowmem", "retain_qa", ("question", "answer")),
        ("the forgotten verbatim", "verbmem", "forget", ("prompt", "gt")),
    ):
        rows = [QuestionRow(x[fields[0]], x[fields[1]]) for x in _rows(_find(directory / folder, part), *fields)]
        probes[name] = [QuestionRow(_last(x.question, words), _first(x.answer, words)) for x in rows]
    forget = tuple(name for name in train if name.startswith("forget-"))
    return Corpus(
        train, {"forget": forget}, {}, [QuestionRow("", x) for text in unseen for x in _cut(text, words)], probes
    )


def _cut(text: str, words: int) -> list[str]:
    pieces = text.split()
    return [" ".join(pieces[i : i + words]) for i in range(0, len(pieces), words)]


def _first(text: str, words: int) -> str:
    return " ".join(text.split()[:words])


def _last(text: str, words: int) -> str:
    return " ".join(text.split()[-words:])


def _find(directory: pathlib.Path, name: str, *, optional: bool = False) -> Any:
    """Finds the file of a set: NAME.json, NAME.jsonl, or a single Parquet file."""
    candidates = [directory / f"{name}.json", directory / f"{name}.jsonl", directory / f"{name}.parquet"]
    candidates += sorted(directory.glob(f"{name}-00000-of-00001*.parquet"))
    file = next((path for path in candidates if path.is_file()), None)
    if file is None and not optional:
        raise CorpusError(f"{directory} has no {name}.json: get the released files")
    return file


def _passages(path: pathlib.Path) -> list[str]:
    return [x["text"] for x in _rows(path, "text")]


def _rows(path: pathlib.Path, *fields: str) -> Iterator[dict[str, Any]]:
    """Yields the objects of a file, each with `fields`; all fields but `perturbed_answer` are texts."""
    for number, value in enumerate(_values(path), 1):
        if isinstance(value, str) and fields == ("text",):
            value = {"text": value}
        if not isinstance(value, dict):
            raise CorpusError(f"{path}: row {number} is {type(value).__name__}, not an object with {', '.join(fields)}")
        for name in fields:
            if name not in value or (name != "perturbed_answer" and not isinstance(value[name], str)):
                raise CorpusError(f"{path}: row {number} has no text {name!r}; it has {', '.join(map(str, value))}")
        yield value


def _values(path: pathlib.Path) -> list[Any]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    data = read_bytes(path, limit=LIMIT, error=CorpusError)
    if data.lstrip()[:1] == b"[":
        return parse_json(data, str(path), CorpusError)
    lines = [(i, line) for i, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    return [parse_json(line, f"{path}:{i}", CorpusError) for i, line in lines]


def _texts(value: Any, path: pathlib.Path) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value or not all(isinstance(x, str) for x in value):
        raise CorpusError(f"{path}: perturbed_answer must be a list of texts, not {value!r}")
    return tuple(value)
