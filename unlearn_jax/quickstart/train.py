"""`unlearn-jax train`: the adapter learns the traces by heart."""

import time

from jax.sharding import Mesh

from pixel_jax.cli import UserError
from pixel_jax.parallel.processes import first, say
from pixel_jax.state_files import read_note
from pixel_jax.training.progress import Progress
from unlearn_jax.baselines import converge
from unlearn_jax.dataset import Dataset
from unlearn_jax.quickstart.config import Config
from unlearn_jax.quickstart.job import ADAPTER, Job
from unlearn_jax.quickstart.traces import draw_traces, to_examples


def train(config: Config, mesh: Mesh | None = None) -> dict:
    """Leaves the adapter, the configuration and the loss of every step in `config.out`; returns what it says at the end."""
    if read_note(config.directory / "config.json") is not None:
        config.check_trained()  # an adapter is there: it is made again, not replaced by another
    job = Job.of(config, mesh)
    traces = draw_traces(config.traces, config.seed)
    dataset = Dataset.of(to_examples(traces, job.vocabulary, job.limits))
    size = sum(x.size for x in job.fresh.values())
    say(f"{len(dataset)} traces, an adapter of {size} numbers; at most {config.training.max_steps} steps of L-BFGS")
    begun = time.perf_counter()
    objective = job.objective(dataset)
    limits = {"tolerance": config.training.tolerance, "max_steps": config.training.max_steps}
    progress = Progress("L-BFGS", config.training.max_steps)
    show = lambda step, value, norm: progress.update(step, {"objective": value, "gradient": norm}) if first() else None
    trained, norm = converge(objective, job.fresh, **limits, log=show)
    if not norm < float("inf"):
        raise UserError(f"training diverged: the gradient's norm is {norm}; set a larger --config.erasure.weight_decay")
    numbers = {
        "steps": len(trained.values),
        "objective": float(trained.values[-1]),
        "gradient_norm": norm,
        "example_gradients": trained.gradients,
        "seconds": time.perf_counter() - begun,
    }
    job.save(ADAPTER, trained.adapter)
    job.write("curve.json", {**numbers, "values": trained.values.tolist()})
    job.write("config.json", config.trained())
    say(
        f"{numbers['steps']} steps in {numbers['seconds']:.0f} s: objective {trained.values[0]:.4f} -> "
        f"{numbers['objective']:.4f}, gradient {norm:.1e}\nThe adapter is in {config.directory / ADAPTER}."
    )
    return numbers
