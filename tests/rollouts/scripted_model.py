"""A tiny Qwen2.5-VL that talks in tool calls: its head is a table of what may follow each token.

Everything else about it is the real model with random weights, so attention, positions, pixels and caches all leave their
mark on the logits; the table makes it call, fail, call again and answer, differently in every row.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.dialog import observations, template
from pixel_jax.dialog.tokenizer import Vocabulary, build_tokenizer
from pixel_jax.models import LanguageModel, Model
from pixel_jax.models.config import TextConfig
from pixel_jax.models.qwen_vl import Qwen2_5_VLConfig, VisionConfig
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.materialize import materialize
from pixel_jax.rollouts.prompts import Query, build_prompts, tables
from pixel_jax.rollouts.rollout import static_shape
from pixel_jax.rollouts.shapes import BatchShape, prompt_shape
from pixel_jax.rollouts.trajectory import to_host
from pixel_jax.tools import RELEASED

CROP = '<tool_call>\n{"name": "crop_image_normalized", "arguments": {"bbox_2d": ['
SELECT = '<tool_call>\n{"name": "select_frames", "arguments": {"target_frames": ['
CLOSE = "}}\n</tool_call>"
ANSWERS = ("\\boxed{7}", "\\boxed{3}")
START = "assistant\n"
END = "<|im_end|>"

# What may follow, and how likely.
CHAIN = {
    START: {CROP: 0.5, SELECT: 0.2, "I see nothing.": 0.05, ANSWERS[0]: 0.15, ANSWERS[1]: 0.1},
    CROP: {"0.10, ": 0.5, "0.05, ": 0.4, "140, ": 0.1},
    "0.10, ": {"0.11, ": 0.5, "0.20, ": 0.5},
    "0.05, ": {"0.11, ": 0.5, "0.20, ": 0.5},
    "140, ": {"0.11, ": 1.0},
    "0.11, ": {"0.71, ": 0.5, "0.15, ": 0.3, "0.9, ": 0.2},
    "0.20, ": {"0.71, ": 0.7, "0.15, ": 0.3},
    "0.71, ": {"0.82": 0.6, "1.0": 0.4},
    "0.15, ": {"0.82": 0.6, "1.0": 0.4},
    "0.9, ": {"0.82": 0.6, "1.0": 0.4},
    "0.82": {'], "target_image": ': 0.9, "; ": 0.1},
    "1.0": {'], "target_image": ': 0.9, "; ": 0.1},
    "; ": {CLOSE: 1.0},
    '], "target_image": ': {"1": 0.6, "2": 0.3, "9": 0.1},
    "1": {CLOSE: 1.0},
    "2": {CLOSE: 1.0},
    "9": {CLOSE: 1.0},
    SELECT: {"1, 2]": 0.5, "3]": 0.3, "17]": 0.2},
    "1, 2]": {CLOSE: 1.0},
    "3]": {CLOSE: 1.0},
    "17]": {CLOSE: 1.0},
    CLOSE: {END: 1.0},
    ANSWERS[0]: {END: 1.0},
    ANSWERS[1]: {END: 1.0},
    "I see nothing.": {END: 0.7, "I see nothing.": 0.3},
}


def pieces() -> list[str]:
    """What the vocabulary has beside bytes and special tokens."""
    found = {text for text in CHAIN if len(text) > 1 and text != END}
    found |= {"system\n", "user\n", template.system_prompt(), template.GUIDELINES["vcot"]}
    for kind in observations.kinds_of(RELEASED):
        found |= {stretch for stretch in stretches(kind.outcome.text) if len(stretch) > 1}
    return sorted(found)


def stretches(text: str) -> list[str]:
    """The constant parts of an observation."""
    return re.split(r"<\|\w+\|>|\{\w+\}", template.flatten(template.CHATML.before) + text)


def vocabulary_of(chain, tools) -> Vocabulary:
    """Of a scripted model that follows `chain` and is told of `tools`."""
    found = {text for text in chain if len(text) > 1} | {"system\n", "user\n", template.GUIDELINES["vcot"]}
    found |= {template.system_prompt(tools)}
    for kind in observations.kinds_of(tools):
        found |= {stretch for stretch in stretches(kind.outcome.text) if len(stretch) > 1}
    return Vocabulary.of(build_tokenizer(sorted(found)))


@functools.cache
def vocabulary() -> Vocabulary:
    return Vocabulary.of(build_tokenizer(pieces()))


CROPPED, SELECTED, MALFORMED = "crop_image_normalized: shown", "select_frames: shown", "malformed"


def outcomes(t, tools=RELEASED) -> np.ndarray:
    """What the calls of trajectories came to, by name [R, N]; "" of those that were not carried out."""
    return np.array([*map(str, observations.kinds_of(tools)), ""])[t.calls.outcome]


@functools.cache
def token_tables():
    return tables(vocabulary())


@functools.cache
def model() -> Model:
    return network(vocabulary())


def qwen2_5_vl(words: Vocabulary, size: int, hidden: int) -> Qwen2_5_VLConfig:
    """The configuration of the model for a vocabulary of `size`."""
    return Qwen2_5_VLConfig(
        text=TextConfig(
            vocab_size=size,
            hidden_size=hidden,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 64,
            rms_norm_eps=1e-6,
            mrope_section=(4, 6, 6),
        ),
        vision=VisionConfig(
            depth=2,
            hidden_size=32,
            intermediate_size=32,
            num_heads=2,
            out_hidden_size=hidden,
            fullatt_block_indexes=(1,),
        ),
        image_token_id=words.image_pad,
        video_token_id=words.video_pad,
        vision_start_token_id=words.vision_start,
        vision_end_token_id=words.vision_end,
    )


def network(words: Vocabulary, chain=CHAIN, make_config=qwen2_5_vl) -> Model:
    """The scripted model in the ids of `words`; `chain`: what may follow what."""
    size = len(words.table.length)
    hidden = 64 * -(-size // 64)
    config = make_config(words, size, hidden)
    model = LanguageModel(config, jax.random.key(0))
    table = np.full((size, size), -12.0, np.float32)
    token = lambda text: words.im_end if text == END else words.encode(text)[0]
    for before, after in chain.items():
        for text, probability in after.items():
            table[token(before), token(text)] = np.log(probability)
    # One-hot embeddings, long enough that what the layers add moves the logits by about half a unit and no more. The last
    # norm makes the sum sqrt(hidden) long.
    embed = np.zeros((size, hidden), np.float32)
    embed[np.arange(size), np.arange(size)] = 60.0
    head = np.zeros((size, hidden), np.float32)
    head[:, :size] = table.T / np.sqrt(hidden)
    model.language_model.embed_tokens.weight[...] = jnp.asarray(embed)
    model.lm_head.weight[...] = jnp.asarray(head)
    return model


CONFIG = RolloutConfig(
    group_size=4,
    top_p=1.0,
    top_k=0,
    max_new_tokens=12,
    max_calls=3,
    max_response=512,
    min_pixels=28 * 28,
    max_pixels=4 * 28 * 28,
    crop_min_pixels=28 * 28,
    crop_max_pixels=4 * 28 * 28,
    select_min_pixels=28 * 28,
    select_max_pixels=2 * 28 * 28,
    video_min_pixels=28 * 28,
    video_max_pixels=28 * 28,
    pad=0.0,
    observe_chunk=3,
)


def image(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def queries(count: int, *, video: bool = False) -> list[Query]:
    """Images of several sizes, two to a question now and then; with `video`, every second query is a video of 3 frames."""
    made = []
    for i in range(count):
        if video and i % 2:
            made.append(Query("Which frame?", [image(10 * i + j, 96, 128) for j in range(3)], True, 0.5))
        else:
            sizes = [(120 + 8 * i, 150), (90, 100)][: 1 + (i % 3 == 2)]
            made.append(Query("Which digit?", [image(10 * i + j, *size) for j, size in enumerate(sizes)]))
    return made


def prompts(count: int, *, config: RolloutConfig = CONFIG, video: bool = False, uids=None):
    return build_prompts(
        queries(count, video=video),
        vocabulary(),
        token_tables(),
        config,
        shape=shape(config, video=video),
        uids=uids,
    )


def shape(config: RolloutConfig = CONFIG, *, video: bool = False, tokens: int = 96) -> BatchShape:
    """Room for `queries`: for images, or for these and videos."""
    return prompt_shape(3 if video else 2, 192, 192, tokens, config, video=video, still=True)


def with_pixels(t, prompts, config: RolloutConfig = CONFIG, mesh=None):
    """What a rollout of `prompts` has returned, with what its rows saw; on the host."""
    images = np.repeat(prompts.images, len(t.stop) // len(prompts.length))
    visual = materialize(t.visual, images, static_shape(prompts, config, mesh), config, mesh)
    return to_host(t._replace(visual=visual))
