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
SHORT = 7.0  # epochs: of less than 28 epochs of training a quarter would be too few products to tell
TWICE = 2.0  # the training's epochs is the most that an edit of a short one may cost


@dataclasses.dataclass(frozen=True)
class ErasureConfig:
    """What was trained, what an edit may cost, what is solved and how. Hashable: part of a compiled program's identity.

    With R the objective before the edit and R' after it, see `newton`; b is the right side.
    """

    # ---- the objective that the adapter was trained on, see `objective`
    reduction: Reduction = "per_example"  # what is averaged: examples, or all of their elements
    # Coefficient of |params|^2 / 2 in the training's objective. An AdamW user gives 0, or the decay times the root mean square
    # of a coordinate's gradient: its decay acts beside steps that are divided by that root, so where they balance,
    # weight_decay = decay * root (.01 * 1e-3, say).
    weight_decay: float = 0.0
    training_epochs: float | None = None  # that the training took: what an edit may cost, and is held against

    # ---- what an edit may cost
    # Of example-gradients, that everything together may cost. "auto": a quarter of the training's epochs, of one of less than
    # 28 up to 7 but at most twice the training's; 7 where `training_epochs` is not given; no limit where `newton_steps` says
    # what is to be done. "unlimited": on to the minimum. Budgets below 5 may be exceeded by passes forward, a third of an
    # epoch each, until a step keeps a quarter of what it promises.
    epochs: float | Literal["auto", "unlimited"] = "auto"
    finish_evaluations: int = 1000  # of L-BFGS, of the objective and its gradient
    retries: int = 6  # of a step with ten times the damping
    halvings: int = 10  # of a step in the line search

    # ---- what is solved
    # "newton": (R'' of the edited data) step = grad R - grad R', the exact first Newton step. "influence": both sides to first
    # order in the share of edited examples (R'' of the original). "paper": as "influence", without the regulariser's part:
    # LLMEraser's equations.
    formula: Literal["newton", "influence", "paper"] = "newton"
    # Of training that had not converged, the normal case of an adapter whose training was stopped early. "drop": leave undone
    # what was left undone and respond to the edit alone, so that an empty edit changes nothing: the aim is a retrain by the
    # same recipe, which stops as early. "keep": also go on training, for retrains that run to the minimum: the loss on what is
    # kept falls far below that of a retrain which stops early.
    residual: Literal["drop", "keep"] = "drop"
    curvature: Curvature | None = None  # None: "ggn" for a `Loss`, "hessian" for a plain callable
    # Of how many of the examples that the edits do not touch, drawn at random, the curvature is taken; None: all. The right side
    # and what judges a step are always of all examples. A sample is for data of which a few products cost too much: with more
    # parameters than its elements tell apart it throws steps too far, which more damping then mends.
    curvature_examples: int | None = None
    # How often to solve again at the new parameters, at most: with residual "drop" no step follows one which lets the edited
    # objective fall by less than the square of the solver's rtol, as a share of what all have. None: once, and L-BFGS goes on
    # from there with what is left of `epochs`, until the gradient is that square of the edit's right side, or as small as
    # training had left it; not where that was more than three times the right side.
    newton_steps: int | None = None
    # Judge a step by the edited objective on all examples: one that keeps less than a quarter of what its quadratic model
    # promises is solved again with more damping (where the damping is a number, halved until it falls). Without, the step is
    # taken whatever becomes of the objective.
    line_search: bool = True

    # ---- how (curvature + weight_decay + damping) step = b is solved
    # A value, or in a file a mapping with its name and fields. Those on per-example gradients hold them in memory.
    solver: Solver = cg()
    # A number; "spectrum": `damping_fraction` of the largest eigenvalue, and more where the curvature is negative, then less or
    # more as the steps go; "held_out": the best of a grid around that on examples that the curvature was not taken of, or no
    # step, and no L-BFGS after it.
    damping: float | Literal["spectrum", "held_out"] = "spectrum"
    damping_fraction: float = 1e-4  # of the largest eigenvalue
    linearize: bool = False  # keep what products have in common: faster, in the memory of all activations at once
    micro_batch: int = 32  # examples that are computed at a time
    # Keep the examples in the memory of the host and copy a micro-batch when it is used: what a device holds does not grow
    # with the number of examples. Slower where copies are.
    offload: bool = False
    seed: int = 0  # of the sample, of drawn labels and of the stochastic solvers

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
        (`unlearn_jax.cg(rtol=.01)`) stand in a mapping, too.

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
    """What `erase` is given as its configuration, and as its solver, as one `ErasureConfig`.

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
    """A dataclass with some fields changed, each of the declared type."""
    hints = typing.get_type_hints(type(value))
    fields = [field.name for field in dataclasses.fields(value)]
    found = {}
    for key, x in changes.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            known = f"the nearest known one is {where}.{near[0]}" if near else f"{where} has {', '.join(fields)}"
            raise ValueError(f"unknown key {where}.{key}; {known}")
        found[key] = _converted(hints[key], x, f"{where}.{key}", getattr(value, key))
    return dataclasses.replace(value, **found)


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
    """The solver or preconditioner of a mapping: its name says which, `default` where it says nothing."""
    name = fields.pop("name", getattr(default, "name", None))
    if name not in kinds:
        raise ValueError(f"{where}.name must be one of {', '.join(map(repr, kinds))}, not {name!r}")
    if isinstance(default, kinds[name]):
        return _replaced(default, fields, where)
    needed = [x.name for x in dataclasses.fields(kinds[name]) if x.default is dataclasses.MISSING]
    if missing := [x for x in needed if x not in fields]:
        raise ValueError(f"{where} lacks {', '.join(missing)}, which {name!r} needs")
    hints = typing.get_type_hints(kinds[name])
    given = {x: _converted(hints[x], fields.pop(x), f"{where}.{x}", None) for x in needed}
    return _replaced(kinds[name](**given), fields, where)
