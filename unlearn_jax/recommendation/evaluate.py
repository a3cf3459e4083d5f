"""`unlearn-jax eval` on recommendations: all cells of a study, and its table."""

from typing import Any

from jax.sharding import Mesh

from pixel_jax.terminal import say
from unlearn_jax.recommendation.cells import read_cell
from unlearn_jax.recommendation.config import RecommendationConfig
from unlearn_jax.recommendation.edit import compute
from unlearn_jax.recommendation.table import rows_of, text


def evaluate(config: RecommendationConfig, mesh: Mesh | None = None) -> list[dict[str, Any]]:
    """Computes all missing cells, and shows the table. An interrupted run continues with the next cell.

    Returns:
        The cells of all seeds but the tuning seed.
    """
    cells = [read_cell(config, cell) for cell in compute(config, None, mesh)]
    finished = [cell for cell in cells if cell is not None and cell["seed"] != config.tuning_seed]
    say("\n" + text(rows_of(finished)) + "\n")
    return finished
