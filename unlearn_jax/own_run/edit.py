"""`unlearn-jax erase --run=DIR`."""

from collections.abc import Sequence

from jax.sharding import Mesh

from pixel_jax.cli import UserError
from unlearn_jax.own_run.config import RunEditConfig
from unlearn_jax.own_run.task import RunTask
from unlearn_jax.requests.carry_out import carry_out
from unlearn_jax.requests.log import LogEntry
from unlearn_jax.requests.request import Request


def train(config: RunEditConfig, mesh: Mesh | None = None) -> None:
    """Raises UserError, because a run is trained by `pixel-jax sft`."""
    raise UserError(f"{config.run} is a run of `pixel-jax sft`, which trains it; `unlearn-jax erase --run` edits it")


def edit(
    config: RunEditConfig,
    requests: Sequence[Request] | None = None,
    mesh: Mesh | None = None,
    *,
    show_content: bool = False,
) -> list[LogEntry]:
    """Carries out the requests that the log does not have yet, see `requests.carry_out`.

    Args:
        config: of the run and of its edits.
        requests: in order.
        mesh: must be None: examples are spread as the run spread its batches.
        show_content: the pages show the forgotten texts and images.

    Returns:
        The new entries of the log.

    Raises:
        UserError: there are no requests, or a mesh was asked for.
    """
    if requests is None:
        raise UserError("give the requests as --request=FILE, a line of JSON each (docs/unlearning.md)")
    if mesh is not None:
        raise UserError("--devices is of examples that are made here: a run has its own config.mesh")
    return carry_out(RunTask.of(config), requests, show_content=show_content)
