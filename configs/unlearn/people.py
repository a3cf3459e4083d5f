"""Facts about invented people in the shape of TOFU, learned by a LoRA adapter of a small transformer; 1, 5 or 10 % are removed:

    unlearn-jax train --config=unlearn/people
    unlearn-jax erase --config=unlearn/people --config.forget=forget05
    unlearn-jax eval --config=unlearn/people

The released files: --config.corpus.format=tofu --config.corpus.directory=DIR (or muse)."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = "people"
    config.seed = 0
    config.out = "runs/people"
    config.forget = "forget10"  # what `erase` removes without --request

    config.corpus = {"format": "invented", "directory": "", "people": 50, "known": 150, "holdout": 40, "questions": 4}
    config.network = {"width": 32, "heads": 2, "layers": 2, "rank": 4, "pretraining": 1000}
    config.training = {"epochs": 50, "batch": 20, "learning_rate": 3e-3, "decay": 0.01, "checkpoint_every": 5}
    # AdamW's decay acts beside its steps: as a coefficient of |params|^2 / 2 it is next to nothing.
    config.erasure = {"weight_decay": 0.0, "micro_batch": 50, "training_epochs": 50.0}
    config.requests = {"allow": ("unconverged", "solver", "shortened", "negative_curvature", "finish", "budget")}
    config.evaluation = {
        "baselines": ("fine-tune", "GradDiff", "NPO"),
        "learning_rates": (1e-3, 3e-3, 1e-2),
        "batch": 20,
        "rows": 300,
        "relearning": 50,
    }
    return config
