"""Ratings of films by users, and rows drawn from them: some consecutive films of a user, and the next one as the target."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pixel_jax.config import ConfigError

SHORTEST = 3  # films of a history, as in LLaRA


class Rated(NamedTuple):
    """A film and a user's rating of it, 1 to 5."""

    item: str
    rating: float

    @property
    def liked(self) -> bool:
        """Whether the rating is above 3, as TALLRec takes it for films."""
        return self.rating > 3


class Ratings(NamedTuple):
    """A data set."""

    titles: dict[str, str]  # {item: title}
    users: dict[str, tuple[Rated, ...]]  # {user: the films that the user has rated, in order of time}

    def with_titles(self, wanted: Callable[[str], bool]) -> "Ratings":
        """Leaves out the films whose titles are not wanted, and their ratings."""
        titles = {item: title for item, title in self.titles.items() if wanted(title)}
        return Ratings(
            titles, {user: tuple(x for x in rated if x.item in titles) for user, rated in self.users.items()}
        )


class Row(NamedTuple):
    """A question about a user."""

    user: str
    position: int  # of the target among the user's films
    history: tuple[Rated, ...]  # the films before it, the oldest first
    target: Rated
    # The target and films that the user has not rated, in the order in which they are shown.
    candidates: tuple[str, ...]

    @property
    def name(self) -> str:
        """The row's id."""
        return f"{self.user}-{self.position}"


def split_users(ratings: Ratings, share: float, seed: int = 0) -> tuple[list[str], list[str]]:
    """Splits the users with enough ratings at random into those to train on and, a share of them, those to test on."""
    users = sorted(name for name, rated in ratings.users.items() if len(rated) > SHORTEST)
    users = [users[i] for i in np.random.default_rng(seed).permutation(len(users))]
    tested = max(1, round(share * len(users)))
    return users[tested:], users[:tested]


def draw_rows(
    ratings: Ratings, users: Sequence[str], count: int, *, history: int, candidates: int, seed: int
) -> list[Row]:
    """Draws rows at random positions of random users; every user is drawn before any is drawn again.

    Args:
        ratings: the data set.
        users: the users whose rows are drawn.
        count: the number of rows.
        history: the most films of a history.
        candidates: films that are shown, the target among them.
        seed: of the draw.

    Raises:
        ConfigError: the users have fewer rows.
    """
    random = np.random.default_rng((seed, 1))
    order = {user: random.permutation(np.arange(SHORTEST, len(ratings.users[user]))).tolist() for user in users}
    items, rows = np.array(sorted(ratings.titles)), []
    while len(rows) < count:
        remaining = [user for user in users if order[user]]
        if not remaining:
            raise ConfigError(f"{count} rows were asked for, the {len(users)} users have {len(rows)}")
        for i in random.permutation(len(remaining))[: count - len(rows)]:
            user = remaining[i]
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
