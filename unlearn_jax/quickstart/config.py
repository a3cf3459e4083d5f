"""The configuration of edits on the quickstart's model; `configs/unlearn/quickstart.py` sets it."""

import dataclasses
import json
import pathlib
from typing import Any, Literal

from pixel_jax.quickstart.miniature import SceneConfig
from pixel_jax.train_config import LoRAConfig
from unlearn_jax.config import ErasureConfig
from unlearn_jax.requests.task import RequestsConfig


@dataclasses.dataclass(frozen=True)
class TracesConfig:
    """The numbers of traces of each kind that the adapter learns, on photographs that the quickstart does not train on."""

    zoom: int = 16  # with a small digit, which is read after a zoom
    direct: int = 8  # with a large digit, which is read at once
    video: int = 8  # with a digit on one frame of a clip, which is selected first
    scenes: SceneConfig = SceneConfig()


@dataclasses.dataclass(frozen=True)
class EditForwardConfig:
    """Rematerialisation and attention of the network."""

    remat: bool = True  # compute activations again in the backward pass
    implementation: Literal["dense", "chunked"] = "dense"  # attention


@dataclasses.dataclass(frozen=True)
class ConvergeConfig:
    """The limits of L-BFGS on all traces, for the training and the warm retrain."""

    tolerance: float = 1e-4  # of the gradient's norm
    max_steps: int = 500  # of L-BFGS


@dataclasses.dataclass(frozen=True)
class EditEvaluationConfig:
    """The baselines, which may spend as many example-gradients as the edit did."""

    # The methods that the edit is compared with, besides a retrain.
    baselines: tuple[Literal["L-BFGS", "fine-tune", "GradDiff", "NPO"], ...] = ("L-BFGS", "fine-tune", "NPO")
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)  # of Adam; the best of each baseline is reported
    batch: int = 8  # examples of a step


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole experiment."""

    model: str  # directory of the base model, which the quickstart has trained
    out: str  # run directory
    traces: TracesConfig = TracesConfig()
    adapter: LoRAConfig = LoRAConfig(rank=4, alpha=8.0, targets=r"model\.layers\..*\.(q_proj|v_proj)")
    forward: EditForwardConfig = EditForwardConfig()
    training: ConvergeConfig = ConvergeConfig()
    erasure: ErasureConfig = ErasureConfig()  # its `reduction` and `weight_decay` are those of the training
    requests: RequestsConfig = RequestsConfig()
    evaluation: EditEvaluationConfig = EditEvaluationConfig()
    task: Literal["traces"] = "traces"  # a name of `unlearn_jax.commands.TASKS`
    seed: int = 0  # of the traces and the adapter
    # Directory of an adapter (PEFT's format) to begin with; None: a new one, with the settings `adapter`.
    start: str | None = None

    @property
    def directory(self) -> pathlib.Path:
        """The directory of the run's files."""
        return pathlib.Path(self.out)

    def trained(self) -> dict[str, Any]:
        """The settings that an adapter depends on, as JSON."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        objective = {name: values["erasure"][name] for name in ("reduction", "weight_decay")}
        return {
            **{name: values[name] for name in ("model", "traces", "adapter", "training", "seed", "start")},
            "erasure": objective,
        }
