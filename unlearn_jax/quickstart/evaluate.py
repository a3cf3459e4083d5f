"""`unlearn-jax eval` on traces: the edited adapter beside a warm retrain, and baselines that cost as much as the edits did."""

import time
from collections.abc import Callable, Iterator

import numpy as np
import optax
from jax.sharding import Mesh

from pixel_jax.cli import UserError
from pixel_jax.files import read_json
from pixel_jax.parallel.processes import say, waiting
from unlearn_jax import baselines
from unlearn_jax.arrays import Params
from unlearn_jax.baselines import Trained, Training, converge
from unlearn_jax.edits import apply
from unlearn_jax.quickstart.adapter_run import AdapterRun, put, to_host
from unlearn_jax.quickstart.config import Config
from unlearn_jax.quickstart.measure import Measure, Memory
from unlearn_jax.quickstart.task import TraceTask
from unlearn_jax.requests.carry_out import State
from unlearn_jax.requests.log import ADAPTER, LOG, REPORT, folder
from unlearn_jax.requests.measure import table
from unlearn_jax.requests.state import Change
from unlearn_jax.requests.task import check_trained

WARM, EVALUATION = "warm.safetensors", "evaluation.json"

DESCENTS: dict[str, Callable[..., Trained]] = {
    "fine-tune": baselines.retrain,
    "GradDiff": baselines.grad_diff,
    "NPO": baselines.npo,
}


def evaluate(config: Config, mesh: Mesh | None = None) -> dict:
    """Scores the adapters after all requests of the log; returns {adapter: numbers} and writes it to `config.out`."""
    check_trained(config.directory, config.trained())
    if not (config.directory / LOG).exists():
        raise UserError(f"{config.out} holds no edit: run `unlearn-jax erase` with the same --config.out first")
    run = AdapterRun.of(config, mesh)
    task = TraceTask(run)
    state = State.of(task)
    reports = [read_json(folder(task.directory, entry.number) / REPORT) for entry in state.entries]
    report = {name: sum(x[name] for x in reports) for name in ("example_gradients", "seconds")}
    # The requests may be of several kinds. As one edit they are a correction of answers, which may change everything.
    change = Change.of(state.first, state.items, task.encode, "answer")
    forgotten = change.dataset.ids[change.forgotten].tolist()
    trained, edited = run.load(task.directory / ADAPTER), run.load(state.adapter_path(task.directory))
    begun = time.perf_counter()
    objective = run.objective(apply(change.dataset, change.edits, run.loss))
    limits = {"tolerance": config.training.tolerance, "max_steps": config.training.max_steps}
    with waiting("a warm retrain, for comparison"):
        warm, norm = converge(objective, trained, **limits)
    seconds = time.perf_counter() - begun
    run.save(task.directory / WARM, warm.adapter)
    say(f"warm retrain: {len(warm.values)} steps, gradient {norm:.1e}, {seconds:.0f} s")
    measure = Measure.of(run, change)
    traces = {name: item.trace for name, item in state.first.items()}
    memory = Memory.of(run, traces, forgotten) if forgotten else None
    remembered = memory.auc(warm.adapter) if memory else 0.0
    lowest = float(objective.value(warm.adapter))

    def numbers(adapter: Params, gradients: float, seconds: float) -> dict:
        cosine = measure.cosine(adapter, warm.adapter, trained)
        return {
            "example_gradients": gradients,
            "seconds": seconds,
            "objective": float(objective.value(adapter)) - lowest,
            **measure.from_reference(adapter, warm.adapter),
            **({} if np.isnan(cosine) else {"cosine": cosine}),  # undefined for an adapter that has not changed
            **(memory.of_adapter(adapter, remembered) if memory else {}),
            "losses": measure.losses(adapter),
        }

    with waiting("scoring the adapters"):
        rows = {
            "before": numbers(trained, 0.0, 0.0),
            "edited": numbers(edited, report["example_gradients"], report["seconds"]),
        }
    for name in config.evaluation.baselines:
        with waiting(f"the baseline {name}, at as many gradients as the edits took"):
            tried = [
                {**numbers(adapter, gradients, seconds), **settings}
                for adapter, gradients, seconds, settings in _baseline(name, run, change, objective, trained, report)
            ]
        if tried:
            rows[name] = min(tried, key=lambda row: row["kl_forget"] + row["kl_retain"])
    rows["warm retrain"] = numbers(warm.adapter, warm.gradients, seconds)
    run.write(EVALUATION, rows)
    shown = {name: {k: x for k, x in row.items() if k not in ("losses", "learning_rate")} for name, row in rows.items()}
    say("\n" + table(shown) + "\n")
    say(table({name: row["losses"] for name, row in rows.items()}, "loss per token"))
    return rows


def _baseline(
    name: str, run: AdapterRun, change: Change, objective, start: Params, report: dict
) -> Iterator[tuple[Params, float, float, dict]]:
    """Yields (adapter, example-gradients, seconds, settings) for every learning rate that does not diverge."""
    config, budget = run.config, report["example_gradients"]
    begun = time.perf_counter()
    if name == "L-BFGS":
        trained, _ = converge(objective, start, tolerance=0.0, budget=budget)
        yield trained.adapter, trained.gradients, time.perf_counter() - begun, {}
        return
    # The baselines do not use a mesh: every process computes them on one of its devices.
    loss, local = to_host((run.loss, start))
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
            trained = DESCENTS[name](loss, local, change.dataset, change.edits, training)
        except FloatingPointError:
            continue
        adapter = put(trained.adapter, run.mesh)
        yield adapter, trained.gradients, time.perf_counter() - begun, {"learning_rate": rate}
        begun = time.perf_counter()
