"""Requests carried out in order on the adapter of a run, each logged.

A request is carried out by an edit (`erase`). If the edit does not improve the edited objective, or meets a limit that the
settings do not allow, it is not applied: the request is escalated, and the training is replayed exactly instead. A request is
complete when it is in the log: an interrupted one is repeated, a logged one is not.
"""

import dataclasses
import datetime
import json
import pathlib
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from pixel_jax.files import read_bytes, read_json, write_file
from pixel_jax.parallel.processes import barrier, is_main_process, say, waiting
from pixel_jax.state_files import to_json
from unlearn_jax.arrays import Params
from unlearn_jax.config import ErasureConfig
from unlearn_jax.cost import least
from unlearn_jax.erase import Erasure, erase
from unlearn_jax.newton import norm
from unlearn_jax.objective import dataset_objective, on_mesh, widen
from unlearn_jax.requests.log import (
    ADAPTER,
    LOG,
    PAGE,
    REPORT,
    REQUEST,
    LogEntry,
    LogError,
    Outcome,
    append,
    folder,
    last_hash,
    read_log,
    sha256,
)
from unlearn_jax.requests.measure import Losses
from unlearn_jax.requests.page import draw_page
from unlearn_jax.requests.request import EditRequestError, Kind, Request, parse_request
from unlearn_jax.requests.state import Change, Items, apply_request, content_hash
from unlearn_jax.requests.task import RequestTask, TrainingRecord

Item = TypeVar("Item")
FAR = 10.0  # times the gradient that training left: with a larger one the adapter was trained on other data
FLOOR = 1e-5  # of the adapter's length: smaller gradients are rounding errors
# Kinds of requests of which a later one undoes an earlier one about the same example.
REPLACING: tuple[Kind, ...] = ("question", "answer", "image")


class State(NamedTuple):
    """The state of a run: the entries of its log, and the present examples."""

    entries: list[LogEntry]
    requests: list[Request]  # of the entries, in the same order
    first: dict[str, Any]  # the examples that the adapter was trained on
    items: dict[str, Any]  # the present examples

    @classmethod
    def of(cls, task: RequestTask) -> "State":
        """Reads the log of a run and applies its requests to the examples.

        Raises:
            LogError: the log, or a request that it names, was changed.
            EditRequestError: the adapter was not trained on the examples of this configuration.
        """
        first, entries = task.items(), read_log(task.directory / LOG)
        _check_training(task, first)
        requests = [_stored(task.directory, entry) for entry in entries]
        items = first
        for request in requests:
            items = apply_request(items, request, first, task.change)
        if entries and content_hash(items) != entries[-1].data_after:
            raise LogError(
                f"{task.directory / LOG}:{len(entries)} left other data than its requests make of the examples"
            )
        return cls(entries, requests, first, items)

    def adapter_path(self, directory: pathlib.Path) -> pathlib.Path:
        """The file of the present adapter."""
        last = [entry.number for entry in self.entries if ADAPTER in entry.files]
        return folder(directory, last[-1]) / ADAPTER if last else directory / ADAPTER


def carry_out(task: RequestTask, requests: Sequence[Request], *, show_content: bool = False) -> list[LogEntry]:
    """Carries out the requests that the log of the run does not have yet.

    All of them are checked before the first is carried out.

    Args:
        task: the model, its adapter and its examples.
        requests: in order.
        show_content: the pages show the forgotten texts and images.

    Returns:
        The new entries of the log.

    Raises:
        EditRequestError: a request cannot be carried out, or the adapter was not trained on these examples.
        LogError: the log was changed.
        OSError: a file cannot be written. The log and the adapter are as they were before the current request.
    """
    with waiting("reading the log and the examples"):
        state = State.of(task)
    added: list[LogEntry] = []
    for request in list(_pending(task, state, requests)):
        number = len(state.entries) + 1
        with waiting(f"request {number}: {request.kind} {len(request.ids)} examples"):
            items = _carry_out_one(task, state, request, show_content)
        if jax.process_count() > 1:
            barrier(f"request {number} is in the log")
        # The main process has written the line; all processes read it.
        entries = read_log(task.directory / LOG)
        entry = entries[number - 1]
        state = State(entries, [*state.requests, request], state.first, items)
        added.append(entry)
        say(f"request {entry.number}, {entry.kind} {', '.join(entry.ids)}: {entry.outcome} ({entry.why})")
    if not added:
        say("nothing to do: the log has all of these requests")
    say(
        f"The adapter is {state.adapter_path(task.directory)}.\nHash of the log's last line: {last_hash(state.entries)}"
    )
    return added


def _pending(task: RequestTask, state: State, requests: Sequence[Request]) -> Iterator[Request]:
    """Yields the requests that are not in the log; each must fit the examples as the requests before it leave them.

    It says where a request replaces what an earlier one gave an example.
    """
    known, items = {request.stored() for request in state.requests}, state.items
    given = {(request.kind, name) for request in state.requests for name in request.ids}
    for number, request in enumerate(requests, 1):
        if request.stored() in known:
            continue
        try:
            items = apply_request(items, request, state.first, task.change)
        except EditRequestError as error:
            raise EditRequestError(f"request {number} of {len(requests)}: {error}") from None
        if not items:
            raise EditRequestError(f"request {number} of {len(requests)} removes the last training example")
        known.add(request.stored())
        for name in request.ids:
            if request.kind in REPLACING and (request.kind, name) in given:
                say(
                    f"request {number} of {len(requests)} replaces the {request.kind} that an earlier one gave {name!r}"
                )
            given.add((request.kind, name))
        yield request


def _stored(directory: pathlib.Path, entry: LogEntry) -> Request:
    """Reads the request of an entry, whose hash must be that of the log."""
    path = folder(directory, entry.number) / REQUEST
    if sha256(read_bytes(path, error=LogError)) != entry.files.get(REQUEST):
        raise LogError(f"{path} is not the request of the log: it was changed")
    return parse_request(read_json(path, error=LogError), str(path), path.parent)


def _check_training(task: RequestTask, first: Items) -> None:
    """Raises EditRequestError unless adapter and examples are those of the training record."""
    record, path = TrainingRecord.read(task.directory), task.directory / ADAPTER
    if record is None:
        raise EditRequestError(
            f"{task.directory} has no training record: run `unlearn-jax train` with the same --config.out"
        )
    if (actual := sha256(read_bytes(path, error=EditRequestError))) != record.adapter:
        raise EditRequestError(
            f"{path} is not the adapter that was trained: its hash is {actual}, it was {record.adapter}"
        )
    if (actual := content_hash(first)) != record.data:
        raise EditRequestError(
            f"the adapter in {task.directory} was not trained on these examples: their hash is {actual}, that of the "
            f"training {record.data}"
        )


@dataclasses.dataclass(frozen=True)
class _Result:
    """The result of a request."""

    outcome: Outcome
    why: str
    adapter: Params
    edit: dict[str, Any] | None  # the report of `erase`
    replay: dict[str, Any] | None
    example_gradients: float


def _carry_out_one(task: RequestTask, state: State, request: Request, show_content: bool) -> dict[str, Any]:
    """Carries out a request and writes its files and its line of the log; returns the examples after it.

    Only the main process writes.
    """
    begun, number = time.perf_counter(), len(state.entries) + 1
    after = apply_request(state.items, request, state.first, task.change)
    change = Change.of(state.items, after, task.encode, request.kind)
    source = state.adapter_path(task.directory)
    adapter = task.load(source)
    expected = state.entries[-1].adapter_after if state.entries else None
    before = sha256(read_bytes(source))
    if expected not in (None, before):
        raise LogError(f"{source} is not the adapter of the log: its hash is {before}, the log says {expected}")
    result = _solve(task, state, change, adapter, after)
    report = {
        "outcome": result.outcome,
        "why": result.why,
        "losses": _losses(task, change, request, adapter, result.adapter),
        "edit": result.edit,
        "replay": result.replay,
        "example_gradients": result.example_gradients,
        "seconds": time.perf_counter() - begun,
    }
    directory = folder(task.directory, number)
    if not is_main_process():
        return after
    try:
        files = _write_files(task, directory, request, result, report, state.items, after, show_content)
        entry = LogEntry(
            number=number,
            at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            ids=list(request.ids),
            kind=request.kind,
            who=request.who,
            when=request.when,
            outcome=result.outcome,
            why=result.why,
            config=sha256(json.dumps(task.settings(), sort_keys=True).encode()),
            data_before=content_hash(state.items),
            data_after=content_hash(after),
            adapter_before=before,
            adapter_after=files.get(ADAPTER, before),
            files=files,
            previous=last_hash(state.entries),
        )
        append(task.directory / LOG, entry)
    except OSError:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return after


def _solve(task: RequestTask, state: State, change: Change, adapter: Params, after: dict[str, Any]) -> _Result:
    """Edits the adapter, or replays the training if the edit is not accepted."""
    if not change.edits:
        return _Result("nothing to do", "earlier requests have done all of it", adapter, None, None, 0.0)
    config = _affordable(task)
    if config is None:
        refused = (
            f"the limit 'dearer' is not allowed: an edit costs at least {least(task.erasure):.3g} epochs of gradients, the "
            f"training cost {task.erasure.training_epochs:g}"
        )
        gradient, size = _first_gradient(task, change, adapter)
        _check_gradient(task, state, gradient, size)
        return _escalated(task, state, after, refused, None, float(len(change.dataset)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report has the limits
        erasure = erase(task.loss, adapter, change.dataset, change.edits, config, mesh=task.mesh)
    report = erasure.report
    _check_gradient(task, state, report.residual_gradient, report.adapter_norm)
    edit = json.loads(report.to_json())
    if report.verdict == "nothing_to_do":
        return _Result("nothing to do", report.reason, adapter, edit, None, report.example_gradients)
    refused = _refused(task, erasure)
    if refused is None:
        return _Result("edited", report.reason, erasure.adapter, edit, None, report.example_gradients)
    return _escalated(task, state, after, refused, edit, report.example_gradients)


def _affordable(task: RequestTask) -> ErasureConfig | None:
    """The settings of an edit that may cost no more than the training; None if every edit does.

    They are the task's own where the limit "dearer" is allowed or the cost of the training is not known.
    """
    config = task.erasure
    if config.training_epochs is None or "dearer" in task.requests.allow or config.budget <= config.training_epochs:
        return config
    if least(config) > config.training_epochs:
        return None
    return dataclasses.replace(config, epochs=float(config.training_epochs))


def _first_gradient(task: RequestTask, change: Change, adapter: Params) -> tuple[float, float]:
    """The norms of the gradient of the training's objective, and of the adapter."""
    config = task.erasure
    objective = dataset_objective(
        on_mesh(task.loss, task.mesh), adapter, change.dataset, reduction=config.reduction,
        weight_decay=config.weight_decay, micro_batch=config.micro_batch, mesh=task.mesh,
    )  # fmt: skip
    wide = widen(on_mesh(adapter, task.mesh))
    return float(norm(objective.gradient(wide))), float(norm(wide))


def _escalated(
    task: RequestTask, state: State, after: dict[str, Any], refused: str, edit: dict[str, Any] | None, spent: float
) -> _Result:
    """Replays the training; `edit` is the report of an edit that was not accepted, `spent` its cost."""
    say(f"not applied: {refused}. The training is repeated without what was edited so far")
    weights = np.array([float(name in after) for name in state.first])
    with waiting("repeating the training"):
        replayed = task.retrain({**state.first, **after}, weights)
    replay = {"since": replayed.since, "example_gradients": replayed.gradients}
    why = f"{refused}; retrained from {replayed.since}"
    return _Result("escalated", why, replayed.adapter, edit, replay, spent + replayed.gradients)


def _refused(task: RequestTask, found: Erasure) -> str | None:
    """Why an edit is not accepted; None if it is."""
    if found.report.verdict == "not_improved":
        return f"not improved: {found.report.reason}"
    refused_limits = [limit for limit in found.report.limits if limit.kind not in task.requests.allow]
    return f"the limit {refused_limits[0].kind!r} is not allowed: {refused_limits[0]}" if refused_limits else None


def _check_gradient(task: RequestTask, state: State, gradient: float, adapter_norm: float) -> None:
    """Raises EditRequestError if the objective's gradient at the trained adapter is far above the one that training left."""
    record = TrainingRecord.read(task.directory)
    if state.entries or record is None:
        return
    if gradient > FAR * max(record.gradient_norm, FLOOR * adapter_norm):
        raise EditRequestError(
            f"the adapter in {task.directory} was not trained on this data with this base model: the gradient of the "
            f"training's objective is {gradient:.3g} there, training left {record.gradient_norm:.3g}"
        )


def _losses(
    task: RequestTask, change: Change, request: Request, before: Params, after: Params
) -> dict[str, dict[str, float]]:
    """Mean losses per learned token, as {group: {"before": loss, "after": loss}}."""
    losses = Losses(task.loss, before, change, micro_batch=task.erasure.micro_batch, mesh=task.mesh)
    old, new = losses(before), losses(after)
    groups = change.groups(task.neighbours(change.dataset.ids.tolist(), request.ids))
    return {
        name: {"before": float(old[index].mean()), "after": float(new[index].mean())} for name, index in groups.items()
    }


def _write_files(
    task: RequestTask,
    place: pathlib.Path,
    request: Request,
    result: _Result,
    report: dict[str, Any],
    items: dict[str, Any],
    after: dict[str, Any],
    show_content: bool,
) -> dict[str, str]:
    """Writes the files of a request; returns the hash of each file by its name."""
    shutil.rmtree(place, ignore_errors=True)  # the rest of an interrupted request
    place.mkdir(parents=True)
    if result.outcome != "nothing to do":
        task.save(place / ADAPTER, result.adapter)
    write_file(place / REQUEST, request.stored())
    if request.image:
        write_file(place / request.image_name, request.image)
    write_file(place / REPORT, to_json(report, indent=1) + "\n")

    def describe(name: str, examples: dict[str, Any]) -> Any:
        return task.describe(examples[name]) if name in examples else None

    shown = {name: (describe(name, items), describe(name, after)) for name in request.ids} if show_content else None
    write_file(place / PAGE, draw_page(place.name, request, report, shown))
    return {path.name: sha256(path.read_bytes()) for path in sorted(place.iterdir())}
