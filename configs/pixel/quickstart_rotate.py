"""The quickstart with another tool: `rotate`, on cards that lie on their side (`pixel-jax quickstart
--config=configs/pixel/quickstart_rotate.py`). Reinforcement learning runs twice, with the tool and without."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.lesson = "turn"
    config.seed = 0
    config.network = {"width": 96, "layers": 3, "vision_width": 96, "vision_layers": 2}
    config.scenes = {
        "small_share": 0.0,
        "on_side": 0.7,
    }

    step = {"remat": True}  # on a CPU the recomputed backward pass is the faster one
    config.ground = {
        "steps": 400,
        "batch_size": 96,
        "trainable": ".*",
        "normalizer": "token",
        "optimizer": {"kind": "muon", "learning_rate": 2e-3, "warmup": 0.06, "final_fraction": 0.05, "b2": 0.98},
        "forward": step,
        "save_every": 200,
    }
    config.ground_rows = 8_000
    config.look_share = 0.5

    config.warm = {
        "steps": 100,
        "batch_size": 28,  # of about two traces each
        "trainable": ".*",
        "normalizer": "token",
        "optimizer": {"kind": "muon", "learning_rate": 1e-3, "warmup": 0.1, "final_fraction": 0.05, "b2": 0.98},
        "forward": step,
        "save_every": 50,
    }
    config.warm_rows = 2_000
    config.turns = {"direct": 0.4, "corrected": 0.2}

    config.rl = ConfigDict()
    config.rl.iterations = 60
    config.rl.prompts = 16
    config.rl.train_batch = 128
    config.rl.scale_by_std = True  # GRPO
    config.rl.old_logprobs = "sampler"  # the trainer runs the same forward function
    config.rl.replay = {"kind": "none"}
    config.rl.loss = {"normalizer": "token"}
    config.rl.reward = {"alpha": 0.0, "beta": 0.0}  # right answers are all that is rewarded
    config.rl.optimizer = {"learning_rate": 3e-4, "schedule": "constant", "warmup": 0.0, "b2": 0.98}
    config.rl.forward = step
    config.rl.packing = {"length": 108, "slices": 4, "rows": 68}
    config.rl.save_every = 30
    budget = {"min_pixels": 2 * 28 * 28 + 1, "max_pixels": 5 * 28 * 28 - 1}  # about four visual tokens
    config.rl.rollout = {
        "group_size": 8,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_tokens": 0,
        "max_new_tokens": 10,
        "max_calls": 2,
        "max_images": 8,
        "max_tokens": 160,
        "max_response": 52,
        "max_side": 112,
        "observe_chunk": 16,
        **budget,
        **{f"{kind}_{name}": value for kind in ("crop", "select") for name, value in budget.items()},
    }
    config.width = 20  # tokens of a prompt
    config.evaluation = {"scenes": 400, "batch": 80, "traces": 8}
    return config
