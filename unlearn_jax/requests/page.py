"""An HTML page for each request: its outcome, losses before and after, and plots of the losses and the solver's residuals.

The page is a single file. It shows nothing of the forgotten examples unless it is given their descriptions.
"""

import math
from collections.abc import Mapping
from typing import Any

from pixel_jax.evaluation import report as html
from pixel_jax.evaluation.curves import panel
from pixel_jax.evaluation.transcript import Picture, data_uri
from unlearn_jax.requests.request import Request
from unlearn_jax.requests.task import Description

Shown = tuple[Description | None, Description | None]  # an example before and after; None where it is not there
FORGOTTEN = ("removed", "old form")
LOSSES_SAID = (
    "Losses are means over learned tokens. What is forgotten should rise to what the model says of examples that it has not "
    "seen; neighbours are like the forgotten examples, and should stay as they are, as should the others."
)


def draw_page(
    number: str, request: Request, report: Mapping[str, Any], shown: Mapping[str, Shown] | None = None
) -> str:
    """The page of a request as HTML.

    Args:
        number: of the request, as its folder is called.
        request: the request.
        report: the contents of report.json, see `requests.carry_out`.
        shown: the examples by id, before and after. None: the page holds no content.
    """
    sections = [
        ("", _summary(request, report)),
        ("Losses", _losses(report["losses"]) + html.paragraph(LOSSES_SAID)),
        ("Curves", _curves(report["losses"], report["edit"])),
    ]
    if report["edit"]:
        sections.append(("The edit", _edit(report["edit"])))
    if shown:
        sections.append(("Content", "".join(_content(name, *pair) for name, pair in shown.items())))
    return html.page(f"Request {number}", sections)


def _summary(request: Request, report: Mapping[str, Any]) -> str:
    rows = [
        ("outcome", f"{report['outcome']}: {report['why']}"),
        ("kind", request.kind),
        ("examples", ", ".join(request.ids)),
        ("asked by", f"{request.who}, {request.when}"),
        ("reason", request.reason),
        ("cost", f"{report['example_gradients']:.0f} example-gradients, {report['seconds']:.0f} s"),
    ]
    if report["replay"]:
        rows.append(("retrained from", report["replay"]["since"]))
    return html.table(("", ""), rows, style="facts")


def _number(value: float) -> str:
    return f"{value:.4g}"


def _losses(losses: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        (name, _number(x["before"]), _number(x["after"]), f"{x['after'] - x['before']:+.3g}")
        for name, x in losses.items()
    ]
    return html.table(("examples", "before", "after", "change"), rows)


def _curves(losses: Mapping[str, Mapping[str, float]], edit: Mapping[str, Any] | None) -> str:
    """Plots of the loss of the forgotten against that of the others, before and after; and of the solver's residuals."""
    panels = []
    forgotten = next((losses[name] for name in FORGOTTEN if name in losses), None)
    for name in ("neighbours", "kept"):
        if forgotten is not None and name in losses:
            points = {when: [(losses[name][when], forgotten[when])] for when in ("before", "after")}
            panels.append(panel("loss of the forgotten", points, f"loss of the {name}"))
    lines = {}
    for number, step in enumerate(edit["steps"] if edit else [], 1):
        lines[f"step {number}"] = [(float(i), math.log10(x)) for i, x in enumerate(step["residuals"]) if x > 0]
    if any(lines.values()):
        panels.append(panel("residual of the solver, log10", lines, "iteration"))
    return f'<div class="curves">{"".join(panels)}</div>' if panels else html.paragraph("Nothing is forgotten.")


def _edit(edit: Mapping[str, Any]) -> str:
    rows = [
        ("verdict", f"{edit['verdict']}: {edit['reason']}"),
        ("edited", f"{edit['edited']} of {edit['examples']} examples"),
        ("change of the edited objective", f"{edit['predicted']:+.3g} predicted, {edit['actual']:+.3g} found"),
        ("length of the change", f"{edit['delta_norm']:.3g}, of an adapter of {edit['adapter_norm']:.3g}"),
        ("epochs of gradients", _number(edit["epochs"])),
        ("peak memory", f"{edit['memory'] / 2**30:.2f} GiB"),
        *((f"limit: {limit['kind']}", limit["text"]) for limit in edit["limits"]),
    ]
    return html.table(("", ""), rows, style="facts")


def _content(name: str, before: Description | None, after: Description | None) -> str:
    parts = []
    for when, item in (("before", before), ("after", after)):
        if item is None:
            parts.append(html.paragraph(f"{when}: not among the training examples"))
            continue
        parts.append(html.table((when, ""), list(item.texts.items()), style="facts"))
        for i, image in enumerate(item.pictures, 1):
            picture = Picture(data_uri(image), image.shape[1], image.shape[0], f"image {i}, {when}")
            parts.append(html.figure(picture, width=280))
    return html.folded(name, "".join(parts), unfolded=True)
