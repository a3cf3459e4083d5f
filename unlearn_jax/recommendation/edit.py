"""`unlearn-jax train` and `unlearn-jax erase` on recommendations: cells of a study."""

from collections.abc import Sequence

from jax.sharding import Mesh

from unlearn_jax.recommendation.config import RecommendationConfig
from unlearn_jax.recommendation.study import RecommendationStudy
from unlearn_jax.requests.request import Request
from unlearn_jax.studies.cells import Cell
from unlearn_jax.studies.commands import compute, refuse_requests
from unlearn_jax.studies.methods import REFERENCES

TASK = "recommendation"


def train(config: RecommendationConfig, mesh: Mesh | None = None) -> list[Cell]:
    """Computes the cells of the trained adapters and of retraining.

    Returns:
        The cells.
    """
    return compute(RecommendationStudy.of, TASK, config, REFERENCES, mesh)


def edit(
    config: RecommendationConfig,
    requests: Sequence[Request] | None = None,
    mesh: Mesh | None = None,
    *,
    show_content: bool = False,
) -> list[Cell]:
    """Computes the cells of `erase`, and trains the adapters that they need.

    Raises:
        UserError: requests are given.
    """
    refuse_requests(TASK, requests, show_content)
    return compute(RecommendationStudy.of, TASK, config, ("erase",), mesh)
