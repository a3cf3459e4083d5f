"""Readers, rows, their corrupted forms, and the texts of both forms."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn.metrics import roc_auc_score
from small_study import FILMS, USERS, write_ratings

from pixel_jax.config import ConfigError
from pixel_jax.files import FileError
from unlearn_jax.recommendation.corruption import EDITS, corrupt
from unlearn_jax.recommendation.forms import FORMS
from unlearn_jax.recommendation.forms.tallrec import area_error
from unlearn_jax.recommendation.ratings import Rated, Ratings, Row, as_said, draw_rows, split_users
from unlearn_jax.recommendation.readers import READERS
from unlearn_jax.studies.installed import located

DRAW = {"history": 4, "candidates": 5}
TITLES = {"1": "Heat", "2": "The Usual Suspects", "3": "Fargo", "4": "Alien", "5": "Antz"}
ROW = Row("7", 3, (Rated("1", 4), Rated("2", 2), Rated("3", 5)), Rated("4", 5), ("5", "4"))


@pytest.fixture
def ratings(tmp_path):
    return READERS["recbole"](write_ratings(tmp_path / "ratings"))


def test_a_data_set_of_recbole(ratings):
    assert len(ratings.titles) == FILMS and len(ratings.users) == USERS
    assert ratings.titles["3"] == "The Film 3" and ratings.titles["4"] == "Film 4"
    assert all(len(rated) == 8 for rated in ratings.users.values())
    assert all(x.liked == (int(x.item) % 2 == 1) for rated in ratings.users.values() for x in rated)


def test_films_with_unwanted_titles_are_left_out_with_their_ratings(ratings):
    short = ratings.with_titles(lambda title: len(title) < len("The Film 3"))
    assert ratings.titles.keys() - short.titles.keys() == {"3"} and short.users.keys() == ratings.users.keys()
    for user, rated in ratings.users.items():
        assert short.users[user] == tuple(x for x in rated if x.item != "3")


def test_both_readers_read_the_same(tmp_path, ratings):
    """The same ratings in the format of GroupLens, with years, in another order of lines."""
    lines = (tmp_path / "ratings" / "films.inter").read_text().splitlines()[1:]
    directory = tmp_path / "released"
    directory.mkdir()
    (directory / "u.data").write_text("\n".join(x.replace(".0", "") for x in reversed(lines)) + "\n")
    rows = [f"{i}|Film {i}{', The' if i == 3 else ''} (1990)|01-Jan-1990||http://x|0" for i in range(FILMS)]
    (directory / "u.item").write_bytes("\n".join(rows).encode("latin-1"))
    assert READERS["movielens"](directory) == ratings


def test_what_is_wrong_with_files_is_said(tmp_path):
    directory = write_ratings(tmp_path / "ratings")
    with (directory / "films.inter").open("a") as file:
        file.write("1\t999\t5\t1\n")
    with pytest.raises(FileError, match="item '999' is not in films.item"):
        READERS["recbole"](directory)
    (directory / "films.inter").write_text("user_id:token\titem_id:token\n1\t2\n")
    with pytest.raises(FileError, match="films.inter:2 has no 'rating'"):
        READERS["recbole"](directory)
    with pytest.raises(FileError, match="0 files"):
        READERS["recbole"](tmp_path)
    (tmp_path / "u.item").write_text("1|Heat (1995)\n")
    (tmp_path / "u.data").write_text("1\t1\t5\n")
    with pytest.raises(FileError, match="u.data:1 has 3 fields"):
        READERS["movielens"](tmp_path)
    with pytest.raises(ConfigError, match="there is no package 'no_such_package'"):
        located("package:no_such_package/x")


@pytest.mark.parametrize(
    "title, said", [("Net, The", "The Net"), ("A, A", "A A"), ("Heat", "Heat"), ("Best of, Theo", "Best of, Theo")]
)
def test_articles_come_first(title, said):
    assert as_said(title) == said


def test_rows_are_what_users_did(ratings):
    users, held = split_users(ratings, 0.25)
    assert len(held) == 6 and not set(users) & set(held) and len(users) + len(held) == USERS
    rows = draw_rows(ratings, users, 40, seed=1, **DRAW)
    assert len({row.name for row in rows}) == 40
    for row in rows:
        rated = ratings.users[row.user]
        assert row.target == rated[row.position] and row.history == rated[max(0, row.position - 4) : row.position]
        assert len(row.history) >= 3 and len(set(row.candidates)) == 5
        assert {x.item for x in rated} & set(row.candidates) == {row.target.item}
    counts = np.unique([row.user for row in rows], return_counts=True)[1]
    assert len(counts) == 18 and counts.max() - counts.min() <= 1
    assert rows == draw_rows(ratings, users, 40, seed=1, **DRAW) != draw_rows(ratings, users, 40, seed=2, **DRAW)
    # The target's place among the candidates says nothing.
    assert len({row.candidates.index(row.target.item) for row in rows}) == 5
    with pytest.raises(ConfigError, match="91 rows were asked for, the 18 users have 90"):
        draw_rows(ratings, users, 91, seed=0, **DRAW)


def test_rows_are_corrupted_as_their_names_say(ratings):
    users, _ = split_users(ratings, 0.25)
    rows = draw_rows(ratings, users, 30, seed=0, **DRAW)
    for edit in EDITS:
        corrupted, touched = corrupt(edit, rows, 0.2, ratings, FORMS["llara"], history=4, seed=0)
        assert len(touched) == 6
        for i, (new, old) in enumerate(zip(corrupted, rows, strict=True)):
            if i not in touched or edit == "remove":
                assert new == old
            elif edit == "query_removal":
                assert new.history == old.history[:-1] and new._replace(history=old.history) == old
            elif edit == "query_replacement":
                assert len(new.history) == min(len(old.history) + 1, 4)
                assert new.history[:-1] == old.history[:3] and new._replace(history=old.history) == old
                seen = {x.item for x in ratings.users[old.user]}
                assert new.history[-1].item not in seen | set(old.candidates)
            else:
                assert new.target.item in set(old.candidates) - {old.target.item}
                assert new._replace(target=old.target) == old
    corrupted, touched = corrupt("response", rows, 0.2, ratings, FORMS["tallrec"], history=4, seed=0)
    assert all(corrupted[i].target.liked is not rows[i].target.liked for i in touched)
    short = [row._replace(history=row.history[:3]) for row in rows]
    with pytest.raises(ConfigError, match="query_removal: only 0 of 30 rows can be corrupted, 6"):
        corrupt("query_removal", short, 0.2, ratings, FORMS["llara"], history=4, seed=0)


def test_the_text_of_tallrec():
    """The released form for films, in the template of Alpaca."""
    assert FORMS["tallrec"].prompt(ROW, TITLES) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nGiven the user's preference and "
        'unpreference, identify whether the user will like the target movie by answering "Yes." or "No.".\n\n'
        '### Input:\nUser Preference: "Heat", "Fargo"\nUser Unpreference: "The Usual Suspects"\nWhether the user will '
        'like the target movie "Alien"?\n\n### Response:\n'
    )
    assert FORMS["tallrec"].answer(ROW, TITLES) == "Yes."
    assert FORMS["tallrec"].answer(ROW._replace(target=Rated("4", 3)), TITLES) == "No."


def test_the_text_of_llara():
    assert FORMS["llara"].prompt(ROW, TITLES) == (
        "This user has watched Heat, The Usual Suspects, Fargo in the previous. Please predict the next movie this user "
        "will watch. Choose the answer from the following 2 movie titles: Antz, Alien. Answer: "
    )
    assert FORMS["llara"].answer(ROW, TITLES) == "Alien\n"


class Says:
    """A speaker of fixed words."""

    def __init__(self, logits=None, texts=None):
        self.logits, self.texts = logits, texts

    def token(self, text):
        return {"Yes.": 2, "No.": 5}[text]

    def first_logits(self):
        return self.logits

    def answers(self):
        return self.texts


def test_the_area_is_scikit_learns_and_its_error_that_of_resampling():
    random = np.random.default_rng(0)
    rows = [ROW._replace(target=Rated("4", rating)) for rating in random.integers(1, 6, 150)]
    liked = np.array([row.target.liked for row in rows])
    logits = random.normal(size=(150, 7)) + liked[:, None] * np.eye(7)[2]
    found = FORMS["tallrec"].score(Says(logits=logits), rows, TITLES)
    score = logits[:, 2] - logits[:, 5]
    assert found["auc"] == pytest.approx(roc_auc_score(liked, score))
    positive, negative = score[liked], score[~liked]
    area = lambda a, b, axis: (a[..., :, None] > b[..., None, :]).mean(axis=(-2, -1))
    resampled = bootstrap((positive, negative), area, n_resamples=300, method="percentile", rng=random)
    assert found["auc_error"] == pytest.approx(resampled.standard_error, rel=0.25)
    assert area_error(1.0, 5, 5) == 0


def released_hits(generated, targets, candidates):
    """LLaRA's `calculate_hr1` as its description reads: the only candidate in the lower-cased answer, right among valid."""
    valid = right = 0
    for text, target, titles in zip(generated, targets, candidates, strict=True):
        text = text.strip().split("\n")[0].lower().strip()
        found = [title.lower() for title in titles if title.lower() in text]
        if len(found) == 1:
            valid += 1
            right += found[0] == target.lower()
    return valid / len(generated), right / valid if valid else 0


def test_hits_are_counted_as_the_released_code_counts():
    rows = [ROW, ROW, ROW, ROW, ROW]
    said = ["alien\nAntz", "Antz", "Antz, Alien", "", "I say ALIEN."]
    found = FORMS["llara"].score(Says(texts=said), rows, TITLES)
    shown = [[TITLES[x] for x in row.candidates] for row in rows]
    valid, right = released_hits(said, ["Alien"] * 5, shown)
    assert (found["valid_ratio"], found["hit_ratio"]) == (valid, right) == (3 / 5, 2 / 3)
    assert found["hit_ratio_of_all"] == pytest.approx(2 / 5)
    assert found["hit_ratio_error"] == pytest.approx(np.std([1, 1, 0]) / np.sqrt(3))
    assert found["hit_ratio_of_all_error"] == pytest.approx(np.std([1, 1, 0, 0, 0]) / np.sqrt(5))


def test_another_data_set_is_a_value():
    """Everything behind a reader takes ratings that were made by hand."""
    rated = tuple(Rated(str(i), 1 + i % 5) for i in range(6))
    ratings = Ratings({str(i): f"T{i}" for i in range(20)}, {"a": rated, "b": rated[::-1]})
    (row,) = draw_rows(ratings, ["a"], 1, seed=0, **DRAW)
    assert dataclasses.is_dataclass(FORMS["llara"]) and FORMS["llara"].answer(row, ratings.titles) in {
        f"T{i}\n" for i in range(6)
    }
