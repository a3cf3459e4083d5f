"""Reads and writes adapters in PEFT's format: directories with `adapter_config.json` and `adapter_model.safetensors`.

In PEFT every linear layer has its own rank and scale; here the layers of a stack share both. A layer of smaller rank is padded
with zeros, which stay zero in training; if a layer's scale differs from its stack's, factor B is multiplied by the ratio.
"""

import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import regex
from jax.sharding import Mesh, NamedSharding

from pixel_jax.files import FileError, read_json, write_file
from pixel_jax.models.checkpoint import few, layer_numbers, named_weights, to_host, wait_until_written
from pixel_jax.models.layers import Linear, LoRAWeight
from pixel_jax.models.lora import copied, linears
from pixel_jax.models.model import Model
from pixel_jax.models.tensors import Tensor, is_finite, open_safetensors, to_safetensors
from pixel_jax.parallel.sharding import partition_spec
from pixel_jax.terminal import warn

M = TypeVar("M", bound=Model)
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
FOLDER = "adapter"  # the directory of the adapter, in the directory of a merged model
PREFIX = "base_model.model."  # of every tensor's name
MAX_RANK = 2**16
MAX_PATTERN = 2**16  # characters
SECONDS = 1.0  # time limit of matching a regular expression of a file with one name

# Fields that do not concern the adapter's computation.
PASSED_OVER = frozenset(
    "auto_mapping base_model_name_or_path revision task_type inference_mode peft_version runtime_config megatron_core "
    "loftq_config eva_config corda_config lora_ga_config qalora_group_size lora_dropout init_lora_weights".split()
)
UNDERSTOOD = frozenset(
    "peft_type r lora_alpha target_modules exclude_modules layers_to_transform layers_pattern rank_pattern alpha_pattern "
    "use_rslora bias".split()
)
REMEDIES = {
    "use_dora": "DoRA; merge it with PEFT (merge_and_unload), and load the merged model",
    "modules_to_save": "it trains whole modules too; merge it with PEFT (merge_and_unload), and load the merged model",
    "trainable_token_indices": "it trains embeddings too; merge it with PEFT (merge_and_unload), and load the merged model",
}
MERGE = "merge it with PEFT (merge_and_unload), and load the merged model"
# Other initialisations change the base weights, and PEFT changes them again when it loads the adapter.
INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")


class LayerName(NamedTuple):
    """The names of a linear layer that may have an adapter."""

    name: str  # as transformers calls the layer
    path: str  # of the linear layer it is part of, with `{}` for the number of a stacked layer
    layer: int | None  # index in the stack; None: not stacked
    key: str  # as we call the layer, with its number


@dataclasses.dataclass(frozen=True)
class PEFTConfig:
    """The fields of an `adapter_config.json` that concern the computation."""

    rank: int
    alpha: float
    targets: str | tuple[str, ...]  # regular expression, or ends of names
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None  # numbers of the layers that have adapters; None: all
    layers_pattern: tuple[str, ...] = ()  # the name in front of such a number; empty: any
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)  # regular expression of names: rank
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rslora: bool = False  # the scale is alpha / sqrt(rank), not alpha / rank
    base: str | None = None  # the model that the adapter was trained on

    @classmethod
    def read(cls, path: Path) -> "PEFTConfig":
        """Reads an `adapter_config.json`.

        Raises:
            FileError: the value of a field is invalid or not supported. The message says what to do.
        """
        values = read_json(path, limit=2**24)
        if not isinstance(values, dict):
            raise FileError(f"{path} holds a {type(values).__name__}, not an object of fields")
        try:
            return cls._of(values)
        except ValueError as error:
            raise FileError(f"{path}: {error}") from None

    @classmethod
    def _of(cls, values: dict[str, Any]) -> "PEFTConfig":
        if (kind := values.get("peft_type")) != "LORA":
            raise ValueError(f"peft_type is {kind!r}; only 'LORA' is supported: {MERGE}")
        if (bias := values.get("bias", "none")) != "none":
            raise ValueError(f"bias is {bias!r}, only 'none' is supported: {MERGE}")
        for name, value in values.items():
            if name not in PASSED_OVER | UNDERSTOOD and value:
                raise ValueError(f"{name} is {value!r}, which is not supported: {REMEDIES.get(name, MERGE)}"[:400])
        if (start := values.get("init_lora_weights", True)) not in INITIALISATIONS:
            raise ValueError(
                f"init_lora_weights is {start!r}, which changes the base weights: save the adapter with PEFT's "
                "path_initial_model_for_weight_conversion"
            )
        if values.get("lora_dropout"):
            warn(f"lora_dropout is {values['lora_dropout']}: there is no dropout here, further training goes without")
        layers = values.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers
        return cls(
            rank=_rank("r", values.get("r", 8)),
            alpha=_alpha("lora_alpha", values.get("lora_alpha", 8)),
            targets=_names("target_modules", values.get("target_modules")),
            exclude=_names("exclude_modules", values.get("exclude_modules") or []),
            layers=None if not layers else tuple(_rank("layers_to_transform", x, least=0) for x in layers),
            layers_pattern=_listed(_names("layers_pattern", values.get("layers_pattern") or [])),
            rank_pattern={key: _rank("rank_pattern", x) for key, x in _pattern("rank_pattern", values)},
            alpha_pattern={key: _alpha("alpha_pattern", x) for key, x in _pattern("alpha_pattern", values)},
            rslora=_flag("use_rslora", values.get("use_rslora", False)),
            base=values.get("base_model_name_or_path")
            if isinstance(values.get("base_model_name_or_path"), str)
            else None,
        )

    def targeted(self, name: str) -> bool:
        """Whether a layer has an adapter, as PEFT decides it."""
        if _is_among(name, self.exclude):
            return False
        if not _is_among(name, self.targets) or isinstance(self.targets, str) or self.layers is None:
            return _is_among(name, self.targets)
        for pattern in self.layers_pattern or (r"[^.]*",):
            if found := _match(rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\..*", name):
                return int(found["number"]) in self.layers
        return False

    def rank_of(self, name: str) -> int:
        """The rank of a layer's adapter."""
        return _of_pattern(self.rank_pattern, name, self.rank)

    def scale_of(self, name: str) -> float:
        """The scale of the product of a layer's factors."""
        rank, alpha = self.rank_of(name), _of_pattern(self.alpha_pattern, name, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _rank(field: str, value: Any, least: int = 1) -> int:
    if type(value) is not int or not least <= value <= MAX_RANK:
        raise ValueError(f"{field} is {value!r}, not a whole number from {least} to {MAX_RANK}"[:400])
    return value


def _alpha(field: str, value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{field} is {value!r}, not a number"[:400])
    return float(value)


def _flag(field: str, value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{field} is {value!r}, not true or false"[:400])
    return value


def _names(field: str, value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str) and len(value) <= MAX_PATTERN:
        return value
    if isinstance(value, list) and all(isinstance(x, str) for x in value):
        return tuple(value)
    raise ValueError(f"{field} is {value!r}, neither a regular expression nor a list of names"[:400])


def _listed(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _pattern(field: str, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    pattern = values.get(field) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{field} is {pattern!r}, not an object"[:400])
    yield from pattern.items()


def _is_among(name: str, wanted: str | tuple[str, ...]) -> bool:
    if wanted == "all-linear":
        return True
    if isinstance(wanted, str):
        return _match(wanted, name) is not None
    return any(name == x or name.endswith(f".{x}") for x in wanted)


def _of_pattern(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((x for key, x in pattern.items() if _match(rf"(.*\.)?({key})", name)), default)


def _match(pattern: str, name: str) -> Any:
    """Matches the whole name. Patterns come from files: one that is invalid or takes too long raises ValueError."""
    try:
        return regex.fullmatch(pattern, name, timeout=SECONDS)
    except TimeoutError:
        raise ValueError(f"the pattern {pattern[:200]!r} takes more than {SECONDS:g} s for {name!r}") from None
    except regex.error as error:
        raise ValueError(f"the pattern {pattern[:200]!r} is no regular expression: {error}") from None


def load_adapter(model: M, path: str | os.PathLike[str]) -> M:
    """Puts an adapter that PEFT or `save_adapter` wrote on a model.

    Args:
        model: the base model. It is not changed.
        path: directory with `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        The model with the adapter, whose factors are float32 and sharded by their logical axes.

    Raises:
        FileNotFoundError: there is no such directory.
        FileError: the adapter is of a kind that is not supported, or its tensors are not those that its configuration names,
            or the model has no layer for them. The message says which and what to do.
        ValueError: the model has an adapter already.
    """
    return _adapted(model, Path(path), _attach)


def shape_adapter(model: M, path: str | os.PathLike[str]) -> M:
    """Does the same as `load_adapter`, but with factors of zero, for a model that is only traced."""
    return _adapted(model, Path(path), _attach_zeros)


def _adapted(model: M, directory: Path, attach: Callable[..., None]) -> M:
    """Puts the adapter of a directory on a model; `attach` gives a linear layer its factors."""
    config = open_adapter(directory)
    model = copied(model)
    layers = dict(linears(model))
    if adapted := [name for name, linear in layers.items() if linear.lora_a is not None]:
        raise ValueError(f"the model has an adapter already, on {few(adapted)}: merge it first (`merge_lora`)")
    try:
        factors = _factors(model, open_safetensors(directory / WEIGHTS), config, directory)
        for name, linear in layers.items():
            if names := {x.layer: x for x in factors if x.path == name}:
                attach(linear, names, factors, config)
    except ValueError as error:  # of a pattern
        raise error if isinstance(error, FileError) else FileError(f"{directory / CONFIG}: {error}") from None
    return model


def open_adapter(directory: Path) -> PEFTConfig:
    """Reads the configuration of an adapter, before any weights.

    Raises:
        FileNotFoundError: the directory is no adapter.
        FileError: the configuration is damaged or asks for what is not supported.
    """
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(f"{directory} is no adapter of PEFT: it has no {CONFIG}{_what_it_is(directory)}")
    config = PEFTConfig.read(directory / CONFIG)
    if not (directory / WEIGHTS).is_file():
        pickled = (directory / PICKLE).is_file()
        remedy = f"; {PICKLE} is a pickle, which is never read: save it with safe_serialization=True" if pickled else ""
        raise FileNotFoundError(f"{directory} has no {WEIGHTS}{remedy}")
    return config


def _what_it_is(directory: Path) -> str:
    """Says what a path holds instead of an adapter, as the end of a message."""
    if not directory.exists():
        return (
            f". There is nothing at {directory.absolute()}, and adapters are not downloaded: give the directory of one"
        )
    inside = [directory / place for place in (FOLDER, f"model/{FOLDER}") if (directory / place / CONFIG).is_file()]
    return "".join(f". It holds one: {path}" for path in inside[:1])


def _layer_names(model: Model) -> dict[str, LayerName]:
    """Returns the names of all linear layers, one for each layer of a stack, by our names."""
    names = {}
    for path, linear in linears(model):
        stacked = linear.weight.axes[0] == "layers"
        for index, number in enumerate(layer_numbers(model, f"{path}.weight", linear.weight)):
            key = path.format(number)
            names[key] = LayerName(model.config.names.in_transformers(key), path, index if stacked else None, key)
    return names


def _factors(
    model: Model, tensors: dict[str, Tensor], config: PEFTConfig, directory: Path
) -> dict[LayerName, dict[str, Tensor]]:
    """Finds the tensors lora_A and lora_B of every layer with an adapter, and checks them against configuration and model."""
    known = _layer_names(model)
    factors: dict[LayerName, dict[str, Tensor]] = {}
    written: dict[LayerName, str] = {}  # the names that the file has for them
    for key, tensor in tensors.items():
        module, _, kind = key.removeprefix(PREFIX).rpartition(".lora_")
        if not key.startswith(PREFIX) or kind not in ("A.weight", "B.weight"):
            _check_base(tensor, model)
            continue
        layer = known.get(_ours(model, module))
        if layer is None:
            made = "" if config.base is None else f": the adapter was made for {config.base[:100]!r}"
            raise tensor.error(f"belongs to {module!r}, which is no linear layer of this model{made}")
        if not config.targeted(module):
            raise tensor.error("is not among the target_modules of the configuration")
        if factors.setdefault(layer, {}).setdefault(kind[0], tensor) is not tensor:
            raise tensor.error("is there twice, in two spellings")
        written[layer] = module
    spelling = _spelling(model, written)
    wanted = [x for x in known.values() if config.targeted(spelling(x)) and config.targets != "all-linear"]
    missing = [
        f"{spelling(x)}.lora_{kind}" for x in {*wanted, *factors} for kind in "AB" if kind not in factors.get(x, {})
    ]
    if missing or not factors:
        raise FileError(f"{directory / WEIGHTS}: {len(missing)} missing tensors: {few(sorted(missing))}")
    shapes = {path: linear.weight.shape[-2:] for path, linear in linears(model)}
    for layer, pair in factors.items():
        (out_dim, in_dim), rank = shapes[layer.path], config.rank_of(written[layer])
        pair["A"].check((rank, in_dim))
        pair["B"].check((out_dim, rank))
    # The layers get the file's names, which the patterns of the configuration match.
    return {layer._replace(name=written[layer]): pair for layer, pair in factors.items()}


def _ours(model: Model, module: str) -> str:
    """Returns our name of a linear layer from that of any release of transformers."""
    return model.config.names.ours(f"{module}.weight").removesuffix(".weight")


def _spelling(model: Model, written: Mapping[LayerName, str]) -> Callable[[LayerName], str]:
    """Returns a function that spells names of layers as the file does, which has the names `written`."""
    names = model.config.names
    alternatives = lambda x: names.all_spellings(x.key)
    votes = Counter(i for x, name in written.items() for i, other in enumerate(alternatives(x)) if other == name)
    chosen = max(votes, key=lambda i: (votes[i], -i), default=0)
    return lambda x: alternatives(x)[chosen]


def _check_base(tensor: Tensor, model: Model) -> None:
    """Checks a tensor that is not a factor: PEFT also saves embedding and head, which must equal the model's."""
    module = tensor.name.removeprefix(PREFIX).replace(".base_layer.", ".")
    own = {key: weight for _, key, weight in named_weights(model)}.get(model.config.names.ours(module))
    if own is None:
        kinds = {
            "lora_magnitude_vector": "DoRA",
            "lora_embedding_": "an adapter of an embedding",
            ".lora_B.bias": "lora_bias",
        }
        kind = next((f", which is of {what}" for part, what in kinds.items() if part in tensor.name), "")
        raise tensor.error(f"is none that this model uses{kind}: {MERGE}")
    tensor.check(own.shape)
    if not np.array_equal(np.asarray(tensor.values(), np.float32), np.asarray(to_host(own[...]), np.float32)):
        raise tensor.error(f"is another than the model's own weight: {MERGE}")


def _attach(
    linear: Linear, names: dict[int | None, LayerName], factors: dict[LayerName, dict[str, Tensor]], config: PEFTConfig
) -> None:
    """Gives a linear layer, stacked or not, the factors of its layers, whose `names` are by index in the stack."""
    *layers, out_dim, in_dim = linear.weight.shape
    *layer_axis, out_axis, in_axis = linear.weight.axes
    rank = max(factors[name]["A"].shape[0] for name in names.values())
    scale = max((config.scale_of(x.name) for x in names.values()), key=abs)
    a, b = np.zeros((*layers, rank, in_dim), np.float32), np.zeros((*layers, out_dim, rank), np.float32)
    for layer, name in names.items():
        pair, index = factors[name], () if layer is None else (layer,)
        rank_of_layer, ratio = pair["A"].shape[0], config.scale_of(name.name) / scale if scale else 1.0
        for tensor in pair.values():
            if not is_finite(np.ascontiguousarray(tensor.values())):
                raise tensor.error("holds NaN or infinity")
        a[index][:rank_of_layer] = pair["A"].values()
        b[index][:, :rank_of_layer] = pair["B"].values()
        if ratio != 1:
            b[index] *= ratio
    linear.lora_a = LoRAWeight(_put(a, (*layer_axis, None, in_axis), linear), axes=(*layer_axis, None, in_axis))
    linear.lora_b = LoRAWeight(_put(b, (*layer_axis, out_axis, None), linear), axes=(*layer_axis, out_axis, None))
    linear.lora_scale = scale


def _attach_zeros(
    linear: Linear, names: dict[int | None, LayerName], factors: dict[LayerName, dict[str, Tensor]], config: PEFTConfig
) -> None:
    """Does the same as `_attach`, with factors of zero."""
    *layers, out_dim, in_dim = linear.weight.shape
    *layer_axis, out_axis, in_axis = linear.weight.axes
    rank = max(factors[name]["A"].shape[0] for name in names.values())
    linear.lora_a = LoRAWeight(jnp.zeros((*layers, rank, in_dim)), axes=(*layer_axis, None, in_axis))
    linear.lora_b = LoRAWeight(jnp.zeros((*layers, out_dim, rank)), axes=(*layer_axis, out_axis, None))
    linear.lora_scale = max((config.scale_of(x.name) for x in names.values()), key=abs)


def _put(values: np.ndarray, axes: tuple, linear: Linear) -> jax.Array:
    """Puts an array on the devices of the layer's weight, sharded by its logical axes."""
    sharding = linear.weight[...].sharding
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        sharding = NamedSharding(sharding.mesh, partition_spec(axes, values.shape, sharding.mesh))
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index], dtype=values.dtype)


def save_adapter(
    model: Model, path: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None, dtype=None
) -> None:
    """Writes the adapter of a model as a directory that PEFT, and `load_adapter`, read.

    Args:
        model: with an adapter (`add_lora`, `load_adapter`).
        path: the directory. An adapter in it is replaced.
        base: name or directory of the model that the adapter belongs to, for `base_model_name_or_path`.
        dtype: of the factors in the file; None: float32.

    Raises:
        ValueError: the model has no adapter.
    """
    directory = Path(path)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, linear in linears(model):
        if linear.lora_a is None or linear.lora_b is None:
            continue
        a, b = (to_host(x[...], dtype or np.float32) for x in (linear.lora_a, linear.lora_b))
        numbers = layer_numbers(model, f"{name}.weight", linear.weight)
        for number, (one, other) in zip(numbers, _pairs(a, b), strict=True):
            module = model.config.names.in_transformers(name.format(number))
            tensors[f"{PREFIX}{module}.lora_A.weight"] = one
            tensors[f"{PREFIX}{module}.lora_B.weight"] = other
            if one.size:
                ranks[module], alphas[module] = len(one), _plain(linear.lora_scale * len(one))
    if not ranks:
        raise ValueError("the model has no adapter to save: put one on it with `add_lora` or `load_adapter`")
    tensors = {name: x for name, x in tensors.items() if x.size}
    rank, alpha = (Counter(x.values()).most_common(1)[0][0] for x in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base is None else os.fspath(base),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": _targets(model, set(ranks)),
        "rank_pattern": {name: x for name, x in ranks.items() if x != rank},
        "alpha_pattern": {name: x for name, x in alphas.items() if x != alpha},
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG).unlink(missing_ok=True)  # until both files are there, there is no adapter
        write_file(directory / WEIGHTS, to_safetensors(tensors))
        write_file(directory / CONFIG, json.dumps(config, indent=2))
    wait_until_written(model, directory)


def _pairs(a: np.ndarray, b: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the factors of a stack or a single layer, one pair for each layer, without the padding of smaller ranks."""
    a, b = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    used = (a != 0).any(axis=2) | (b != 0).any(axis=1)  # [layers, rank]
    if not used.any():
        used[:] = True
    ranks = [int(np.flatnonzero(row)[-1]) + 1 if row.any() else 0 for row in used]
    return [(x[:rank], np.ascontiguousarray(y[:, :rank])) for x, y, rank in zip(a, b, ranks, strict=True)]


def _plain(alpha: float) -> float | int:
    """Returns a number as an integer if it is one up to rounding errors."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _targets(model: Model, adapted: set[str]) -> list[str]:
    """Returns names for `target_modules` that match these layers and no others: q_proj if that is enough, else full names."""
    modules = set()  # those that contain others, too: blocks.0 and mlp.0 have the same end
    for key, layer in _weight_layers(model):
        parts = model.config.names.in_transformers(key.format(layer)).split(".")
        modules |= {".".join(parts[:count]) for count in range(1, len(parts))}
    targets = set()
    for name in adapted:
        end = name.rpartition(".")[2]
        alike = {module for module in modules if module == end or module.endswith(f".{end}")}
        targets.add(end if alike <= adapted else name)
    return sorted(targets)


def _weight_layers(model: Model) -> Iterator[tuple[str, int]]:
    for _, key, weight in named_weights(model):
        if not isinstance(weight, LoRAWeight):
            for number in layer_numbers(model, key, weight):
                yield key, number
