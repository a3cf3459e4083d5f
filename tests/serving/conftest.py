"""One small scripted model, and one shape of prompts, that all tests of this folder share: its programs are compiled once."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from pixel_jax.rollouts.limits import single_answer
from pixel_jax.rollouts.prompts import build_prompts, tables
from pixel_jax.rollouts.rollout import rollout
from pixel_jax.rollouts.trajectory import to_host
from pixel_jax.serving.conversation import Speaker
from pixel_jax.tools import RELEASED
from tests.rollouts import scripted_model
from tests.rollouts.scripted_model import CHAIN, CROP, END, START

CONFIG = dataclasses.replace(single_answer(scripted_model.CONFIG, 0.0), max_response=256, max_calls=2, observe_chunk=1)
SHAPE = scripted_model.shape(CONFIG, tokens=256)

# What the prompt says tips the scales where a turn begins: a call and all answers are equally likely. Some answers are long.
ANSWERS = [f"\\boxed{{{i}}}" for i in range(8)]
EVEN = CHAIN | {START: dict.fromkeys((CROP, *ANSWERS), 1.0)}
EVEN |= {answer: {END: 1.0, "I see nothing.": 1.0} for answer in ANSWERS}


@functools.cache
def vocabulary():
    return scripted_model.vocabulary_of(EVEN, RELEASED)


@pytest.fixture(scope="session")
def speaker():
    words = vocabulary()
    return Speaker(scripted_model.network(words, EVEN), words, tables(words), CONFIG, "vcot")


def alone(speaker, query, temperature=0.0, seed=0):
    """What `rollout` writes for one query by itself, turn by turn."""
    config = dataclasses.replace(speaker.config, temperature=temperature)
    prompts = build_prompts([query], vocabulary(), speaker.tables, config, shape=SHAPE, uids=[seed])
    rows = to_host(rollout(speaker.model, prompts, jax.random.key(0), config))
    tokens, chosen = rows.tokens[0][rows.valid[0]], rows.loss_mask[0][rows.valid[0]]
    runs = np.split(tokens, np.flatnonzero(np.diff(chosen)) + 1)
    return "\n".join(vocabulary().to_bytes(run).decode("utf-8", "replace").removesuffix(END) for run in runs[1::2])
