"""`unlearn-jax train` and `unlearn-jax erase` on traces: an adapter that learns them, and requests that edit it."""

import time
from collections.abc import Sequence

from jax.sharding import Mesh

from pixel_jax.cli import UserError
from pixel_jax.parallel.processes import say, waiting
from unlearn_jax.dataset import Dataset
from unlearn_jax.quickstart.adapter_run import AdapterRun
from unlearn_jax.quickstart.config import Config
from unlearn_jax.quickstart.task import TraceTask
from unlearn_jax.quickstart.traces import example_requests
from unlearn_jax.requests.carry_out import carry_out
from unlearn_jax.requests.log import ADAPTER, LogEntry
from unlearn_jax.requests.request import Request
from unlearn_jax.requests.task import SETTINGS, check_trained, record_training, refuse_another_training


def train(config: Config, mesh: Mesh | None = None) -> dict:
    """Trains an adapter; writes it, the configuration and the loss of every step to `config.out`, and returns the metrics."""
    refuse_another_training(config.directory, config.trained())
    run = AdapterRun.of(config, mesh)
    task = TraceTask(run)
    with waiting("writing the traces as tokens"):
        dataset = Dataset.of(task.encode(task.items()))
    size = sum(x.size for x in run.fresh.values())
    say(f"{len(dataset)} traces, an adapter of {size} numbers; at most {config.training.max_steps} steps of L-BFGS")
    begun = time.perf_counter()
    trained, norm = task.descend(run.objective(dataset))
    if not norm < float("inf"):
        raise UserError(f"training diverged: the gradient's norm is {norm}; set a larger --config.erasure.weight_decay")
    metrics = {
        "steps": len(trained.values),
        "objective": float(trained.values[-1]),
        "gradient_norm": norm,
        "example_gradients": trained.gradients,
        "seconds": time.perf_counter() - begun,
    }
    run.save(config.directory / ADAPTER, trained.adapter)
    record_training(task, norm)
    run.write("curve.json", {**metrics, "values": trained.values.tolist()})
    run.write(SETTINGS, config.trained())
    say(
        f"{metrics['steps']} steps in {metrics['seconds']:.0f} s: objective {trained.values[0]:.4f} -> "
        f"{metrics['objective']:.4f}, gradient {norm:.1e}\nThe adapter is in {config.directory / ADAPTER}."
    )
    return metrics


def edit(
    config: Config, requests: Sequence[Request] | None = None, mesh: Mesh | None = None, *, show_content: bool = False
) -> list[LogEntry]:
    """Carries out the requests that the log does not have yet, see `requests.carry_out`.

    Args:
        config: the experiment.
        requests: in order; None: an example of each kind, on the first traces.
        mesh: spreads the examples.
        show_content: the pages show the forgotten texts and images.

    Returns:
        The new entries of the log.
    """
    check_trained(config.directory, config.trained())
    task = TraceTask(AdapterRun.of(config, mesh))
    return carry_out(task, example_requests(task.items()) if requests is None else requests, show_content=show_content)
