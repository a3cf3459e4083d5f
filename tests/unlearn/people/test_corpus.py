"""Rows of questions and answers: invented ones, those of TOFU's and MUSE's files, and as token ids."""

import json
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlearn_jax.people.corpus import RELATIONS, QuestionRow, invent, texts
from unlearn_jax.people.readers import CorpusError, read_muse, read_tofu
from unlearn_jax.people.words import END, PAD, START, Words


def test_an_invented_corpus():
    corpus = invent(40, known=10, holdout=6, relations=4, seed=1)
    assert len(corpus.train) == 160 and len(corpus.known["known people"]) == 40 and len(corpus.holdout) == 24
    assert {name: len(ids) for name, ids in corpus.forget.items()} == {"forget01": 4, "forget05": 8, "forget10": 16}
    groups = [
        {row.group for row in rows} for rows in (corpus.train.values(), corpus.known["known people"], corpus.holdout)
    ]
    assert [len(x) for x in groups] == [40, 10, 6] and not groups[0] & groups[1] | groups[0] & groups[2]
    for row in corpus.train.values():
        assert row.group in row.question and row.group in row.answer and row.group in row.paraphrase
        assert len(set(row.wrong)) == 5 and row.paraphrase not in row.wrong and row.answer != row.paraphrase
    people = {corpus.train[name].group for name in corpus.forget["forget10"]}
    assert len(people) == 4  # whole people
    assert invent(40, known=10, holdout=6, relations=4, seed=1) == corpus
    assert invent(40, known=10, holdout=6, relations=4, seed=2).train != corpus.train
    with pytest.raises(ValueError, match=f"there are {len(RELATIONS)} questions"):
        invent(1, known=1, holdout=1, relations=99, seed=0)


# ---- TOFU. Field names: `question`, `answer`, `perturbed_answer` as in locuslab/tofu data/real_authors_perturbed.json,
# `paraphrased_answer` as in its config/eval_everything.yaml; JSON lines as there.

TOFU = [{"question": f"Who is {i}?", "answer": f"The author {i}."} for i in range(40)]


def perturbed(row):
    return {**row, "paraphrased_answer": f"It is {row['answer']}", "perturbed_answer": ["Nobody.", "Somebody."]}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def tofu(tmp_path):
    write_lines(tmp_path / "full.json", TOFU)
    write_lines(tmp_path / "forget01.json", TOFU[-1:])
    write_lines(tmp_path / "forget10.json", TOFU[-4:])
    write_lines(tmp_path / "forget10_perturbed.json", [perturbed(x) | {"paraphrased_question": "?"} for x in TOFU[-4:]])
    write_lines(tmp_path / "retain_perturbed.json", [perturbed(x) for x in TOFU[:3]])
    write_lines(tmp_path / "holdout10.json", [{"question": "Who is new?", "answer": "A new author."}])
    for name in ("real_authors", "world_facts"):
        row = {"question": f"Who wrote {name}?", "answer": "Jane Austen", "perturbed_answer": ["Mark Twain", "Tolkien"]}
        write_lines(tmp_path / f"{name}_perturbed.json", [row])
    return tmp_path


def test_tofu_as_it_was_released(tofu):
    corpus = read_tofu(tofu)
    assert [row.answer for row in corpus.train.values()] == [row["answer"] for row in TOFU]
    assert corpus.forget == {"forget01": ("full-39",), "forget10": ("full-36", "full-37", "full-38", "full-39")}
    assert corpus.train["full-39"] == QuestionRow(
        "Who is 39?", "The author 39.", "It is The author 39.", ("Nobody.", "Somebody."), "author 1"
    )
    assert corpus.train["full-1"].paraphrase and not corpus.train["full-5"].paraphrase
    assert corpus.train["full-19"].group != corpus.train["full-20"].group  # twenty questions an author
    assert corpus.known["real_authors"] == [
        QuestionRow("Who wrote real_authors?", "Jane Austen", "Jane Austen", ("Mark Twain", "Tolkien"))
    ]
    assert corpus.holdout == [QuestionRow("Who is new?", "A new author.")] and set(corpus.known) == {
        "real_authors",
        "world_facts",
    }


MISTAKES = {
    "no full set": (lambda d: (d / "full.json").unlink(), "has no full.json: get the released files"),
    "no forget set": (lambda d: [(d / f"forget{i}.json").unlink() for i in ("01", "10")], "has none of forget01.json"),
    "another release": (
        lambda d: write_lines(d / "forget01.json", [{"question": "?", "answer": "!"}]),
        "of one release",
    ),
    "no answer": (lambda d: write_lines(d / "full.json", [{"question": "?"}]), "row 1 has no text 'answer'"),
    "no object": (lambda d: write_lines(d / "full.json", [3]), "row 1 is int"),
    "no JSON": (lambda d: (d / "full.json").write_text("{"), r"full.json:1 is not JSON"),
    "no list": (
        lambda d: write_lines(d / "world_facts_perturbed.json", [{**TOFU[0], "perturbed_answer": [1]}]),
        "perturbed_answer must be a list of texts",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_files_of_tofu_that_are_wrong(name, tofu):
    spoil, message = MISTAKES[name]
    spoil(tofu)
    with pytest.raises(CorpusError, match=message):
        read_tofu(tofu)


# ---- MUSE. `knowmem/forget_qa.json` is a JSON array of `question` and `answer` in the authors' repository (data/hp/knowmem);
# `text`, `prompt` and `gt` are named in the cards of muse-bench/MUSE-News. Not verified: that raw texts are in `text`.


def write_muse(directory, write):
    passages = {
        "raw/forget": ["one two three four five"],
        "raw/retain1": ["six seven"],
        "privleak/holdout": ["eight nine"],
    }
    for name, rows in passages.items():
        write(directory / name, [{"text": text} for text in rows])
    for part in ("forget_qa", "retain_qa"):
        write(directory / "knowmem" / part, [{"question": f"What of {part}?", "answer": "six"}])
    write(directory / "verbmem" / "forget", [{"prompt": "one two", "gt": "three four five"}])


def write_array(path, rows):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.with_suffix(".json").write_text(json.dumps(rows))


def write_parquet(path, rows):
    path.parent.mkdir(exist_ok=True, parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), f"{path}-00000-of-00001.parquet")


@pytest.mark.parametrize("write", [write_array, write_parquet])
def test_muse_as_it_was_released(write, tmp_path):
    write_muse(tmp_path, write)
    corpus = read_muse(tmp_path, words=3)
    assert {name: row.answer for name, row in corpus.train.items()} == {
        "forget-0-0": "one two three",
        "forget-0-1": "four five",
        "retain1-0-0": "six seven",
    }
    assert corpus.forget == {"forget": ("forget-0-0", "forget-0-1")} and corpus.holdout == [
        QuestionRow("", "eight nine")
    ]
    assert corpus.probes["the forgotten verbatim"] == [QuestionRow("one two", "three four five")]
    assert corpus.probes["knowledge of the kept"][0].answer == "six"
    (next(tmp_path.glob("verbmem/*"))).unlink()
    with pytest.raises(CorpusError, match="verbmem has no forget.json"):
        read_muse(tmp_path)


# ---- words


def test_every_text_of_a_corpus_is_encoded_and_read_back():
    corpus = invent(6, known=3, holdout=2, relations=8, seed=0)
    pairs = texts(corpus)
    words = Words.of(pairs)
    examples = words.encode(pairs)
    spaced = lambda text: " ".join(re.findall(r"\w+|[^\w\s]", text))
    for row, (question, answer) in enumerate(pairs):
        tokens, labels, mask = (examples[name][row] for name in ("tokens", "labels", "loss_mask"))
        assert tokens[0] == START and words.decode(labels[mask > 0]) == spaced(answer)
        assert labels[mask > 0][-1] == END and words.fits(question, answer)
        asked = tokens[1 : int(mask.argmax()) + 1]
        assert words.decode(asked) == spaced(question)
        inside = np.flatnonzero(labels != PAD)
        np.testing.assert_array_equal(tokens[inside][1:], labels[inside][:-1])
    assert words.lacking("Where was Nobody born?") == ["Nobody"]


@given(st.integers(0, 30), st.integers(1, 12))
def test_a_masked_stretch_takes_the_loss_off_the_words_that_it_touches(begin, length):
    answer = "Alna Hartberg was born in Paris."
    stretch = answer[begin : begin + length]
    words = Words.of([("Where?", answer)])
    if not stretch.strip() or answer.count(stretch) != 1:
        return
    plain, masked = words.encode([("Where?", answer)]), words.encode([("Where?", answer)], [(stretch,)])
    lost = words.decode(plain["labels"][0][(plain["loss_mask"] > 0)[0] & (masked["loss_mask"] == 0)[0]]).split()
    spans = [(x.start(), x.end(), x[0]) for x in re.finditer(r"\w+|[^\w\s]", answer)]
    assert lost == [word for start, end, word in spans if start < begin + len(stretch) and end > begin]
