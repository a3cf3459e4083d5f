"""How an edit is computed, as a value and as the mapping that configuration files write. Defaults are the preset "best"."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from unlearn_jax.curvature import Curvature
from unlearn_jax.objective import Reduction
from unlearn_jax.solvers import PRECONDITIONERS, SOLVERS, Preconditioner, Solver, adam_qp, cg, sgd_qp

QUARTER = 0.25  # of the training's epochs may be spent on an edit
SHORT = 7.0  # epochs: a quarter of less than 28 epochs of training pays for too few products
TWICE = 2.0  # times the training's epochs: the most that an edit of a short training may cost


@dataclasses.dataclass(frozen=True)
class ErasureConfig:
    """What was trained, what an edit may cost, what is solved and how. Hashable: part of a compiled program's identity.

    With R the objective before the edit and R' after it, see `newton`; b is the right side.
    """

    # ---- the objective that the adapter was trained on, see `objective`
    reduction: Reduction = "per_example"  # what is averaged: examples, or all of their elements
    # Coefficient of |params|^2 / 2 in the training's objective. After AdamW it is 0, or the decay times the root mean square of a
    # coordinate's gradient: AdamW adds the decay to steps that are divided by this root, so that where the two balance,
    # weight_decay = decay * root (.01 * 1e-3, for example).
    weight_decay: float = 0.0
    # The number of epochs of the training; the cost of an edit is limited by it and compared with it. None: unknown.
    training_epochs: float | None = None

    # ---- what an edit may cost
    # The most that everything together may cost, in epochs of example-gradients. "auto": a quarter of the training's epochs; of a
    # training of less than 28 up to 7, but at most twice the training's; 7 where `training_epochs` is not given; no limit where
    # `newton_steps` is set. "unlimited": until the minimum. Budgets below 5 may be exceeded by forward passes, a third of an
    # epoch each, until a step changes the objective by a quarter of the prediction.
    epochs: float | Literal["auto", "unlimited"] = "auto"
    finish_evaluations: int = 1000  # the most evaluations of the objective and its gradient by L-BFGS
    retries: int = 6  # the most retries of a step, each with ten times the damping
    halvings: int = 10  # the most halvings of a step in the line search

    # ---- what is solved
    # "newton": (R'' of the edited data) step = grad R - grad R', the exact first Newton step. "influence": both sides to first
    # order in the share of edited examples (R'' of the original). "paper": as "influence", without the regulariser's part:
    # LLMEraser's equations.
    formula: Literal["newton", "influence", "paper"] = "newton"
    # The treatment of the gradient that training left because it was stopped early. "drop": respond to the edit alone, so that an
    # empty edit changes nothing; the aim is a retrain by the same recipe, which stops as early. "keep": continue the training,
    # too; the aim is a retrain that runs to the minimum, and the loss on kept examples falls far below that of an early-stopped
    # retrain.
    residual: Literal["drop", "keep"] = "drop"
    curvature: Curvature | None = None  # None: "ggn" for a `Loss`, "hessian" for a plain callable
    # The number of unedited examples, drawn at random, on which the curvature is computed; None: all. The right side and the
    # evaluation of a step always use all examples. A sample is for data on which a few products cost too much. Where a sample
    # has fewer elements than there are parameters, steps get too long and are shortened by more damping.
    curvature_examples: int | None = None
    # The most steps. With residual "drop" no step follows one that decreases the edited objective by less than the square of the
    # solver's rtol, as a share of the decrease of all steps. None: one step, after which L-BFGS spends the rest of `epochs`,
    # until the gradient is that square times the edit's right side, or as small as training had left it; no L-BFGS where training
    # had left more than three times the right side.
    newton_steps: int | None = None
    # Evaluate each step by the edited objective on all examples: one whose decrease is below a quarter of the prediction by its
    # quadratic model is solved again with more damping (where the damping is a number, halved until the objective falls). If
    # False, steps are taken without evaluation.
    line_search: bool = True

    # ---- how (curvature + weight_decay + damping) step = b is solved
    # A value, or in a file a mapping of its name and fields. Solvers on per-example gradients keep these in memory.
    solver: Solver = cg()
    # A number; "spectrum": `damping_fraction` times the largest eigenvalue, more where the curvature is negative, adapted after
    # each step; "held_out": the best value of a grid around that on examples that the curvature does not use, or no step, and no
    # L-BFGS after it.
    damping: float | Literal["spectrum", "held_out"] = "spectrum"
    damping_fraction: float = 1e-4  # of the largest eigenvalue
    linearize: bool = False  # keep what products share: faster, but needs memory for the activations of all examples
    micro_batch: int = 32  # examples per computation
    # Keep the examples in the memory of the host and copy each micro-batch when it is used, so that the memory on a device does
    # not grow with the number of examples. Slower where copies are slow.
    offload: bool = False
    seed: int = 0  # of the sample of examples, of drawn labels and of stochastic solvers

    def __post_init__(self):
        for name in ("newton_steps", "finish_evaluations", "micro_batch", "curvature_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, not {value}")
        for name in ("weight_decay", "damping_fraction"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative: {getattr(self, name)}")
        if not isinstance(self.damping, str) and not 0 <= self.damping < math.inf:
            raise ValueError(f"damping must be finite and not negative: {self.damping}")
        for name in ("retries", "halvings"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative: {getattr(self, name)}")
        for name in ("epochs", "training_epochs"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, not {value}")
        if self.formula != "newton" and self.newton_steps != 1:
            raise ValueError(f"formula {self.formula!r} is one step from the trained adapter: newton_steps=1")
        solver = self.solver
        if not isinstance(solver, Solver):
            raise ValueError(f"solver is a value, as unlearn_jax.cg(rtol=.1), not {solver!r}")
        if (most := getattr(solver, "max_steps", 1)) < 1:
            raise ValueError(f"max_steps of solver {solver.name!r} must be positive, not {most}")
        if solver.takes == "gradients" and self.curvature not in ("fisher", "empirical_fisher"):
            raise ValueError(
                f"solver {solver.name!r} works on per-example gradients: curvature must be 'fisher' or "
                f"'empirical_fisher', not {self.curvature!r}"
            )
        if solver.divides and self.damping == 0 and self.weight_decay == 0:
            raise ValueError(f"solver {solver.name!r} divides by the damping, which is zero")
        if self.linearize and self.offload:
            raise ValueError(
                "linearize keeps the activations of all examples on the device: offload is of no use with it"
            )
        if self.linearize and solver.takes != "products":
            raise ValueError(f"solver {solver.name!r} takes no product twice: linearize is of no use to it")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str = "config") -> "ErasureConfig":
        """A mapping of fields, as configuration files write it, as an `ErasureConfig`.

            {"weight_decay": .01, "solver": {"name": "cg", "rtol": .01, "preconditioner": {"name": "nystrom", "rank": 50}}}

        A solver without a name is the preset's with some fields changed, as in {"solver": {"rtol": .01}}. Values
        (`unlearn_jax.cg(rtol=.01)`) may be in a mapping, too.

        Args:
            values: a dictionary, or an `ml_collections.ConfigDict`.
            where: the dotted path of `values`, for messages.

        Returns:
            The configuration; fields that are left out are those of the preset.

        Raises:
            ValueError: an unknown key, or a value of another type, with its dotted path.
        """
        if not hasattr(values, "items"):
            raise ValueError(f"{where} must be a mapping with the keys of ErasureConfig, not {values!r}")
        fields = dict(values.items())
        name = fields.pop("preset", "best")
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is not one of {', '.join(map(repr, PRESETS))}")
        return _replaced(cls(**PRESETS[name]), fields, where)

    @property
    def budget(self) -> float:
        """Epochs that an edit may cost."""
        if self.epochs == "unlimited" or (self.epochs == "auto" and self.newton_steps is not None):
            return math.inf
        if self.epochs != "auto":
            return self.epochs
        trained = self.training_epochs
        return SHORT if trained is None else max(QUARTER * trained, min(TWICE * trained, SHORT))


_PAPER = {
    "formula": "paper",
    "curvature": "hessian",
    "curvature_examples": None,
    "newton_steps": 1,
    "line_search": False,
    "damping": 0.0,
}
PRESETS: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        "best": {},
        # The equations of arXiv:2412.00383; it gives no learning rate, number of steps or batch size.
        "paper": {**_PAPER, "solver": sgd_qp(max_steps=200)},
        # The released script: Adam, 20 steps of one example, a constant start, half the Hessian, an L2 term of 1e-5 on the
        # step. Its dropout, random prompts and early stopping on the test set are not reproduced.
        "repo": {
            **_PAPER,
            "solver": adam_qp(max_steps=20, learning_rate=1e-5, init=1e-5, half_hessian=True),
            "micro_batch": 1,
            "damping": 1e-5,
        },
    }
)


def preset(name: str, **overrides: Any) -> ErasureConfig:
    """A preset with some fields changed.

    Raises:
        ValueError: there is no preset of that name, or no such field, or a value of another type.
    """
    return ErasureConfig.from_mapping({"preset": name, **overrides})


def resolve(config: ErasureConfig | Mapping[str, Any] | None, solver: Solver | None = None) -> ErasureConfig:
    """Returns one `ErasureConfig` for the arguments `config` and `solver` of `erase`.

    Raises:
        ValueError: a mapping that is malformed, or that names a solver as well.
    """
    if solver is not None and isinstance(config, Mapping) and "solver" in config:
        raise ValueError(
            f"the config names the solver {config['solver']!r}, and solver= is {solver!r}: give one of them"
        )
    if not isinstance(config, ErasureConfig):
        config = ErasureConfig.from_mapping(config if config is not None else {})
    return config if solver is None else dataclasses.replace(config, solver=solver)


def to_mapping(config: Any) -> dict[str, Any]:
    """An `ErasureConfig` (or a solver) as the mapping that `ErasureConfig.from_mapping` reads."""
    named = {"name": config.name} if isinstance(config, Solver | Preconditioner) else {}
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return named | {name: to_mapping(x) if dataclasses.is_dataclass(x) else x for name, x in fields.items()}


def _replaced(value: Any, changes: Mapping[str, Any], where: str) -> Any:
    """A copy of a dataclass with some fields changed, each converted to its declared type."""
    hints = typing.get_type_hints(type(value))
    fields = [field.name for field in dataclasses.fields(value)]
    converted = {}
    for key, x in changes.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            known = f"the nearest known one is {where}.{near[0]}" if near else f"{where} has {', '.join(fields)}"
            raise ValueError(f"unknown key {where}.{key}; {known}")
        converted[key] = _converted(hints[key], x, f"{where}.{key}", getattr(value, key))
    return dataclasses.replace(value, **converted)


def _converted(hint: Any, value: Any, where: str, default: Any) -> Any:
    """`value` as the field at `where`: a solver or a preconditioner from its mapping, an int where a float is declared."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    sections = tuple(x for x in options if isinstance(x, type) and dataclasses.is_dataclass(x))
    if sections and hasattr(value, "items"):
        return _named(SOLVERS if hint is Solver else PRECONDITIONERS, dict(value.items()), where, default)
    if isinstance(value, sections):
        return value
    for option in options:
        if typing.get_origin(option) is Literal:
            if any(value == choice and type(value) is type(choice) for choice in typing.get_args(option)):
                return value
        elif (
            option is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        ):
            return float(value)
        elif option in (int, bool, types.NoneType) and type(value) is option:
            return value
    raise ValueError(f"{where} must be {getattr(hint, '__name__', hint)}, not {value!r} ({type(value).__name__})")


def _named(kinds: Mapping[str, type], fields: dict[str, Any], where: str, default: Any) -> Any:
    """The solver or preconditioner of a mapping: of the kind that it names, or of that of `default`."""
    name = fields.pop("name", getattr(default, "name", None))
    if name not in kinds:
        raise ValueError(f"{where}.name must be one of {', '.join(map(repr, kinds))}, not {name!r}")
    if isinstance(default, kinds[name]):
        return _replaced(default, fields, where)
    needed = [x.name for x in dataclasses.fields(kinds[name]) if x.default is dataclasses.MISSING]
    if missing := [x for x in needed if x not in fields]:
        raise ValueError(f"{where} lacks {', '.join(missing)}, which {name!r} needs")
    hints = typing.get_type_hints(kinds[name])
    values = {x: _converted(hints[x], fields.pop(x), f"{where}.{x}", None) for x in needed}
    return _replaced(kinds[name](**values), fields, where)
