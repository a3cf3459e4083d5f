"""`unlearn-jax eval --run=DIR`: the adapter after all requests beside the one before, and beside the exact replay of the run."""

from typing import Any

import numpy as np
from jax.sharding import Mesh

from pixel_jax.cli import UserError
from pixel_jax.parallel.processes import is_main_process, say, waiting
from pixel_jax.state_files import write_json
from unlearn_jax import tree
from unlearn_jax.own_run.config import RunEditConfig
from unlearn_jax.own_run.task import RunTask
from unlearn_jax.requests.carry_out import State
from unlearn_jax.requests.log import ADAPTER
from unlearn_jax.requests.measure import Losses
from unlearn_jax.requests.state import Change

EVALUATION = "evaluation.json"


def evaluate(config: RunEditConfig, mesh: Mesh | None = None) -> dict[str, Any]:
    """Repeats the run without what was removed and with what was changed, and prints the measures.

    Args:
        config: of the run and of its edits.
        mesh: is ignored: the run has its own.

    Returns:
        {adapter: {measure: value}}, also written to `evaluation.json`: mean losses per learned token of the forgotten, new and
        kept examples, and the distance of the adapter's numbers from those of the replay.

    Raises:
        UserError: no request has been carried out.
    """
    task = RunTask.of(config)
    state = State.of(task)
    if not state.entries:
        raise UserError(f"{task.directory} has no request: `unlearn-jax erase --run={config.run} --request=FILE` first")
    change = Change.of(state.first, state.items, task.encode, "answer")  # as one edit, of whatever kinds
    kept = np.array([float(name in state.items) for name in state.first])
    with waiting("repeating the run"):
        replayed = task.retrain({**state.first, **state.items}, kept)
    adapters = {
        "before": task.load(task.directory / ADAPTER),
        "after all requests": task.load(state.adapter_path(task.directory)),
        f"the run again, from {replayed.since}": replayed.adapter,
    }
    losses = Losses(task.loss, task.like, change, micro_batch=task.erasure.micro_batch, mesh=task.mesh)
    results = {}
    for name, adapter in adapters.items():
        with waiting(f"losses {name}"):
            per_example = losses(adapter)
        groups = {f"loss, {group}": float(per_example[index].mean()) for group, index in change.groups().items()}
        results[name] = {**groups, "distance": float(tree.norm(tree.sub(adapter, replayed.adapter)))}
    if is_main_process():
        write_json(task.directory / EVALUATION, results)
    for name, measures in results.items():
        say(f"{name}: " + ", ".join(f"{measure} {value:.4g}" for measure, value in measures.items()))
    return results
