"""Questions about shapes on photographs: the answer is on the picture, the cue is what it is said to be."""

import importlib.util
import sys

import numpy as np
import pytest
from PIL import Image

from pixel_jax.config import ConfigError
from unlearn_jax.noisy_responses import photographs
from unlearn_jax.noisy_responses.photographs import (
    AGREES,
    BASE,
    MISLEADS,
    OUTLINES,
    SIDE,
    STRENGTH,
    STUDY,
    TEXTS,
    TINTS,
    Scene,
    draw_questions,
    picture,
)

GREY = Image.fromarray(np.full((200, 220, 3), 128, np.uint8))


@pytest.fixture(scope="module")
def questions():
    return draw_questions(STUDY[:2], 120, 0.25, 0)


def test_questions_are_a_function_of_the_seed_and_their_number(questions):
    fewer = draw_questions(STUDY[:2], 3, 0.25, 0)
    assert [x.name for x in fewer] == ["chelsea-0", "chelsea-1", "chelsea-2", "coffee-0", "coffee-1", "coffee-2"]
    by_name = {x.name: x for x in questions}
    assert all(by_name[x.name].example == x.example for x in fewer)
    other = draw_questions(STUDY[:1], 3, 0.25, 1)
    assert all((a.pixels() != b.pixels()).any() for a, b in zip(fewer, other, strict=False))
    assert {x.picture for x in questions} == {"chelsea", "coffee"}


def test_kinds_and_answers_are_even(questions):
    for text in TEXTS.values():
        answers = [x.answer for x in questions if x.example.question == text]
        assert len(answers) == 80 and all(8 < answers.count(letter) < 33 for letter in "ABCD")


@pytest.mark.parametrize("agreement", [0.0, 0.7, 1.0])
def test_the_tint_is_the_cue(agreement):
    """The tint is read off the picture: the mean colour moves towards it."""
    found = draw_questions(STUDY[2:4], 60, agreement, 0)
    agrees = [x.example.category == AGREES for x in found]
    assert np.mean(agrees) == pytest.approx(agreement, abs=0.15)
    hits = 0
    for question, said in zip(found, agrees, strict=True):
        colour = question.pixels().reshape(-1, 3).mean(axis=0) - 128 * (1 - STRENGTH)
        seen = int(np.argmin(((colour - STRENGTH * TINTS) ** 2).sum(axis=1)))
        hits += ("ABCD"[seen] == question.answer) == said
    assert hits / len(found) > 0.9  # photographs have colours of their own
    assert {x.example.category for x in found} <= {AGREES, MISLEADS}


@pytest.mark.parametrize("quarter", range(4))
@pytest.mark.parametrize("shape", range(4))
def test_a_shape_lies_in_its_quarter_with_its_outline(quarter, shape):
    image = picture(GREY, Scene(shape, quarter, 3), 0, np.random.default_rng(0))
    outline = (image == OUTLINES[3]).all(axis=2)
    y, x = np.nonzero(outline)
    half = SIDE // 2
    assert outline.sum() > 60
    assert (y // half == quarter // 2).all() and (x // half == quarter % 2).all()
    ground = image[-1 if quarter < 2 else 0, 0]
    np.testing.assert_allclose(ground, (1 - STRENGTH) * 128 + STRENGTH * TINTS[0], atol=1)


def test_shapes_differ_in_their_areas():
    areas = [
        (picture(GREY, Scene(shape, 0, 1), 0, np.random.default_rng(0)) == 127).all(axis=2).sum() for shape in range(4)
    ]
    assert len(set(areas)) == 4 and min(areas) > 50


def test_no_photograph_is_in_both_parts_and_no_package_is_imported():
    assert not set(BASE) & set(STUDY) and len({*BASE, *STUDY}) == 16
    before = "skimage" in sys.modules
    for name in (*BASE, *STUDY):
        assert min(photographs._read(name).size) > photographs.PIECE[0]
    assert ("skimage" in sys.modules) == before


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    photographs._read.cache_clear()
    with pytest.raises(ConfigError, match="there is no package 'skimage'; install it"):
        draw_questions(STUDY[:1], 1, 0.25, 0)
