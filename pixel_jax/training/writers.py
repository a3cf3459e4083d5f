"""Where metrics go besides the terminal: JSON lines always, TensorBoard and Weights & Biases where they are asked for.

The two are optional (`pip install pixel_jax[metrics]`); TensorBoard's files are written without TensorFlow.
"""

import importlib
import os
import pathlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from pixel_jax.files import write_file
from pixel_jax.training.progress import MetricsLog

WriterName = Literal["tensorboard", "wandb"]


class Writer(Protocol):
    def write(self, step: int, facts: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def installed(module: str, wanted: str) -> Any:
    """The optional `module`; a ValueError says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(
            f"metrics are to go to {wanted!r}, which needs {module}: pip install pixel_jax[metrics]"
        ) from None


class TensorBoard:
    """Event files in `directory`. What was written of step `start` and later is no longer shown: it is about to be repeated."""

    def __init__(self, directory: pathlib.Path, start: int):
        writer = installed("tensorboardX", "tensorboard").SummaryWriter
        # Files are named after the second they are begun in: two starts in one second are two files.
        self.writer = writer(str(directory), purge_step=start, filename_suffix=f".{start}")

    def write(self, step: int, facts: Mapping[str, Any]) -> None:
        for name, value in facts.items():
            self.writer.add_scalar(name, value, step)
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
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, facts: Mapping[str, Any]) -> None:
        self.run.log({"step": step, **facts})

    def close(self) -> None:
        self.run.finish()


class Writers:
    """All of them as one."""

    def __init__(self, parts: Sequence[Writer]):
        self.parts = tuple(parts)

    def write(self, step: int, facts: Mapping[str, Any]) -> None:
        for part in self.parts:
            part.write(step, facts)

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
