"""`unlearn-jax train` and `unlearn-jax erase` on facts about people."""

import time
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from pixel_jax.cli import UserError
from pixel_jax.parallel.processes import is_main_process, say
from pixel_jax.state_files import read_note, write_json
from unlearn_jax import tree
from unlearn_jax.dataset import Dataset
from unlearn_jax.objective import dataset_objective
from unlearn_jax.people.config import CONFIG, PeopleConfig
from unlearn_jax.people.task import PeopleTask
from unlearn_jax.requests.carry_out import carry_out
from unlearn_jax.requests.log import ADAPTER, LogEntry
from unlearn_jax.requests.request import Request
from unlearn_jax.requests.task import record_training, refuse_training_again


def train(config: PeopleConfig, mesh: Mesh | None = None) -> dict[str, float]:
    """Trains an adapter, and writes it, its training record and the checkpoints of the first epoch to `config.out`.

    Returns:
        The metrics of the training.
    """
    if read_note(config.directory / CONFIG) is not None:
        config.check_trained()  # the same adapter is trained again; one of other settings is not overwritten
    refuse_training_again(config.directory)
    task, begun = PeopleTask.of(config, mesh), time.perf_counter()
    items = task.items()
    adapter, spent = task.train(items, np.ones(len(items)), keep=True)
    decay, micro_batch = config.erasure.weight_decay, config.erasure.micro_batch
    data = Dataset.of(task.encode(items))
    objective = dataset_objective(task.model.loss(), adapter, data, weight_decay=decay, micro_batch=micro_batch)
    norm = float(tree.norm(objective.gradient(adapter)))
    if not norm < float("inf"):
        raise UserError(f"training diverged: the gradient's norm is {norm}; lower --config.training.learning_rate")
    task.save(config.directory / ADAPTER, adapter)
    record_training(task, norm)
    if is_main_process():
        write_json(config.directory / CONFIG, config.trained())
    metrics = {
        "examples": float(len(items)),
        "example_gradients": spent,
        "objective": float(objective.value(adapter)),
        "gradient_norm": norm,
        "seconds": time.perf_counter() - begun,
    }
    say(
        f"{len(items)} rows in {metrics['seconds']:.0f} s: loss {metrics['objective']:.4f}, gradient {norm:.1e}\n"
        f"The adapter is {config.directory / ADAPTER}."
    )
    return metrics


def edit(
    config: PeopleConfig,
    requests: Sequence[Request] | None = None,
    mesh: Mesh | None = None,
    *,
    show_content: bool = False,
) -> list[LogEntry]:
    """Carries out the requests that the log does not have yet, see `requests.carry_out`.

    Args:
        config: the experiment.
        requests: in order; None: one request that removes the set `config.forget`.
        mesh: spreads the examples.
        show_content: the pages show the forgotten texts.

    Returns:
        The new entries of the log.
    """
    config.check_trained()
    task = PeopleTask.of(config, mesh)
    if requests is None:
        sets = task.corpus.forget
        if config.forget not in sets:
            raise UserError(f"config.forget is {config.forget!r}; the corpus has {', '.join(sets)}")
        filed = (f"the set {config.forget}", "unlearn-jax erase", "2026-01-01")
        requests = [Request(sets[config.forget], "remove", "", b"", *filed)]
    return carry_out(task, requests, show_content=show_content)
