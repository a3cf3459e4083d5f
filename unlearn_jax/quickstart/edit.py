"""`unlearn-jax train` and `unlearn-jax erase`: an adapter that learns the traces, and edits of it."""

import dataclasses
import functools
import json
import time

from jax.sharding import Mesh

from pixel_jax.cli import UserError
from pixel_jax.parallel.processes import is_main_process, say
from pixel_jax.state_files import read_note
from pixel_jax.training.progress import Progress
from unlearn_jax.baselines import converge
from unlearn_jax.dataset import Dataset
from unlearn_jax.erase import erase
from unlearn_jax.quickstart.config import Config
from unlearn_jax.quickstart.job import ADAPTER, Job
from unlearn_jax.quickstart.measure import Measure, table
from unlearn_jax.quickstart.requests import (
    REPORT,
    REQUEST,
    Edited,
    EditRequest,
    adapter_after,
    carried_out,
    describe,
    draw_traces,
    folder,
    left_by,
    still_to_do,
    to_examples,
)


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

    def show(step, value, norm):
        if is_main_process():
            progress.update(step, {"objective": value, "gradient": norm})

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


STEP_COLUMNS = (
    "gradient",
    "damping",
    "solver_steps",
    "residual",
    "size",
    "step_size",
    "predicted",
    "actual",
    "seconds",
)


def edit(config: Config, request: EditRequest | None = None, mesh: Mesh | None = None) -> dict | None:
    """Carries out a request on what the earlier ones have left.

    Keeps it, the edited adapter and the report in a directory of its own in `config.out`. What earlier requests have done
    already is said and not done again.

    Args:
        config: the experiment.
        request: None: one edit of each kind, on the first traces.
        mesh: spreads the examples.

    Returns:
        The report; None where nothing is left to do.
    """
    config.check_trained()
    first = draw_traces(config.traces, config.seed)
    earlier = carried_out(config.directory)
    traces = functools.reduce(left_by, earlier, first)
    todo = still_to_do(EditRequest.example(first) if request is None else request, first, traces)
    if todo.done:
        say("\n".join(f"done before: {line}" for line in todo.done))
    if todo.done and not todo.request.names():
        say(f"nothing to do: {config.directory / adapter_after(len(earlier))} is the adapter after this request")
        return None
    request, number = todo.request, len(earlier) + 1
    job = Job.of(config, mesh)
    edited = Edited.of(traces, request, job.vocabulary, job.limits)
    say("\n".join(describe(request, traces)) or "no edits")
    adapter = job.load(adapter_after(len(earlier)))
    found = erase(job.loss, adapter, edited.dataset, edited.edits, config.erasure, mesh=mesh)
    measure = Measure.of(job, edited)
    losses = {"before": measure.losses(adapter), "edited": measure.losses(found.adapter)}
    report = {**json.loads(found.report.to_json()), "losses": losses}
    job.save(adapter_after(number), found.adapter)
    job.write(f"{folder(number)}/{REQUEST}", dataclasses.asdict(request))
    job.write(f"{folder(number)}/{REPORT}", report)
    say("\n" + steps_table(report["steps"]) + "\n")
    if finish := report["finish"]:
        say(
            f"L-BFGS from there: {finish['evaluations']} evaluations in {finish['seconds']:.0f} s, objective "
            f"{finish['actual']:+.3g}, gradient {finish['gradient']:.1e}\n"
        )
    groups = {group: {name: loss[group] for name, loss in losses.items()} for group in losses["before"]}
    say(table(groups, "loss per token") + "\n")
    say(outcome(report))
    say(f"The adapter is in {config.directory / adapter_after(number)}, the report beside it.")
    return report


def steps_table(steps: list[dict]) -> str:
    """The steps of a report as text."""
    rows = {str(number): {name: step[name] for name in STEP_COLUMNS} for number, step in enumerate(steps, 1)}
    return table(rows, "step")


def outcome(report: dict) -> str:
    """What became of a request, in words: the verdict and its reason, the limits that were met, the cost."""
    epochs, trained = report["epochs"], report["config"]["training_epochs"]
    beside = (
        "of how long a training, training_epochs does not say" if trained is None else f"the training took {trained:g}"
    )
    met = [f"  - {limit}" for limit in report["limits"]]
    return "\n".join(
        [
            f"{report['verdict']}: {report['reason']}",
            *(["limits that were met:", *met] if met else ["no limit was met"]),
            f"cost: {epochs:.3g} epochs of gradients ({report['example_gradients']:.0f} examples) in {report['seconds']:.0f} s; "
            f"{beside}",
            f"{report['edited']} of {report['examples']} traces edited, |delta| {report['delta_norm']:.3g} of "
            f"{report['adapter_norm']:.3g}",
        ]
    )
