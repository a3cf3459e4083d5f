"""A softmax regression as a task: the smallest model that requests can be carried out on."""

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from safetensors.numpy import load_file, save_file

from unlearn_jax import CrossEntropy, Dataset, Loss
from unlearn_jax.baselines import converge
from unlearn_jax.config import ErasureConfig
from unlearn_jax.objective import Objective, coefficients, dataset_objective
from unlearn_jax.requests.log import ADAPTER
from unlearn_jax.requests.request import EditRequestError, Request
from unlearn_jax.requests.task import Description, RequestsConfig, Retrained, record_training

CLASSES = 3
DECAY = 1e-2


class Point(NamedTuple):
    """A point with two labels, of which one may be masked."""

    x: np.ndarray
    labels: tuple[int, int]
    mask: tuple[bool, bool] = (True, True)


def outputs(scale, params, example):
    return scale * jnp.stack([example["x"] @ params["w"], example["x"] @ params["w"][:, ::-1]])


@dataclasses.dataclass
class LinearTask:
    """See `unlearn_jax.requests.task.RequestTask`."""

    directory: pathlib.Path
    requests: RequestsConfig = RequestsConfig()
    erasure: ErasureConfig = ErasureConfig(weight_decay=DECAY, training_epochs=100.0)
    seed: int = 0
    scale: float = 1.0  # of the base model, which multiplies the inputs
    mesh: None = None
    retrained: int = 0  # how often

    @property
    def loss(self):
        return Loss(Partial(outputs, jnp.float32(self.scale)), CrossEntropy())

    def settings(self) -> dict[str, Any]:
        return {"seed": self.seed, "requests": dataclasses.asdict(self.requests)}

    def items(self):
        random = np.random.default_rng(self.seed)
        x = random.normal(size=(24, 4)).astype(np.float32)
        labels = random.integers(0, CLASSES, (24, 2)).tolist()
        return {f"p{i}": Point(x[i], tuple(labels[i])) for i in range(24)}

    def change(self, item, request):
        if request.kind == "answer":
            if request.value not in map(str, range(CLASSES)):
                raise EditRequestError(f"{request.value!r} is no class")
            return item._replace(labels=(int(request.value), item.labels[1]))
        if request.kind == "question":
            return item._replace(x=np.full(4, float(request.value), np.float32))
        if request.kind == "mask":
            return item._replace(mask=(item.mask[0], False))
        return item._replace(x=np.frombuffer(request.image[:4], np.uint8).astype(np.float32) / 64)

    def encode(self, items):
        columns = zip(*items.values(), strict=True)
        x, labels, mask = (np.array(column) for column in columns)
        return {"id": np.array(list(items)), "x": x, "labels": labels, "loss_mask": mask}

    def neighbours(self, names, forgotten):
        return [name[-1] in {x[-1] for x in forgotten} for name in names]

    def describe(self, item):
        picture = np.full((8, 8, 3), 128, np.uint8)
        return Description({"labels": f"<script>{item.labels}</script>", "x": str(item.x)}, [picture])

    def load(self, path):
        return load_file(path)

    def save(self, path, adapter):
        save_file({name: np.asarray(x) for name, x in adapter.items()}, path)

    def fresh(self):
        return {"w": jnp.zeros((4, CLASSES))}

    def objective(self, items, weights=None) -> Objective:
        data = Dataset.of(self.encode(items))
        if weights is None:
            return dataset_objective(self.loss, self.fresh(), data, weight_decay=DECAY)
        shares = weights * coefficients(self.loss, self.fresh(), data, "per_example", weights.sum())
        return Objective.of(self.loss, data.take(), shares, weight_decay=DECAY)

    def retrain(self, items, weights):
        self.retrained += 1
        found, _ = converge(self.objective(items, weights), self.fresh(), tolerance=1e-7)
        return Retrained(found.adapter, found.gradients, "the beginning")

    def train(self):
        found, norm = converge(self.objective(self.items()), self.fresh(), tolerance=1e-7)
        self.save(self.directory / ADAPTER, found.adapter)
        record_training(self, norm)
        return self


def remove(*ids, **changes):
    return dataclasses.replace(
        Request(ids, "remove", "", b"", "consent withdrawn", "A. Person", "2026-11-30"), **changes
    )


def answer(name, value):
    return Request((name,), "answer", value, b"", "it is wrong", "B. Person", "2026-12-01T10:00:00Z")


def file_of(directory: pathlib.Path) -> dict[str, bytes]:
    """All files of a run."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def lines(*values: dict) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)
