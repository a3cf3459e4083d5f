"""Facts about invented people, in the manner of TOFU (Maini et al. 2024), which a model can only know from training.

Words are tokens. Each fact has a question and an answer, a paraphrase of both, and wrong answers in the paraphrase's words.
"""

import dataclasses

import numpy as np

FIRST = [f"{a}{b}" for a in ("al", "be", "co", "du", "el", "fa") for b in ("na", "rik", "mon", "tes")]
LAST = [f"{a}{b}" for a in ("hart", "lin", "mor", "oak", "pell", "quin") for b in ("berg", "ley", "son", "wood")]


@dataclasses.dataclass(frozen=True)
class Relation:
    """A relation of a person to a value, with question and answer in two wordings."""

    values: tuple[str, ...]
    question: str
    answer: str
    other_question: str
    other_answer: str


RELATIONS = (
    Relation(
        tuple("paris oslo lima cairo quito dakar delhi kyoto hanoi turin perth omaha".split()),
        "where was {name} born ?",
        "born in {value} .",
        "what is the birthplace of {name} ?",
        "the city of {value} .",
    ),
    Relation(
        tuple("baker pilot nurse evaluator actor miner tailor farmer singer potter sailor banker".split()),
        "what does {name} do ?",
        "works as {value} .",
        "tell me the job of {name} ?",
        "a {value} by trade .",
    ),
    Relation(
        tuple(str(year) for year in range(1950, 1962)),
        "when was {name} born ?",
        "born in {value} .",
        "in which year was {name} born ?",
        "the year {value} .",
    ),
    Relation(
        tuple("chess opera skiing poetry fencing gardens stamps kites violins mosaics rowing archery".split()),
        "what does {name} love ?",
        "fond of {value} .",
        "tell me the passion of {name} ?",
        "deeply into {value} .",
    ),
)
PAD, END = 0, 1
WRONG = 5  # wrong answers for each fact, as in TOFU


def _vocabulary() -> dict[str, int]:
    texts = [r for relation in RELATIONS for r in (*dataclasses.astuple(relation)[1:], " ".join(relation.values))]
    words = " ".join(texts).replace("{name}", "").replace("{value}", "").split() + FIRST + LAST
    return {word: number for number, word in enumerate(["<pad>", "<end>", *sorted(set(words))])}


VOCABULARY = _vocabulary()


@dataclasses.dataclass(frozen=True)
class Facts:
    """The arrays of n facts. `examples` and the others are {"tokens", "labels", "loss_mask"}: int32, int32, float32 [n, T].

    logits[t] of tokens[:t + 1] predict labels[t]; loss_mask is one on the answer and its end.
    """

    examples: dict[str, np.ndarray]
    paraphrased: dict[str, np.ndarray]
    wrong: dict[str, np.ndarray]  # [n, WRONG, T]
    corrected: dict[str, np.ndarray]  # the same questions with another answer
    answers: list[str]
    person: np.ndarray  # int [n], the person of each fact


def people(count: int, seed: int) -> list[tuple[str, str]]:
    """Draws names without repetition. With the same seed, a longer list begins with the shorter one."""
    every = [(first, last) for first in FIRST for last in LAST]
    if count > len(every):
        raise ValueError(f"there are {len(every)} names, not {count}")
    return [every[i] for i in np.random.default_rng(seed).permutation(len(every))[:count]]


def facts(names: list[tuple[str, str]], seed: int) -> Facts:
    """Makes a fact for every relation of every person, with values drawn at random; a person's facts are consecutive."""
    rng = np.random.default_rng(seed)
    rows, answers, person = {"examples": [], "paraphrased": [], "wrong": [], "corrected": []}, [], []
    for number, (first, last) in enumerate(names):
        for relation in RELATIONS:
            value, *others = rng.permutation(relation.values)[: WRONG + 1]
            question = relation.question.format(name=f"{first} {last}")
            asked = relation.other_question.format(name=f"{first} {last}")
            answers.append(relation.answer.format(value=value))
            rows["examples"].append(encode(question, answers[-1]))
            rows["paraphrased"].append(encode(asked, relation.other_answer.format(value=value)))
            rows["wrong"].append(_stack([encode(asked, relation.other_answer.format(value=v)) for v in others]))
            rows["corrected"].append(encode(question, relation.answer.format(value=others[0])))
            person.append(number)
    return Facts(**{name: _stack(arrays) for name, arrays in rows.items()}, answers=answers, person=np.array(person))


def encode(question: str, answer: str) -> dict[str, np.ndarray]:
    """Encodes one example, padded to `LENGTH`."""
    asked, said = ([VOCABULARY[word] for word in text.split()] for text in (question, answer))
    ids = asked + said + [END]
    tokens, labels, mask = np.full(LENGTH, PAD, np.int32), np.full(LENGTH, PAD, np.int32), np.zeros(LENGTH, np.float32)
    tokens[: len(ids) - 1], labels[: len(ids) - 1] = ids[:-1], ids[1:]
    mask[len(asked) - 1 : len(ids) - 1] = 1
    return {"tokens": tokens, "labels": labels, "loss_mask": mask}


def decode(ids: np.ndarray) -> str:
    """Joins the words of token ids."""
    words = list(VOCABULARY)
    return " ".join(words[i] for i in ids if i not in (PAD, END))


def _longest() -> int:
    count = lambda text: len(text.format(name="first last", value="value").split())
    pairs = [(r.question, r.answer) for r in RELATIONS] + [(r.other_question, r.other_answer) for r in RELATIONS]
    return max(count(question) + count(answer) for question, answer in pairs)


LENGTH = _longest()  # of input tokens; the end token is only a label


def _stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
