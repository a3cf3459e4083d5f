"""A tiny random model, invented ratings in the format of RecBole's files, and a study of them."""

import dataclasses
import functools
import re

import jax
import numpy as np

from pixel_jax.dialog.tokenizer import build_tokenizer
from pixel_jax.models.model import LanguageModel
from pixel_jax.models.text_families import LlamaConfig, LlamaText
from unlearn_jax.config import ErasureConfig
from unlearn_jax.recommendation.config import AdapterConfig, RatingsConfig, RecommendationConfig
from unlearn_jax.recommendation.forms import llara, tallrec
from unlearn_jax.requests.replay import TrainingRecipe

FILMS, USERS = 40, 24
PIECES = [*re.split(r"\{\w+\}", tallrec.ALPACA), tallrec.INSTRUCTION]
PIECES += [
    "User Preference: ",
    "\nUser Unpreference: ",
    "\nWhether the user will like the target movie ",
    "Yes.",
    "No.",
]
PIECES += [*re.split(r"\{\w+\}", llara.PROMPT), ", ", '", "', "Film "]


def write_ratings(directory):
    """Users whose liking depends on the number of the film: it is there to be learned."""
    random = np.random.default_rng(0)
    items = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    items += [f"{i}\tFilm {i}{', The' if i == 3 else ''}\t1990\tDrama" for i in range(FILMS)]
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(USERS):
        for at, item in enumerate(random.permutation(FILMS)[:8]):
            lines.append(f"{user}\t{item}\t{5 if item % 2 else 2}\t{100 * user + at}")
    directory.mkdir(exist_ok=True)
    (directory / "films.item").write_text("\n".join(items) + "\n")
    (directory / "films.inter").write_text("\n".join([lines[0], *sorted(lines[1:])]) + "\n")
    return directory


@functools.cache
def tokenizer():
    return build_tokenizer(PIECES)


@functools.cache
def model():
    size = -(-len(tokenizer()) // 8) * 8
    text = LlamaText(
        vocab_size=size, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return LanguageModel(LlamaConfig(text=text, tie_word_embeddings=True), jax.random.key(0))


FEW = ("corrupted", "retrain, cold", "erase", "L-BFGS", "NPO")  # methods that take little time


def make_config(tmp_path, **changes) -> RecommendationConfig:
    config = RecommendationConfig(
        out=str(tmp_path / "out"),
        cells=str(tmp_path / "cells"),
        model="tiny",
        data=RatingsConfig(
            path=str(write_ratings(tmp_path / "ratings")), examples=12, test_share=0.4, history=4, candidates=4,
            length=64, answer=8,
        ),
        adapter=AdapterConfig(layers=2, rank=2, alpha=4.0, targets=r".*\.(q_proj|v_proj|up_proj)"),
        training=TrainingRecipe(epochs=2, batch=4, learning_rate=0.1),
        erasure=ErasureConfig(micro_batch=6),
        shares=(0.2,),
        seeds=(0,),
        learning_rates=(1e-3, 1e-2),
        tuning_share=0.2,
        batch=4,
        rows=6,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)
