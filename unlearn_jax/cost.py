"""The cost of an edit, in example-gradients: an example forward and backward is one."""

import math

from unlearn_jax.config import ErasureConfig
from unlearn_jax.objective import FORWARD, Objective
from unlearn_jax.problem import QUARTER, Problem
from unlearn_jax.solve import product_kind
from unlearn_jax.solvers import cg, minres, nystrom


class Cost:
    """Counts example-gradients: one is an example forward and backward. Products count as measured."""

    PRODUCT = {"hessian": 2.1, "ggn": 1.6, "empirical_fisher": 1.0}

    def __init__(self, problem: Problem, config: ErasureConfig):
        self.config, self.spent, self.epoch = config, 0.0, problem.examples
        self.limit = config.budget * problem.examples

    @property
    def left(self) -> float:
        """Example-gradients that may still be spent."""
        return self.limit - self.spent

    @property
    def limited(self) -> bool:
        """Whether there is a budget."""
        return self.limit < math.inf

    def gradients(self, objective: Objective | None, times: int = 1) -> None:
        """Counts `times` forward and backward passes over an objective."""
        self.spent += times * (objective.count if objective is not None else 0)

    def forwards(self, objective: Objective, times: int) -> None:
        """Counts `times` forward passes."""
        self.spent += times * objective.count * FORWARD

    def constants(self, *objectives: Objective | None) -> None:
        """Counts the constant part of the loss, which is computed once for every example: at most a forward pass."""
        for objective in objectives:
            if objective is not None and objective.has_constants:
                self.forwards(objective, 1)

    def preconditioner(self, objective: Objective, config: ErasureConfig) -> None:
        """Counts the cost of building the solver's preconditioner."""
        preconditioner = getattr(config.solver, "preconditioner", None)
        if isinstance(preconditioner, nystrom):
            self.spent += objective.count * preconditioner.rank * self.PRODUCT[product_kind(config)]
        elif preconditioner is not None:
            drawn = FORWARD if config.curvature != "empirical_fisher" else 0  # the labels
            self.spent += objective.count * (1 + drawn)

    def products(self, objective: Objective, times: int, config: ErasureConfig) -> None:
        """Counts `times` curvature products."""
        self.spent += times * objective.count * self.PRODUCT[product_kind(config)]

    def affordable(self, objective: Objective, config: ErasureConfig, share: float) -> int:
        """The products that a share of the remaining budget pays for, beside the evaluations of all retries; at least one."""
        assert isinstance(config.solver, cg | minres)
        if not self.limited:
            return config.solver.max_steps
        retries = (1 + config.retries) * FORWARD * self.epoch
        paid = share * (self.left - retries) / (objective.count * self.PRODUCT[product_kind(config)])
        return max(1, min(config.solver.max_steps, int(paid)))


def least(config: ErasureConfig) -> float:
    """The least that an edit costs, in epochs: the right side, a product with a quarter of the examples, and its evaluation."""
    products = min(Cost.PRODUCT.values()) / QUARTER if config.solver.takes == "products" else 0.0
    return 1 + products + FORWARD * config.line_search
