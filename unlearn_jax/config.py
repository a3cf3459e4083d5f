"""How an edit is computed. Defaults are the preset "best"."""

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, Literal

from pixel_jax.config import load
from unlearn_jax.curvature import Curvature
from unlearn_jax.objective import Reduction

Solver = Literal["cg", "minres", "lanczos", "lissa", "sgd_qp", "adam_qp", "dual", "ekfac", "datainf", "identity"]
STOCHASTIC = ("lissa", "sgd_qp", "adam_qp")  # a micro-batch a step
QUARTER = 0.25  # of the training's epochs may be spent on an edit
SHORT = 7.0  # epochs: of less than 28 epochs of training a quarter would be too few products to tell
TWICE = 2.0  # the training's epochs is the most that an edit of a short one may cost
ROWS = ("dual", "ekfac", "datainf")  # these work on per-example gradients, which they hold in memory


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
    max_steps: int = 30  # of the solver
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
    # objective fall by less than rtol^2 of what all have. None: once, and L-BFGS goes on from there with what is left of
    # `epochs`, until the gradient is rtol^2 of the edit's right side, or as small as training had left it; not where that was
    # more than three times the right side.
    newton_steps: int | None = None
    # Judge a step by the edited objective on all examples: one that keeps less than a quarter of what its quadratic model
    # promises is solved again with more damping (where the damping is a number, halved until it falls). Without, the step is
    # taken whatever becomes of the objective.
    line_search: bool = True

    # ---- how (curvature + weight_decay + damping) step = b is solved
    solver: Solver = "cg"  # those on per-example gradients ("dual", "ekfac", "datainf") hold them in memory
    rtol: float = 0.1  # of the residual, relative to b
    preconditioner: Literal["diagonal", "nystrom", "ekfac"] | None = None  # of "cg"
    # A number; "spectrum": `damping_fraction` of the largest eigenvalue, and more where the curvature is negative, then less or
    # more as the steps go; "held_out": the best of a grid around that on examples that the curvature was not taken of, or no
    # step, and no L-BFGS after it.
    damping: float | Literal["spectrum", "held_out"] = "spectrum"
    damping_fraction: float = 1e-4  # of the largest eigenvalue
    # Of "sgd_qp" and "adam_qp", and the inverse of the scale of "lissa"; None: half of the inverse of the largest eigenvalue.
    learning_rate: float | None = None
    rank: int | None = None  # of "lanczos" (None: all of its steps) and of the preconditioner "nystrom"
    init: float = (
        0.0  # every coordinate's start: a fault of the released code, for study, see `solvers.quadratic_program`
    )
    half_hessian: bool = False  # another of its faults: half of the curvature
    linearize: bool = False  # keep what products have in common: faster, in the memory of all activations at once
    micro_batch: int = 32  # examples that are computed at a time
    seed: int = 0  # of the sample, of drawn labels and of the stochastic solvers

    def __post_init__(self):
        for name in ("newton_steps", "max_steps", "finish_evaluations", "micro_batch", "curvature_examples", "rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, not {value}")
        for name in ("weight_decay", "rtol", "damping_fraction"):
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
        if self.solver in ROWS and self.curvature not in ("fisher", "empirical_fisher"):
            raise ValueError(
                f"solver {self.solver!r} works on per-example gradients: curvature must be 'fisher' or "
                f"'empirical_fisher', not {self.curvature!r}"
            )
        if self.damping == 0 and self.weight_decay == 0 and self.solver in (*ROWS, "lanczos"):
            raise ValueError(f"solver {self.solver!r} divides by the damping, which is zero")
        if self.preconditioner and self.solver != "cg":
            raise ValueError(f"only solver 'cg' takes a preconditioner, not {self.solver!r}")
        if self.preconditioner == "nystrom" and self.rank is None:
            raise ValueError("preconditioner 'nystrom' needs a rank")
        if (self.init or self.half_hessian) and self.solver not in ("sgd_qp", "adam_qp"):
            raise ValueError(f"init and half_hessian are of 'sgd_qp' and 'adam_qp', not of {self.solver!r}")
        if self.linearize and self.solver in (*STOCHASTIC, *ROWS):
            raise ValueError(f"solver {self.solver!r} takes no product twice: linearize is of no use to it")

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
        "paper": {**_PAPER, "solver": "sgd_qp", "max_steps": 200},
        # The released script: Adam, 20 steps of one example, a constant start, half the Hessian, an L2 term of 1e-5 on the
        # step. Its dropout, random prompts and early stopping on the test set are not reproduced.
        "repo": {
            **_PAPER,
            "solver": "adam_qp",
            "max_steps": 20,
            "micro_batch": 1,
            "learning_rate": 1e-5,
            "init": 1e-5,
            "damping": 1e-5,
            "half_hessian": True,
        },
    }
)


def preset(name: str, **overrides: Any) -> ErasureConfig:
    """A preset with some fields changed."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is not one of {', '.join(map(repr, PRESETS))}")
    return load(ErasureConfig, {**PRESETS[name], **overrides})


def resolve(config: ErasureConfig | Mapping[str, Any] | None) -> ErasureConfig:
    """None, a mapping of fields (with an optional "preset") or an `ErasureConfig`, as the last of these."""
    if isinstance(config, ErasureConfig):
        return config
    fields = dict(config.items()) if config is not None else {}
    return preset(fields.pop("preset", "best"), **fields)
