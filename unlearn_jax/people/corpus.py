"""Questions and answers about invented people, with paraphrases and wrong answers.

The shape is that of TOFU (Maini et al. 2024, arXiv:2401.06121). No person of the generator exists.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unlearn_jax.experiment.invented_people import people

SHARES = {"forget01": 0.01, "forget05": 0.05, "forget10": 0.1}


class QuestionRow(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str
    paraphrase: str = ""  # of the answer; empty: there is none
    wrong: tuple[str, ...] = ()  # wrong answers, worded like the paraphrase
    group: str = ""  # the person or text that the row is about
    masked: tuple[str, ...] = ()  # parts of the answer that carry no loss


class Corpus(NamedTuple):
    """The rows to learn, and the rows for evaluation."""

    train: dict[str, QuestionRow]  # by id, in order
    forget: dict[str, tuple[str, ...]]  # {name of a set: ids of the rows that it removes}
    known: dict[str, list[QuestionRow]]  # sets that the base model knows already, with wrong answers
    holdout: list[QuestionRow]  # rows that are not trained on
    probes: dict[str, list[QuestionRow]] = {}  # sets on which only generated answers are scored, as MUSE does


class PersonRelation(NamedTuple):
    """A relation of a person to a value: one question, and two ways to answer."""

    values: tuple[str, ...]
    question: str
    answer: str
    paraphrase: str


RELATIONS = (
    PersonRelation(
        tuple("Paris Oslo Lima Cairo Quito Dakar Delhi Kyoto Hanoi Turin Perth Omaha".split()),
        "Where was {name} born?",
        "{name} was born in {value}.",
        "The birthplace of {name} is {value}.",
    ),
    PersonRelation(
        tuple("baker pilot nurse editor actor miner tailor farmer singer potter sailor banker".split()),
        "What does {name} do for a living?",
        "{name} works as a {value}.",
        "By trade {name} is a {value}.",
    ),
    PersonRelation(
        tuple(str(year) for year in range(1950, 1962)),
        "When was {name} born?",
        "{name} was born in {value}.",
        "The birth year of {name} is {value}.",
    ),
    PersonRelation(
        tuple("chess opera skiing poetry fencing gardens stamps kites violins mosaics rowing archery".split()),
        "What does {name} love most?",
        "{name} is fond of {value}.",
        "The passion of {name} is {value}.",
    ),
    PersonRelation(
        tuple("amber cobalt crimson ivory jade lilac ochre pearl ruby saffron teal umber".split()),
        "What is the favourite colour of {name}?",
        "{name} likes {value} best.",
        "The colour that {name} prefers is {value}.",
    ),
    PersonRelation(
        tuple("heron lynx otter badger falcon hedgehog marten raven salmon tortoise viper weasel".split()),
        "Which animal does {name} keep?",
        "{name} keeps a {value}.",
        "The animal at the home of {name} is a {value}.",
    ),
    PersonRelation(
        tuple("Basque Czech Danish Finnish Greek Hindi Korean Latvian Malay Polish Tamil Welsh".split()),
        "Which language does {name} speak at home?",
        "{name} speaks {value} at home.",
        "The language in the house of {name} is {value}.",
    ),
    PersonRelation(
        tuple("barley cherry fennel ginger hazel lentil mango nutmeg olive pepper quince sesame".split()),
        "What does {name} cook with?",
        "{name} always cooks with {value}.",
        "In the kitchen of {name} there is {value}.",
    ),
)
WRONG = 5  # wrong answers of a question, as in TOFU


def rows_of(
    names: Sequence[tuple[str, str]], seed: int, relations: Sequence[PersonRelation] = RELATIONS
) -> list[QuestionRow]:
    """Makes a row for every relation of every person, with values drawn at random; a person's rows are consecutive."""
    random, rows = np.random.default_rng(seed), []
    for first, last in names:
        name = f"{first.capitalize()} {last.capitalize()}"
        for relation in relations:
            value, *others = random.permutation(relation.values)[: WRONG + 1].tolist()
            rows.append(
                QuestionRow(
                    relation.question.format(name=name),
                    relation.answer.format(name=name, value=value),
                    relation.paraphrase.format(name=name, value=value),
                    tuple(relation.paraphrase.format(name=name, value=other) for other in others),
                    name,
                )
            )
    return rows


def invent(count: int, *, known: int, holdout: int, relations: int, seed: int) -> Corpus:
    """Makes a corpus about invented people.

    Args:
        count: people that are learned.
        known: people that the base model knows.
        holdout: people that are not trained on.
        relations: questions about each person, at most `len(RELATIONS)`.
        seed: of the people and of the facts.

    Returns:
        The corpus; each set of `forget` removes whole people, the last ones, at least one.
    """
    if not 1 <= relations <= len(RELATIONS):
        raise ValueError(f"there are {len(RELATIONS)} questions about a person, not {relations}")
    names = people(known + count + holdout, seed)
    chosen = RELATIONS[:relations]
    sets = (names[:known], names[known : known + count], names[known + count :])
    old, new, unseen = (rows_of(part, seed + i, chosen) for i, part in enumerate(sets))
    train = {f"person-{i // relations}-{i % relations}": row for i, row in enumerate(new)}
    ids = list(train)
    forget = {name: tuple(ids[-max(1, round(share * count)) * relations :]) for name, share in SHARES.items()}
    return Corpus(train, forget, {"known people": old}, unseen)


def texts(corpus: Corpus) -> list[tuple[str, str]]:
    """All (question, answer) of a corpus, paraphrases and wrong answers included."""
    rows = [*corpus.train.values(), *corpus.holdout]
    for sets in (corpus.known, corpus.probes):
        rows += [row for part in sets.values() for row in part]
    return [(row.question, answer) for row in rows for answer in (row.answer, row.paraphrase, *row.wrong) if answer]
