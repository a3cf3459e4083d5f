"""`unlearn-jax train` and `unlearn-jax erase` on recommendations: cells of a study."""

from collections.abc import Sequence

from jax.sharding import Mesh

from pixel_jax.cli import UserError
from unlearn_jax.recommendation.cells import Cell, cells_of, run_cells
from unlearn_jax.recommendation.config import RecommendationConfig
from unlearn_jax.recommendation.methods import REFERENCES
from unlearn_jax.recommendation.study import Study
from unlearn_jax.requests.request import Request


def train(config: RecommendationConfig, mesh: Mesh | None = None) -> list[Cell]:
    """Computes the cells of the trained adapters and of retraining.

    Returns:
        The cells.
    """
    return compute(config, REFERENCES, mesh)


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
    if requests is not None or show_content:
        raise UserError(
            "config.task=recommendation carries out no requests: its edits are config.edits and config.shares"
        )
    return compute(config, ("erase",), mesh)


def compute(config: RecommendationConfig, methods: Sequence[str] | None, mesh: Mesh | None) -> list[Cell]:
    """Computes the cells of some methods; None: of all methods.

    Raises:
        UserError: a mesh is given.
    """
    if mesh is not None:
        raise UserError("config.task=recommendation runs on one device: leave --devices out")
    wanted = [cell for cell in cells_of(config) if methods is None or cell.method in methods]
    run_cells(Study.of(config), wanted)
    return wanted
