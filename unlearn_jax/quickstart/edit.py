"""`unlearn-jax erase`: the adapter as if the request had been known before training."""

import dataclasses
import json

from jax.sharding import Mesh

from pixel_jax.parallel.processes import say
from unlearn_jax.erase import erase
from unlearn_jax.quickstart.config import Config
from unlearn_jax.quickstart.job import ADAPTER, EDITED, Job
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


def edit(config: Config, request: Request | None = None, mesh: Mesh | None = None) -> dict:
    """Leaves the request, the edited adapter and the report in `config.out`; returns the report. None: the example request."""
    config.check_trained()
    job = Job.of(config, mesh)
    traces = draw_traces(config.traces, config.seed)
    request = Request.example(traces) if request is None else request
    edited = Edited.of(traces, request, job.vocabulary, job.limits)
    say("\n".join(describe(request, traces)) or "no edits")
    adapter = job.load(ADAPTER)
    found = erase(job.loss, adapter, edited.dataset, edited.edits, config.erasure, mesh=mesh)
    measure = Measure.of(job, edited)
    losses = {"before": measure.losses(adapter), "edited": measure.losses(found.adapter)}
    report = {**json.loads(found.report.to_json()), "losses": losses}
    job.save(EDITED, found.adapter)
    job.write("request.json", dataclasses.asdict(request))
    job.write("report.json", report)
    say("\n" + steps_table(report["steps"]) + "\n")
    if finish := report["finish"]:
        say(
            f"L-BFGS from there: {finish['evaluations']} evaluations in {finish['seconds']:.0f} s, objective "
            f"{finish['actual']:+.3g}, gradient {finish['gradient']:.1e}\n"
        )
    groups = {group: {name: loss[group] for name, loss in losses.items()} for group in losses["before"]}
    say(table(groups, "loss per token") + "\n")
    say(
        f"{report['edited']} of {report['examples']} traces edited in {report['seconds']:.0f} s "
        f"({report['example_gradients']:.0f} example-gradients), |delta| {report['delta_norm']:.3g} of "
        f"{report['adapter_norm']:.3g}\nThe edited adapter is in {config.directory / EDITED}, the report beside it."
    )
    return report


def steps_table(steps: list[dict]) -> str:
    rows = {str(number): {name: step[name] for name in STEP_COLUMNS} for number, step in enumerate(steps, 1)}
    return table(rows, "step")
