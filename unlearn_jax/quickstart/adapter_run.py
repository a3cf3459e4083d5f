"""The base model with its adapter, and the files of a run, for all commands on traces."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from pixel_jax.cli import UserError
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.files import write_file
from pixel_jax.models.io import from_pretrained
from pixel_jax.models.layers import LoRAWeight
from pixel_jax.models.lora import add_lora, combine, split
from pixel_jax.models.model import Model
from pixel_jax.models.peft import load_adapter, save_adapter
from pixel_jax.parallel.processes import is_main_process
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.limits import read_limits
from pixel_jax.state_files import write_json
from pixel_jax.training.progress import use_compilation_cache
from unlearn_jax.arrays import Params
from unlearn_jax.dataset import Dataset
from unlearn_jax.loss import Loss
from unlearn_jax.objective import Objective, coefficients, normalizer, on_device
from unlearn_jax.quickstart.config import Config
from unlearn_jax.vision_language import adapter_loss


@dataclasses.dataclass(frozen=True, eq=False)
class AdapterRun:
    """The base model with a fresh adapter, and the directory of a run."""

    config: Config
    mesh: Mesh | None
    vocabulary: Vocabulary
    limits: RolloutConfig  # the limits of traces under which the base model was trained
    base: Model  # without the adapter
    loss: Loss
    fresh: Params  # the adapter before training

    @classmethod
    def of(cls, config: Config, mesh: Mesh | None = None) -> "AdapterRun":
        """Reads the base model and puts the adapter on it."""
        directory = pathlib.Path(config.model)
        if not (directory / "config.json").is_file():
            raise UserError(
                f"{directory} is not a model directory: `bash launch/quickstart.sh` makes runs/quickstart, or name "
                f"another with --config.model=DIR"
            )
        config.directory.mkdir(parents=True, exist_ok=True)
        use_compilation_cache(config.directory / "compiled")
        model, processor = from_pretrained(directory, mesh=mesh)
        if processor is None:
            raise UserError(f"{directory} has no tokenizer, which the traces are written with")
        if config.start is not None:
            model = load_adapter(model, config.start)
        else:
            model = add_lora(model, jax.random.key(config.seed), **dataclasses.asdict(config.adapter))
        loss, fresh = adapter_loss(model, **dataclasses.asdict(config.forward))
        base = split(model, LoRAWeight)[1]
        vocabulary = Vocabulary.of(processor.tokenizer)
        return cls(config, mesh, vocabulary, read_limits(directory) or RolloutConfig(), base, loss, put(fresh, mesh))

    def objective(self, dataset: Dataset, weights: np.ndarray | None = None) -> Objective:
        """The objective of the training.

        Args:
            dataset: the examples.
            weights: [n], zero for examples that do not count, otherwise one. None: all count.
        """
        erasure = self.config.erasure
        weights = np.ones(len(dataset)) if weights is None else weights
        counted = dataset.select(np.flatnonzero(weights))
        total = normalizer(self.loss, self.fresh, counted, erasure.reduction)
        shares = weights * coefficients(self.loss, self.fresh, dataset, erasure.reduction, total)
        options = {"weight_decay": erasure.weight_decay, "micro_batch": erasure.micro_batch, "mesh": self.mesh}
        return on_device(Objective.of(self.loss, dataset.take(), shares, **options))

    def load(self, path: pathlib.Path) -> Params:
        """An adapter of this model."""
        try:
            adapter = load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path}: truncated or damaged ({error})") from None
        shapes = lambda adapter: {key: (x.shape, str(x.dtype)) for key, x in adapter.items()}
        if shapes(adapter) != shapes(self.fresh):
            raise UserError(f"{path} holds {shapes(adapter)}, the adapter of this configuration {shapes(self.fresh)}")
        return put(adapter, self.mesh)

    def save(self, path: pathlib.Path, adapter: Params) -> None:
        """Writes an adapter atomically, and in PEFT's format as well, into the same directory."""
        values = to_host(adapter)
        if is_main_process():
            write_file(path, save(values, metadata={"format": "np"}))
        save_adapter(combine(adapter, self.base), path.parent, base=self.config.model)

    def write(self, name: str, values: Any) -> None:
        """Writes JSON atomically."""
        if is_main_process():
            write_json(self.config.directory / name, values)


def put(adapter: Params, mesh: Mesh | None) -> Params:
    """Puts an adapter on the device of the base model, or replicates it over the mesh."""
    if mesh is None:
        return jax.device_put(adapter, jax.local_devices()[0])
    sharding = NamedSharding(mesh, PartitionSpec())
    replicate = lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
    return jax.tree.map(replicate, to_host(adapter))


def to_host(tree: Any) -> Any:
    """Copies the arrays of a pytree to NumPy; every process has all of them."""
    return jax.tree.map(lambda x: np.asarray(x) if hasattr(x, "dtype") else x, tree)
