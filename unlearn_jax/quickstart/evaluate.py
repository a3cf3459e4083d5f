"""`unlearn-jax eval`: the edit beside a warm retrain on the edited traces, and baselines that cost as much as it did."""

import functools
import time
from collections.abc import Callable, Iterator

import numpy as np
import optax
from jax.sharding import Mesh

from pixel_jax.cli import UserError
from pixel_jax.parallel.processes import say
from unlearn_jax import baselines
from unlearn_jax.arrays import Params
from unlearn_jax.baselines import Trained, Training, converge
from unlearn_jax.edits import apply
from unlearn_jax.quickstart.config import Config
from unlearn_jax.quickstart.job import WARM, Job, place, to_host
from unlearn_jax.quickstart.measure import Measure, Memory, table
from unlearn_jax.quickstart.requests import REPORT, Edited, adapter_after, carried_out, draw_traces, folder, left_by

DESCENTS: dict[str, Callable[..., Trained]] = {
    "fine-tune": baselines.retrain,
    "GradDiff": baselines.grad_diff,
    "NPO": baselines.npo,
}


def evaluate(config: Config, mesh: Mesh | None = None) -> dict:
    """{adapter: its numbers} of the last request, from what the earlier ones had left; also in its directory in `config.out`."""
    config.check_trained()
    requests = carried_out(config.directory)
    number = len(requests)
    if not requests:
        raise UserError(f"{config.out} holds no edit: run `unlearn-jax erase` with the same --config.out first")
    job = Job.of(config, mesh)
    report = job.read(f"{folder(number)}/{REPORT}", "erase")
    traces = functools.reduce(left_by, requests[:-1], draw_traces(config.traces, config.seed))
    edited = Edited.of(traces, requests[-1], job.vocabulary, job.limits)
    trained, found = job.load(adapter_after(number - 1)), job.load(adapter_after(number))
    begun = time.perf_counter()
    objective = job.objective(apply(edited.dataset, edited.edits, job.loss))
    limits = {"tolerance": config.training.tolerance, "max_steps": config.training.max_steps}
    warm, norm = converge(objective, trained, **limits)
    seconds = time.perf_counter() - begun
    job.save(f"{folder(number)}/{WARM}", warm.adapter)
    say(f"warm retrain: {len(warm.values)} steps, gradient {norm:.1e}, {seconds:.0f} s")
    measure, forgotten = Measure.of(job, edited), requests[-1].names()
    memory = Memory.of(job, traces, forgotten) if forgotten else None
    remembered = memory.auc(warm.adapter) if memory else 0.0
    lowest = float(objective.value(warm.adapter))

    def numbers(adapter: Params, gradients: float, seconds: float) -> dict:
        cosine = measure.cosine(adapter, warm.adapter, trained)
        return {
            "example_gradients": gradients,
            "seconds": seconds,
            "objective": float(objective.value(adapter)) - lowest,
            **measure.from_reference(adapter, warm.adapter),
            **({} if np.isnan(cosine) else {"cosine": cosine}),  # none of an adapter that has not moved
            **(memory.of_adapter(adapter, remembered) if memory else {}),
            "losses": measure.losses(adapter),
        }

    rows = {
        "before": numbers(trained, 0.0, 0.0),
        "edited": numbers(found, report["example_gradients"], report["seconds"]),
    }
    for name in config.evaluation.baselines:
        tried = [
            {**numbers(adapter, gradients, seconds), **facts}
            for adapter, gradients, seconds, facts in _baseline(name, job, edited, objective, trained, report)
        ]
        if tried:
            rows[name] = min(tried, key=lambda row: row["kl_forget"] + row["kl_retain"])
    rows["warm retrain"] = numbers(warm.adapter, warm.gradients, seconds)
    job.write(f"{folder(number)}/evaluation.json", rows)
    shown = {name: {k: x for k, x in row.items() if k not in ("losses", "learning_rate")} for name, row in rows.items()}
    say("\n" + table(shown) + "\n")
    say(table({name: row["losses"] for name, row in rows.items()}, "loss per token"))
    return rows


def _baseline(
    name: str, job: Job, edited: Edited, objective, start: Params, report: dict
) -> Iterator[tuple[Params, float, float, dict]]:
    """(adapter, example-gradients, seconds, facts) of every learning rate that does not diverge."""
    config, budget = job.config, report["example_gradients"]
    begun = time.perf_counter()
    if name == "L-BFGS":
        found, _ = converge(objective, start, tolerance=0.0, budget=budget)
        yield found.adapter, found.gradients, time.perf_counter() - begun, {}
        return
    # Descents know no mesh: every process makes all of it, on one device.
    loss, local = to_host((job.loss, start))
    for rate in config.evaluation.learning_rates:
        schedule = optax.cosine_decay_schedule(rate, max(1, int(budget / config.evaluation.batch)))
        training = Training(
            optax.adam(schedule),
            budget,
            config.evaluation.batch,
            seed=config.seed,
            reduction=config.erasure.reduction,
            weight_decay=config.erasure.weight_decay,
        )
        try:
            found = DESCENTS[name](loss, local, edited.dataset, edited.edits, training)
        except FloatingPointError:
            continue
        adapter = place(found.adapter, job.mesh)
        yield adapter, found.gradients, time.perf_counter() - begun, {"learning_rate": rate}
        begun = time.perf_counter()
