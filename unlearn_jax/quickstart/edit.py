"""`unlearn-jax erase`: the adapter as if the request had been known before training."""

import dataclasses
import functools
import json

from jax.sharding import Mesh

from pixel_jax.parallel.processes import say
from unlearn_jax.erase import erase
from unlearn_jax.quickstart.config import Config
from unlearn_jax.quickstart.history import REPORT, REQUEST, adapter_after, carried_out, folder, left_by, still_to_do
from unlearn_jax.quickstart.job import Job
from unlearn_jax.quickstart.measure import Measure
from unlearn_jax.quickstart.table import table
from unlearn_jax.quickstart.traces import Edited, Request, describe, draw_traces

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


def edit(config: Config, request: Request | None = None, mesh: Mesh | None = None) -> dict | None:
    """Carries out a request on what the earlier ones have left, and keeps it, the edited adapter and the report in a directory of
    its own in `config.out`; returns the report. None for `request`: the example request.

    What earlier requests have done already is said and not done again: nothing is left to do, None is returned.
    """
    config.check_trained()
    first = draw_traces(config.traces, config.seed)
    earlier = carried_out(config.directory)
    traces = functools.reduce(left_by, earlier, first)
    todo = still_to_do(Request.example(first) if request is None else request, first, traces)
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
