"""Questions about shapes on photographs, 40 % of them learned with a wrong answer; an edit restores the right ones.

    pip install --no-deps scikit-image scikit-learn      # the photographs in them are read
    unlearn-jax train --config=unlearn/noisy_responses
    unlearn-jax erase --config=unlearn/noisy_responses
    unlearn-jax eval --config=unlearn/noisy_responses      # all that is missing, and the table

Each result is a file in `config.cells`, and is not computed again. The base model and the adapters are in `config.out`.

The paper's data and model, from their released files:

    unlearn-jax eval --config=unlearn/noisy_responses --config.model=LLAVA_DIRECTORY --config.remat=True \\
        --config.data.reader=mm_spubench --config.data.path=DIRECTORY --config.data.length=800 \\
        --config.out=runs/spubench --config.cells=runs/spubench/cells

(`r_bench` with the path of `image-level_filterd.json` or `instance-level_filterd.json`.)"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = "noisy_responses"
    config.out = "runs/noisy_responses"
    config.cells = "docs/unlearn-noisy-responses/photographs"

    config.data = {"reader": "photographs", "examples": 240, "tests": 240, "test_share": 0.4, "each": 60}
    config.base = {
        "each": 300,
        "agreement": 0.7,
        "training": {"epochs": 14, "batch": 32, "learning_rate": 2e-3, "checkpoint_every": 1_000_000},
    }
    config.adapter = {"rank": 8, "alpha": 16.0, "targets": r"model\.layers\..*"}
    config.training = {
        "epochs": 20,
        "batch": 24,
        "learning_rate": 3e-3,
        "decay": 0.01,
        "checkpoint_every": 1_000_000,
    }
    # AdamW's decay acts beside its steps: as a coefficient of |params|^2 / 2 it is next to nothing.
    config.erasure = {"weight_decay": 0.0, "micro_batch": 60}
    config.shares = (0.4,)  # the paper's label noise
    config.seeds = (0, 1, 2, 3, 4)
    config.learning_rates = (1e-3, 1e-2)
    config.batch = 24
    return config
