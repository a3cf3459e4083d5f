"""Writers of metrics and conversations, besides the terminal and the run's page.

JSON lines are always written, TensorBoard's files and Weights & Biases if a config asks for them. These two are optional
(`pip install tensorboardX wandb`); TensorBoard's files are written without TensorFlow.
"""

import importlib
import os
import pathlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from pixel_jax.evaluation import report
from pixel_jax.evaluation.transcript import Transcript, as_text, drawn
from pixel_jax.files import write_file
from pixel_jax.state_files import LineLog, filter_json_lines, read_json_lines

WriterName = Literal["tensorboard", "wandb"]


class Writer(Protocol):
    """Takes the metrics and conversations of a run."""

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of a step."""

    def show(self, step: int, name: str, traces: Sequence[Transcript]) -> None:
        """Writes conversations of the model after `step` under a name."""

    def close(self) -> None:
        """Ends writing."""


def installed(module: str, wanted: str) -> Any:
    """Imports the optional `module`. ValueError: it is not installed; the message says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"metrics are to go to {wanted!r}, which needs {module}: pip install {module}") from None


class MetricsLog:
    """A file of JSON lines, one for each step. When it opens, lines of steps that will be repeated are dropped."""

    def __init__(self, path: str | os.PathLike, start: int):
        filter_json_lines(path, lambda line: line["step"] < start, step=int)
        self.log = LineLog(path, durable=False)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of a step."""
        self.log.append([{"step": step, **metrics}])

    def show(self, step: int, name: str, traces: Sequence[Transcript]) -> None:
        """Does nothing: conversations are saved in separate files (`pixel_jax.training.watch`)."""

    def close(self) -> None:
        """Ends writing."""
        self.log.close()


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads the lines of a metrics file, in order (`pixel_jax.state_files.read_json_lines`)."""
    return read_json_lines(path, step=int)


class TensorBoard:
    """Event files in a directory. Events of step `start` and later are no longer shown, because they will be repeated."""

    def __init__(self, directory: pathlib.Path, start: int):
        writer = installed("tensorboardX", "tensorboard").SummaryWriter
        # The suffix distinguishes the files of two starts within one second.
        self.writer = writer(str(directory), purge_step=start, filename_suffix=f".{start}")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of a step."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def show(self, step: int, name: str, traces: Sequence[Transcript]) -> None:
        """Writes the conversations."""
        for i, trace in enumerate(traces, 1):
            # TensorBoard reads texts as Markdown, in which indented lines are code.
            code = "".join(f"    {line}\n" for line in as_text(trace).splitlines())
            self.writer.add_text(f"{name}/{i}", code, step)
            for j, picture in enumerate([*trace.pictures, *(x for turn in trace.turns for x in turn.pictures)]):
                self.writer.add_image(f"{name}/{i}/{j} {picture.caption}", drawn(picture), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        """Ends writing."""
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases for a directory, which is the same run after every restart.

    Project, entity and mode come from wandb's own environment variables (`WANDB_PROJECT`, `WANDB_MODE=offline`, ...). Its step
    counter cannot go back, so `step` is logged as a number, and all metrics are drawn against it.
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
        """Writes the metrics of a step."""
        self.run.log({"step": step, **metrics})

    def show(self, step: int, name: str, traces: Sequence[Transcript]) -> None:
        """Writes the conversations."""
        page = self.html(report.traces_page(traces, f"{name}, step {step}"), inject=False)
        self.run.log({"step": step, name: page})

    def close(self) -> None:
        """Ends writing."""
        self.run.finish()


class Writers:
    """Writes to several writers."""

    def __init__(self, writers: Sequence[Writer]):
        self.writers = tuple(writers)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of a step."""
        for writer in self.writers:
            writer.write(step, metrics)

    def show(self, step: int, name: str, traces: Sequence[Transcript]) -> None:
        """Writes the conversations."""
        for writer in self.writers:
            writer.show(step, name, traces)

    def close(self) -> None:
        """Ends writing."""
        for writer in self.writers:
            writer.close()


def open_writers(directory: pathlib.Path, start: int, names: Sequence[WriterName], label: str) -> Writers:
    """Opens `directory/metrics.jsonl` and the writers in `names`, for a run that continues at step `start`."""
    writers: list[Writer] = [MetricsLog(directory / "metrics.jsonl", start)]
    if "tensorboard" in names:
        writers.append(TensorBoard(directory / "tensorboard", start))
    if "wandb" in names:
        writers.append(WeightsAndBiases(directory, label))
    return Writers(writers)
