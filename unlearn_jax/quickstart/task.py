"""The quickstart's model and traces as a `RequestTask`."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from pixel_jax.parallel.processes import is_main_process
from pixel_jax.training.progress import ProgressLine
from unlearn_jax.arrays import Params
from unlearn_jax.baselines import Trained, converge
from unlearn_jax.config import ErasureConfig
from unlearn_jax.dataset import Dataset
from unlearn_jax.loss import Loss
from unlearn_jax.objective import Objective
from unlearn_jax.quickstart.adapter_run import AdapterRun
from unlearn_jax.quickstart.config import Config
from unlearn_jax.quickstart.traces import TraceItem, changed, describe, draw_traces, encode
from unlearn_jax.requests.request import Request
from unlearn_jax.requests.task import Description, RequestsConfig, Retrained


@dataclasses.dataclass(frozen=True, eq=False)
class TraceTask:
    """The task of traces that an adapter of the quickstart's model has learned, by L-BFGS on all of them at once."""

    run: AdapterRun

    @property
    def config(self) -> Config:
        """The configuration of the experiment."""
        return self.run.config

    @property
    def directory(self) -> pathlib.Path:
        """See `RequestTask.directory`."""
        return self.config.directory

    @property
    def loss(self) -> Loss:
        """See `RequestTask.loss`."""
        return self.run.loss

    @property
    def erasure(self) -> ErasureConfig:
        """See `RequestTask.erasure`."""
        return self.config.erasure

    @property
    def requests(self) -> RequestsConfig:
        """See `RequestTask.requests`."""
        return self.config.requests

    @property
    def mesh(self) -> Mesh | None:
        """See `RequestTask.mesh`."""
        return self.run.mesh

    def settings(self) -> dict[str, Any]:
        """See `RequestTask.settings`."""
        return json.loads(json.dumps(dataclasses.asdict(self.config)))

    def items(self) -> dict[str, TraceItem]:
        """See `RequestTask.items`."""
        return {name: TraceItem(x) for name, x in draw_traces(self.config.traces, self.config.seed).items()}

    def change(self, item: TraceItem, request: Request) -> TraceItem:
        """See `RequestTask.change`."""
        return changed(item, request)

    def encode(self, items: Mapping[str, TraceItem]) -> dict[str, Any]:
        """See `RequestTask.encode`."""
        return encode(items, self.run.vocabulary, self.run.limits)

    def neighbours(self, names: Sequence[str], forgotten: Sequence[str]) -> list[bool]:
        """Traces of the same kinds."""
        kinds = {name.split("-")[0] for name in forgotten}
        return [name.split("-")[0] in kinds for name in names]

    def describe(self, item: TraceItem) -> Description:
        """See `RequestTask.describe`."""
        return describe(item)

    def load(self, path: pathlib.Path) -> Params:
        """See `RequestTask.load`."""
        return self.run.load(path)

    def save(self, path: pathlib.Path, adapter: Params) -> None:
        """See `RequestTask.save`."""
        self.run.save(path, adapter)

    def retrain(self, items: Mapping[str, TraceItem], weights: np.ndarray) -> Retrained:
        """Repeats the training from the fresh adapter, because every step of L-BFGS uses all traces."""
        trained, _ = self.descend(self.run.objective(Dataset.of(self.encode(items)), weights))
        return Retrained(trained.adapter, trained.gradients, "the beginning")

    def descend(self, objective: Objective) -> tuple[Trained, float]:
        """Minimises an objective; returns the minimum, and the norm of the gradient there."""
        limits = self.config.training
        progress = ProgressLine("L-BFGS", limits.max_steps)

        def show(step, value, norm):
            if is_main_process():
                progress.update(step, {"objective": value, "gradient": norm})

        return converge(objective, self.run.fresh, tolerance=limits.tolerance, max_steps=limits.max_steps, log=show)
