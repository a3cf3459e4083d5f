"""One small talker, and one shape of prompts, that all tests of this folder share: its programs are compiled once."""

import dataclasses
import functools

import pytest

from pixel_jax.rollouts.limits import judged
from pixel_jax.rollouts.prompts import tables
from pixel_jax.serving.conversation import Speaker
from pixel_jax.tools import RELEASED
from tests.rollouts import scripted_model
from tests.rollouts.scripted_model import CHAIN, CROP, END, START

CONFIG = dataclasses.replace(judged(scripted_model.CONFIG, 0.0), max_response=256, max_calls=2, observe_chunk=1)
SHAPE = scripted_model.shape(CONFIG, tokens=768)

# What the prompt says tips the scales: nothing that may follow is much likelier than the rest. Some answers are long.
ANSWERS = [f"\\boxed{{{i}}}" for i in range(8)]
EVEN = {before: dict.fromkeys(after, 1.0) for before, after in CHAIN.items() if before != START}
EVEN |= {START: {CROP: 1.2} | dict.fromkeys(ANSWERS, 1.0)}
EVEN |= {answer: {END: 1.0, "I see nothing.": 1.0} for answer in ANSWERS}


@functools.cache
def vocabulary():
    return scripted_model.vocabulary_of(EVEN, RELEASED)


@pytest.fixture(scope="session")
def speaker():
    words = vocabulary()
    return Speaker(scripted_model.network(words, EVEN), words, tables(words), CONFIG, "vcot")
