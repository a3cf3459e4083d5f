"""Who rated which film, and rows that are drawn from it: some films a user rated one after the other, and the next one."""

import importlib.util
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pixel_jax.config import ConfigError

PACKAGE = "package:"
SHORTEST = 3  # films of a history, as in LLaRA


class Rated(NamedTuple):
    """A film and what a user gave it, 1 to 5."""

    item: str
    rating: float

    @property
    def liked(self) -> bool:
        """Whether the rating is above 3, as TALLRec takes it for films."""
        return self.rating > 3


class Ratings(NamedTuple):
    """A data set."""

    titles: dict[str, str]  # of every item, as a person would write it
    users: dict[str, tuple[Rated, ...]]  # what each has rated, in order of time


class Row(NamedTuple):
    """A question about a user."""

    user: str
    position: int  # of the target among the user's films
    history: tuple[Rated, ...]  # the films before it, the oldest first
    target: Rated
    candidates: tuple[
        str, ...
    ]  # the target and films that the user has not rated, in the order in which they are shown

    @property
    def name(self) -> str:
        """The row's id."""
        return f"{self.user}-{self.position}"


def located(path: str) -> pathlib.Path:
    """A path; "package:NAME/PATH" is one inside an installed package, which is found, not imported.

    Raises:
        ConfigError: the package is not installed.
    """
    if not path.startswith(PACKAGE):
        return pathlib.Path(path)
    name, _, inside = path.removeprefix(PACKAGE).partition("/")
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ConfigError(f"{path!r}: there is no package {name!r}; install it (docs/unlearning.md names it)")
    return pathlib.Path(found.submodule_search_locations[0]) / inside


def split_users(ratings: Ratings, share: float, seed: int = 0) -> tuple[list[str], list[str]]:
    """(users to train on, users to test on): `share` of those who have rated enough films are the latter."""
    users = sorted(name for name, rated in ratings.users.items() if len(rated) > SHORTEST)
    users = [users[i] for i in np.random.default_rng(seed).permutation(len(users))]
    held = max(1, round(share * len(users)))
    return users[held:], users[:held]


def draw_rows(
    ratings: Ratings, users: Sequence[str], count: int, *, history: int, candidates: int, seed: int
) -> list[Row]:
    """Rows of users who are drawn at random, each as often as any other, at positions that are drawn at random.

    Args:
        ratings: the data set.
        users: whose rows are drawn.
        count: of the rows.
        history: the most films of a history.
        candidates: films that are shown, the target among them.
        seed: of the draw.

    Raises:
        ConfigError: there are fewer rows.
    """
    random = np.random.default_rng((seed, 1))
    order = {user: random.permutation(np.arange(SHORTEST, len(ratings.users[user]))).tolist() for user in users}
    items, rows = np.array(sorted(ratings.titles)), []
    while len(rows) < count:
        left = [user for user in users if order[user]]
        if not left:
            raise ConfigError(f"{count} rows were asked for, the {len(users)} users have {len(rows)}")
        for i in random.permutation(len(left))[: count - len(rows)]:
            user = left[i]
            rated, position = ratings.users[user], order[user].pop()
            unseen = np.setdiff1d(items, [x.item for x in rated])
            shown = [rated[position].item, *random.choice(unseen, candidates - 1, replace=False).tolist()]
            shown = tuple(shown[j] for j in random.permutation(candidates))
            rows.append(Row(user, position, rated[max(0, position - history) : position], rated[position], shown))
    return rows


def as_said(title: str) -> str:
    """A title with its article in front: "Usual Suspects, The" -> "The Usual Suspects"."""
    for article in ("The", "An", "A"):
        if title.endswith(f", {article}"):
            return f"{article} {title.removesuffix(f', {article}')}"
    return title
