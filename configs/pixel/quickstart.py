"""The quickstart: the whole recipe on a network of a million parameters. A 7B run differs in these numbers, its tokenizer
and its data. Every value can be set on the command line, `--config.rl.iterations=50`."""

from ml_collections import ConfigDict

from pixel_jax.quickstart.miniature import BENFORD


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.network = {"width": 96, "layers": 3, "vision_width": 96, "vision_layers": 2}
    config.scenes = {
        "small_share": 0.65,
        # A guess is right now and then, as with the numbers that people write down.
        "frequencies": BENFORD,
    }

    step = {"remat": True}  # on a CPU the recomputed backward pass is the faster one
    config.ground = {
        "steps": 600,
        "batch_size": 96,
        "trainable": ".*",
        "normalizer": "token",
        "optimizer": {"kind": "muon", "learning_rate": 2e-3, "warmup": 0.06, "final_fraction": 0.05, "b2": 0.98},
        "forward": step,
        "save_every": 200,
    }
    config.ground_rows = 10_000
    config.look_share = 0.8

    config.warm = {
        "steps": 250,
        "batch_size": 28,  # of about two traces each
        "trainable": ".*",
        "normalizer": "token",
        "optimizer": {"kind": "muon", "learning_rate": 1e-3, "warmup": 0.1, "final_fraction": 0.05, "b2": 0.98},
        "forward": step,
        "save_every": 60,
    }
    config.warm_rows = 4_000
    # More single-pass traces than the paper's 30 %: only they teach a first call, for a mistake carries no loss.
    config.traces = {
        "mix": {"direct": 0.45, "image": (0.6, 0.15, 0.05, 0.2)},
        "video_share": 0.1,
    }

    config.rl = ConfigDict()
    config.rl.iterations = 90
    config.rl.prompts = 16
    config.rl.train_batch = 128
    config.rl.scale_by_std = True  # GRPO
    config.rl.old_logprobs = "sampler"  # the trainer runs the same forward function
    config.rl.replay = {"kind": "none"}
    config.rl.loss = {"normalizer": "token"}
    # The paper: .3. A call that fails does not count, and sampled this hot most of them fail.
    config.rl.reward = {"threshold": 0.6}
    config.rl.optimizer = {"learning_rate": 3e-4, "schedule": "constant", "warmup": 0.0, "b2": 0.98}
    config.rl.forward = step
    # 128 rows have 72 tokens at most and 30 to 50 on average: packed they fill 35 to 65. One number of rows is one compilation.
    config.rl.packing = {"length": 108, "slices": 4, "rows": 68}
    config.rl.save_every = 30
    budget = {"min_pixels": 2 * 28 * 28 + 1, "max_pixels": 5 * 28 * 28 - 1}  # about four visual tokens
    config.rl.rollout = {
        "group_size": 8,
        # Exploring hotter than the policy is used (and judged: at 1) is what sets the trap. A call is a dozen tokens, each
        # of which can go wrong, and what it shows is read hotter still; an answer is three tokens. So looking closer fails
        # first, although the warm start can do it.
        "temperature": 1.7,
        "later_temperature": 2.0,  # of the turns after the first call
        "top_p": 1.0,
        "top_k": 0,
        "min_tokens": 0,
        "max_new_tokens": 10,
        "max_calls": 2,
        "max_images": 8,
        "max_tokens": 160,
        "max_response": 52,
        "pad": 0.0,  # the released 0.1 would undo the zoom in an image of 448 pixels
        "max_side": 112,
        "observe_chunk": 16,
        **budget,
        **{f"crop_{name}": value for name, value in budget.items()},
        **{f"select_{name}": value for name, value in budget.items()},
        "video_min_pixels": 28 * 28,
        "video_max_pixels": 2 * 28 * 28 - 1,
    }
    config.width = 20  # tokens of a prompt
    config.evaluation = {"scenes": 400, "batch": 80, "traces": 8}
    return config
