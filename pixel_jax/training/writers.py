"""Where metrics and conversations go besides the terminal and the run's own page: JSON lines always, TensorBoard and Weights &
Biases where they are asked for.

The two are optional (`pip install tensorboardX wandb`); TensorBoard's files are written without TensorFlow.
"""

import importlib
import os
import pathlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from pixel_jax.evaluation import report
from pixel_jax.evaluation.trace import Trace, as_text, drawn
from pixel_jax.files import write_file
from pixel_jax.state_files import LineLog, read_lines, to_json

WriterName = Literal["tensorboard", "wandb"]


class Writer(Protocol):
    def write(self, step: int, metrics: Mapping[str, Any]) -> None: ...

    def show(self, step: int, name: str, traces: Sequence[Trace]) -> None:
        """Conversations as they were after `step`; `name` is what they are of."""

    def close(self) -> None: ...


def installed(module: str, wanted: str) -> Any:
    """The optional `module`; a ValueError says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"metrics are to go to {wanted!r}, which needs {module}: pip install {module}") from None


class MetricsLog:
    """One JSON object a line. Lines of steps that a restart is about to repeat are dropped when it opens."""

    def __init__(self, path: str | os.PathLike, start: int):
        kept = [line for line in read_metrics(path) if line["step"] < start]
        write_file(path, "".join(to_json(line) + "\n" for line in kept))
        self.log = LineLog(path, durable=False)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.log.append([{"step": step, **metrics}])

    def show(self, step: int, name: str, traces: Sequence[Trace]) -> None:
        """Nothing: conversations lie in files of their own (`pixel_jax.training.watch`)."""

    def close(self) -> None:
        self.log.close()


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics file, in order (`pixel_jax.state_files.read_lines`)."""
    return read_lines(path, step=int)


class TensorBoard:
    """Event files in `directory`. What was written of step `start` and later is no longer shown: it is about to be repeated."""

    def __init__(self, directory: pathlib.Path, start: int):
        writer = installed("tensorboardX", "tensorboard").SummaryWriter
        # Files are named after the second they are begun in: two starts in one second are two files.
        self.writer = writer(str(directory), purge_step=start, filename_suffix=f".{start}")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def show(self, step: int, name: str, traces: Sequence[Trace]) -> None:
        for i, trace in enumerate(traces, 1):
            # Its text is read as Markdown: every line is indented, which makes it code, whatever it holds.
            code = "".join(f"    {line}\n" for line in as_text(trace).splitlines())
            self.writer.add_text(f"{name}/{i}", code, step)
            for j, picture in enumerate([*trace.pictures, *(x for turn in trace.turns for x in turn.pictures)]):
                self.writer.add_image(f"{name}/{i}/{j} {picture.caption}", drawn(picture), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """One run for a directory, however often it is started again. Project, entity and mode come from wandb's own environment
    variables (`WANDB_PROJECT`, `WANDB_MODE=offline`, ...).

    Its own step counter cannot go back; so `step` is logged as a number, which all metrics are drawn against.
    """

    def __init__(self, directory: pathlib.Path, label: str):
        wandb = installed("wandb", "wandb")
        identity = directory / "wandb_id.txt"
        if not identity.exists():
            write_file(identity, uuid.uuid4().hex[:12])
        project = os.environ.get("WANDB_PROJECT", "pixel_jax")
        self.run = wandb.init(
            project=project,
            name=label,
            id=identity.read_text(),
            resume="allow",
            dir=str(directory),
            reinit="create_new",
        )
        self.html = wandb.Html
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.run.log({"step": step, **metrics})

    def show(self, step: int, name: str, traces: Sequence[Trace]) -> None:
        page = self.html(report.traces_page(traces, f"{name}, step {step}"), inject=False)
        self.run.log({"step": step, name: page})

    def close(self) -> None:
        self.run.finish()


class Writers:
    """All of them as one."""

    def __init__(self, parts: Sequence[Writer]):
        self.parts = tuple(parts)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        for part in self.parts:
            part.write(step, metrics)

    def show(self, step: int, name: str, traces: Sequence[Trace]) -> None:
        for part in self.parts:
            part.show(step, name, traces)

    def close(self) -> None:
        for part in self.parts:
            part.close()


def open_writers(directory: pathlib.Path, start: int, names: Sequence[WriterName], label: str) -> Writers:
    """`directory/metrics.jsonl`, and what `names` asks for, of a run that goes on at step `start`."""
    parts: list[Writer] = [MetricsLog(directory / "metrics.jsonl", start)]
    if "tensorboard" in names:
        parts.append(TensorBoard(directory / "tensorboard", start))
    if "wandb" in names:
        parts.append(WeightsAndBiases(directory, label))
    return Writers(parts)
