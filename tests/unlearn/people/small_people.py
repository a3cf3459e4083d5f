"""Facts about people at the smallest size there is."""

import dataclasses

from unlearn_jax.config import ErasureConfig
from unlearn_jax.limits import LimitKind
from unlearn_jax.people.config import CorpusConfig, EvaluationConfig, PeopleConfig, PeopleNetworkConfig
from unlearn_jax.requests.replay import TrainingRecipe
from unlearn_jax.requests.task import RequestsConfig

ALLOWED: tuple[LimitKind, ...] = (
    "unconverged", "shortened", "negative_curvature", "finish", "budget", "promise", "solver", "too_small"
)  # fmt: skip


def make_config(out, **changes) -> PeopleConfig:
    config = PeopleConfig(
        out=str(out),
        corpus=CorpusConfig(people=5, known=6, holdout=4, questions=2),
        network=PeopleNetworkConfig(width=16, layers=1, rank=2, pretraining=60),
        training=TrainingRecipe(epochs=8, batch=4, learning_rate=0.02, checkpoint_every=1),
        erasure=ErasureConfig(micro_batch=20, training_epochs=8.0),
        requests=RequestsConfig(allow=ALLOWED),
        evaluation=EvaluationConfig(baselines=("fine-tune",), learning_rates=(1e-2,), batch=4, rows=20, relearning=3),
        forget="forget10",
    )
    return dataclasses.replace(config, **changes)
