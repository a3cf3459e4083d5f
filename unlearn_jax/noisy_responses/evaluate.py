"""`unlearn-jax eval` on wrong answers: all cells of a study, and its table."""

from typing import Any

from jax.sharding import Mesh

from unlearn_jax.noisy_responses.config import NoisyResponsesConfig
from unlearn_jax.noisy_responses.edit import TASK
from unlearn_jax.noisy_responses.report import REPORT
from unlearn_jax.noisy_responses.study import NoisyResponsesStudy
from unlearn_jax.studies.commands import compute, show


def evaluate(config: NoisyResponsesConfig, mesh: Mesh | None = None) -> list[dict[str, Any]]:
    """Computes all missing cells, and shows the table. An interrupted run continues with the next cell.

    Returns:
        The cells of all seeds but the tuning seed.
    """
    return show(config, compute(NoisyResponsesStudy.of, TASK, config, None, mesh), REPORT.columns)
