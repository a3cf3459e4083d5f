"""Influence scores of facts by other libraries, on the twin of the small transformer in torch.

A score of a test example and a training example is g H^-1 g', with their gradients and an approximation of the Gauss-Newton
matrix of the mean loss over the training examples. Divided by their number it is the first-order change of the test loss when
the training example is removed.
"""
# pyright: reportMissingImports=false
# torch and the libraries are optional.

import functools
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import TensorDataset

from unlearn_jax.bench.libraries import Twin

Scores = Callable[[], np.ndarray]  # [tests, examples]
SEED = 0  # of the labels that are drawn for the curvature


class LearnedFacts:
    """An adapter, the examples that it has learned, and the test examples."""

    def __init__(
        self,
        base: Mapping[str, Any],
        adapter: Any,
        heads: int,
        learned: Mapping[str, np.ndarray],
        tests: Mapping[str, np.ndarray],
    ):
        self.twin = functools.partial(Twin, base, adapter, heads)
        self.learned, self.tests = (_tensors(rows) for rows in (learned, tests))

    def kronfluence(self) -> dict[str, Scores]:
        """EK-FAC by kronfluence, with its default damping and with a tenth of the mean eigenvalue."""
        return {
            "EK-FAC": functools.partial(self._kronfluence, 1e-8),
            "EK-FAC, damping by its heuristic": functools.partial(self._kronfluence, None),
        }

    def bergson(self) -> dict[str, Scores]:
        """EK-FAC by bergson, with its default damping."""
        return {"EK-FAC": self._bergson}

    def _kronfluence(self, damping: float | None) -> np.ndarray:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task

        class AnswerTask(Task):
            def compute_train_loss(self, batch, model, sample=False):
                return mean_losses(model(batch[0]), batch, sample).sum()

            def compute_measurement(self, batch, model):
                return self.compute_train_loss(batch, model)

            def get_attention_mask(self, batch):
                return batch[3]

        torch.manual_seed(SEED)
        model = prepare_model(self.twin(), AnswerTask())
        with tempfile.TemporaryDirectory() as directory:
            analyzer = Analyzer("facts", model, AnswerTask(), cpu=True, output_dir=directory, disable_tqdm=True)
            size = len(self.learned)
            factors = FactorArguments(strategy="ekfac")
            analyzer.fit_all_factors("ekfac", self.learned, per_device_batch_size=size, factor_args=factors)
            analyzer.compute_pairwise_scores(
                "scores",
                "ekfac",
                self.tests,
                self.learned,
                per_device_query_batch_size=len(self.tests),
                per_device_train_batch_size=size,
                score_args=ScoreArguments(damping_factor=damping),
            )
            return analyzer.load_pairwise_scores("scores")["all_modules"].numpy()

    def _bergson(self) -> np.ndarray:
        from bergson.config import InversionConfig
        from bergson.hessians.eigenvectors import LambdaCollector, compute_eigendecomposition
        from bergson.hessians.kfac import CovarianceCollector
        from bergson.hessians.preconditioner import FactoredPreconditioner

        torch.manual_seed(SEED)
        model, batch = self.twin(), self.learned.tensors

        def collect(collector) -> None:
            with collector.with_batch(batch[3].bool()):
                mean_losses(model(batch[0]), batch, sample=True).sum().backward()
            collector.teardown()

        with tempfile.TemporaryDirectory() as directory:
            collect(CovarianceCollector(model=model, path=directory, dtype=torch.float32))
            for factor in ("activation", "gradient"):
                compute_eigendecomposition(f"{directory}/{factor}_sharded", total_processed=len(self.learned))
            collect(LambdaCollector(model=model, path=directory))
            curvature = FactoredPreconditioner.from_path(directory, inversion_cfg=InversionConfig(), ev_correction=True)
        one, other = (gradients(model, rows.tensors) for rows in (self.tests, self.learned))
        solved = curvature.apply(one)
        return sum(solved[name] @ other[name].T for name in other).numpy()  # pyright: ignore[reportAttributeAccessIssue]


def gradients(model: Twin, batch: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """The gradient of each example's mean loss in the weights of each module, {module: [n, numbers]}."""
    losses = mean_losses(model(batch[0]), batch)
    rows = [torch.autograd.grad(loss, model.adapter(), retain_graph=True) for loss in losses]
    names = [name.removesuffix(".weight") for name, _ in model.named_parameters()]
    return {name: torch.stack([row[i].flatten() for row in rows]) for i, name in enumerate(names)}


def mean_losses(logits: torch.Tensor, batch: tuple[torch.Tensor, ...], sample: bool = False) -> torch.Tensor:
    """The mean loss of each example, [n].

    With `sample` labels are drawn from the model, and the sum over an example's tokens is divided by the root of their number
    only: the second moments of the gradients are then the Gauss-Newton matrix of the mean.
    """
    _, labels, mask, _ = batch
    if sample:
        with torch.no_grad():
            labels = torch.multinomial(logits.flatten(0, 1).softmax(-1), 1).view_as(labels)
    losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(mask)
    count = mask.sum(-1)
    return (losses * mask).sum(-1) / (count.sqrt() if sample else count)


def _tensors(rows: Mapping[str, np.ndarray]) -> TensorDataset:
    """Tokens, labels, the mask of the loss, and that of the tokens up to the last one with a loss."""
    tokens, labels = (torch.tensor(rows[name], dtype=torch.int64) for name in ("tokens", "labels"))
    mask = torch.tensor(rows["loss_mask"], dtype=torch.float32)
    return TensorDataset(tokens, labels, mask, (mask.flip(-1).cumsum(-1).flip(-1) > 0).long())
