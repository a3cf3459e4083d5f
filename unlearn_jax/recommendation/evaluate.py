"""`unlearn-jax eval` on recommendations: all cells of a study, and its table."""

from typing import Any

from jax.sharding import Mesh

from unlearn_jax.recommendation.config import RecommendationConfig
from unlearn_jax.recommendation.edit import TASK
from unlearn_jax.recommendation.report import REPORT
from unlearn_jax.recommendation.study import RecommendationStudy
from unlearn_jax.studies.commands import compute, show


def evaluate(config: RecommendationConfig, mesh: Mesh | None = None) -> list[dict[str, Any]]:
    """Computes all missing cells, and shows the table. An interrupted run continues with the next cell.

    Returns:
        The cells of all seeds but the tuning seed.
    """
    return show(config, compute(RecommendationStudy.of, TASK, config, None, mesh), REPORT.columns)
