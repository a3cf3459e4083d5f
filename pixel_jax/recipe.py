"""Pixel Reasoner's recipe (arXiv 2505.15966, its appendix, and the released code where the paper is silent) as configs.

The files `configs/pixel/qwen2_5_vl_*.py` are one call each. All numbers of the recipe stand here; what differs between
sizes is in `SIZES`. Words after a colon choose the weights that are trained, and another algorithm than the paper's:

    pixel-jax rl --config=configs/pixel/qwen2_5_vl_7b_rl.py               # all weights
    pixel-jax rl --config=configs/pixel/qwen2_5_vl_7b_rl.py:lora          # adapters
    pixel-jax rl --config=configs/pixel/qwen2_5_vl_7b_rl.py:lora,gspo     # adapters, `pixel_jax.training.algorithms`
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from pixel_jax.training.algorithms import algorithm

PIXEL = 28**2  # pixels of one visual token


class SizeSettings(NamedTuple):
    """The settings that depend on the size of the model."""

    tensor: int  # axis of the mesh: divides the key-value heads
    row_groups: int  # rows of a micro-batch: a multiple of data x fsdp, on the largest mesh that is meant


# Adapters on every linear layer of the decoder; the paper has none.
ADAPTERS = {"rank": 64, "alpha": 128.0, "targets": r"model\.layers\..*"}
SIZES = {"3b": SizeSettings(2, 128), "7b": SizeSettings(4, 64), "32b": SizeSettings(8, 64), "72b": SizeSettings(8, 64)}
LEARNING_RATES = {"full": 1e-6, "lora": 1e-5}  # by the weights that are trained
EXAMPLES, QUERIES = 7_850, 15_400  # released traces (SFT) and questions (RL)


def read_words(words: str) -> tuple[str, str]:
    """Splits the words after a config's colon into "full" or "lora", and the name of an algorithm or ""."""
    weights, _, other = words.partition(",")
    return (weights, other) if weights in LEARNING_RATES else ("full", words)


def base(size: str, weights: str) -> ConfigDict:
    """The settings that both phases share.

    Raises:
        ValueError: the size or the weights are unknown.
    """
    if size not in SIZES:
        raise ValueError(f"the recipe knows the sizes {', '.join(SIZES)}, not {size!r}")
    if weights not in LEARNING_RATES:
        raise ValueError(f"the weights to train are 'full' or 'lora', not {weights!r}")
    config = ConfigDict()
    config.watch = ConfigDict()
    config.host_tools = ConfigDict()
    config.architecture = f"qwen2.5-vl-{size}"
    config.lora = ADAPTERS if weights == "lora" else None
    config.mesh = {"data": 1, "fsdp": -1, "tensor": SIZES[size].tensor}
    # A batch is about images or about videos of 16 frames, each kind in a shape of its own. Pictures that are larger are
    # made smaller: the original shows, and cuts crops from, `max_pixels` of them.
    config.image_buffer = (1, 2048, 2048)
    config.prompt_width = 2560
    config.video_buffer = (16, 720, 1280)
    config.video_prompt_width = 5120
    config.bad_rows = "error"
    return config


def optimizer(weights: str, **values) -> dict[str, Any]:
    """Returns the settings of AdamW.

    Adapters take ten times the learning rate of all weights (Schulman et al., LoRA Without Regret, 2025).
    """
    return {
        "kind": "adamw",
        "learning_rate": LEARNING_RATES[weights],
        "schedule": "cosine",
        "b1": 0.9,
        "b2": 0.95,
        "weight_decay": 0.0,
        "clip": 1.0,
        **values,
    }


def forward(size: str, rows: int) -> dict[str, Any]:
    """The settings of the forward and backward pass of `rows` rows."""
    return {
        "micro_batches": max(1, rows // SIZES[size].row_groups),
        "remat": True,
        "compute_dtype": "bfloat16",
    }


def sft(size: str, weights: str = "full", changes: Mapping[str, Any] = {}) -> ConfigDict:  # noqa: B006, never changed
    """Returns the config of the warm start (§4.1, App.; the released `sft.sh`), with `changes` on top."""
    config = base(size, weights)
    config.model = f"models/Qwen2.5-VL-{size.upper()}-Instruct"
    config.data = "data/traces.jsonl"
    config.out = f"runs/{size}_sft"
    config.seed = 49
    config.corrections = True
    # Pixel budgets of tuning, whatever is shown; frames of a video have one of their own.
    largest = {"min_pixels": 3136, "max_pixels": 5120 * PIXEL}
    config.rollout = {
        **largest,
        **{f"crop_{name}": value for name, value in largest.items()},
        **{f"select_{name}": value for name, value in largest.items()},
        "video_max_pixels": 420 * 360,
    }
    config.trace_tokens = 12_288
    config.trace_frames = 5  # the image, and at most four crops
    config.trace_patches = 4 * 5120
    config.video_frames = 32  # 16 of the video, and twice eight that were selected
    config.video_patches = 4800  # of a selected frame of 1280 x 720 pixels

    batch = 128  # traces, of the paper; the released script steps with 16
    rows = batch // 2  # about two traces are packed into a row; the start prints the rows of an epoch
    config.sft = ConfigDict()
    config.sft.batch_size = rows
    config.sft.steps = round(5 * EXAMPLES / batch)  # five epochs; the released warm start is the checkpoint at 246
    config.sft.trainable = "(?!visual)" if weights == "full" else ".*lora_"
    config.sft.normalizer = "row"
    config.sft.optimizer = optimizer(weights, warmup=0.1, final_fraction=0.0)
    config.sft.forward = forward(size, rows)
    config.sft.save_every = 82  # 82, 164, 246 and the end
    config.sft.keep = 2
    config.update(changes)
    return config


def rl(size: str, words: str = "full", changes: Mapping[str, Any] = {}) -> ConfigDict:  # noqa: B006, never changed
    """Returns the config of reinforcement learning with the curiosity reward (§4.2, App.), with `changes` on top.

    Args:
        size: the size of the model.
        words: "full" or "lora", the name of an algorithm, or both, as in "lora,dapo".
        changes: settings that replace those of the recipe.
    """
    weights, other = read_words(words)
    config = base(size, weights)
    config.model = f"runs/{size}_sft/model"
    config.data = "data/questions.jsonl"
    config.out = f"runs/{size}_rl"
    config.seed = 42

    config.rl = ConfigDict()
    config.rl.prompts = 512
    # Decoding reads the weights for every token: they are whole on every `tensor` group, and rows are all over the mesh.
    config.rollout_mesh = {"data": -1, "tensor": SIZES[size].tensor}
    config.rl.train_batch = 256
    config.rl.iterations = 3 * (QUERIES // config.rl.prompts)  # at most three epochs
    config.rl.rollout = {
        "group_size": 8,
        "in_flight": 128,  # 1,024 rows of 10,000 tokens at a time
        "temperature": 1.0,
        "later_temperature": 0.9,  # the released code; the paper does not tell turns apart
        "top_p": 0.95,
        "top_k": 40,
        "max_new_tokens": 2048,
        "max_calls": 4,
        "max_images": 16,
        "max_tokens": 12_048,  # 2,048 of the prompt and 10,000 of the response: the released training's model length
        "max_response": 10_000,
        "min_pixels": 4 * PIXEL,
        "max_pixels": 2000 * PIXEL,
        "crop_min_pixels": 4 * PIXEL,
        "crop_max_pixels": 1000 * PIXEL,
        "select_max_pixels": 400 * PIXEL,
        "video_max_pixels": 512 * PIXEL,
    }
    config.rl.reward = {"alpha": 0.5, "beta": 0.05, "threshold": 0.3, "budget": 1, "form": "paper"}
    config.rl.baseline = "mean"
    config.rl.scale_by_std = False
    config.rl.mask_unfinished = False
    config.rl.replay = {"kind": "ssr", "exponent": 1.0, "capacity": 4096, "life": "episode", "threshold": 0.01}
    config.rl.loss = {"clip_low": 0.2, "clip_high": 0.35, "normalizer": "constant", "constant": 200.0, "kl": 0.0}
    config.rl.old_logprobs = "recomputed"
    config.rl.trainable = ".*" if weights == "full" else ".*lora_"
    config.rl.optimizer = optimizer(weights, warmup=0.03, final_fraction=0.5)
    config.rl.forward = forward(size, config.rl.train_batch)
    config.rl.seed = 42
    config.rl.time_operations = 10
    config.rl.save_every = 5
    config.rl.keep = 2
    if other:
        config.rl.update(algorithm(other, longest=config.rl.rollout["max_response"]))
    config.update(changes)
    return config
