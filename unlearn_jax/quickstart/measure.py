"""Measures of adapters on the traces: losses, distances, memorisation."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jax.tree_util import Partial

from pixel_jax.data.traces import Trace
from unlearn_jax.arrays import Example, Params
from unlearn_jax.baselines.pbrf import divergence
from unlearn_jax.metrics.answers import exact_memorization, extraction_strength
from unlearn_jax.metrics.distance import delta_w_cosine, delta_w_distance
from unlearn_jax.metrics.membership import auc, min_k, privleak
from unlearn_jax.metrics.tokens import TokenStatistics, score, without_last
from unlearn_jax.quickstart.adapter_run import AdapterRun, to_host
from unlearn_jax.quickstart.traces import draw_traces, to_examples
from unlearn_jax.requests.measure import Losses
from unlearn_jax.requests.state import Change


@dataclasses.dataclass(frozen=True, eq=False)
class Measure:
    """Losses and distances of adapters on the traces, in their old and new forms: one compiled program for all of them."""

    run: AdapterRun
    change: Change
    per_token: Losses

    @classmethod
    def of(cls, run: AdapterRun, change: Change) -> "Measure":
        """Makes the measures on the traces of a change."""
        options = {"micro_batch": run.config.erasure.micro_batch, "mesh": run.mesh}
        return cls(run, change, Losses(run.loss, run.fresh, change, **options))

    def losses(self, adapter: Params) -> dict[str, float]:
        """Mean loss per learned token of each group of examples."""
        per_example = self.per_token(adapter)
        return {name: float(per_example[index].mean()) for name, index in self.change.groups().items()}

    def from_reference(self, adapter: Params, reference: Params) -> dict[str, float]:
        """KL(adapter || reference) per token, and the distance of their weights."""
        kl = dataclasses.replace(self.per_token.objective, loss=Partial(divergence, self.run.loss, adapter))
        per_token = np.asarray(kl.per_example(reference)) / self.per_token.tokens
        sets = {"forget": self.change.forgotten, "new": self.change.new, "retain": self.change.kept}
        kls = {f"kl_{name}": float(per_token[index].mean()) for name, index in sets.items() if len(index)}
        return {**kls, "distance": delta_w_distance(to_host(adapter), to_host(reference))}

    def cosine(self, adapter: Params, reference: Params, origin: Params) -> float:
        """The cosine between the changes of the two adapters from `origin`, in the weights that they change."""
        return delta_w_cosine(*map(to_host, (adapter, reference, origin)))


@dataclasses.dataclass(frozen=True, eq=False)
class Memory:
    """Measures memorisation of the forgotten traces, compared with unseen traces of the same kinds."""

    run: AdapterRun
    examples: Example  # the forgotten traces as they were, then the unseen ones
    forgotten: int  # the number of forgotten ones, which come first

    @classmethod
    def of(cls, run: AdapterRun, traces: Mapping[str, Trace], forgotten: Sequence[str]) -> "Memory":
        """Draws the unseen traces like the learned ones, with another seed."""
        kinds = {name.split("-")[0] for name in forgotten}
        unseen = {
            f"unseen {name}": trace
            for name, trace in draw_traces(run.config.traces, run.config.seed + 1).items()
            if name.split("-")[0] in kinds
        }
        both = to_examples({**{name: traces[name] for name in forgotten}, **unseen}, run.vocabulary, run.limits)
        return cls(run, {name: x for name, x in both.items() if name != "id"}, len(forgotten))

    def of_adapter(self, adapter: Params, reference: float) -> dict[str, float]:
        """Computes the shares of the forgotten traces that the adapter reproduces, and their membership.

        Args:
            adapter: the adapter to measure.
            reference: `auc` of the retrained adapter.

        Returns:
            memorized: mean of `exact_memorization`; extraction: mean of `extraction_strength`; auc, privleak: see
            `metrics.membership`.
        """
        statistics = self._statistics(adapter)
        mask, correct = without_last(statistics.mask)[: self.forgotten], statistics.correct[: self.forgotten]
        area = self._auc(statistics)
        return {
            "memorized": float(np.nanmean(exact_memorization(correct, mask))),
            "extraction": float(extraction_strength(correct, mask).mean()),
            "auc": area,
            "privleak": privleak(area, reference),
        }

    def auc(self, adapter: Params) -> float:
        """The AUC of telling the forgotten traces from the unseen ones by min-40 % scores."""
        return self._auc(self._statistics(adapter))

    def _auc(self, statistics: TokenStatistics) -> float:
        lowest = min_k(statistics.logprob, without_last(statistics.mask))
        return auc(lowest[: self.forgotten], lowest[self.forgotten :])

    def _statistics(self, adapter: Params) -> TokenStatistics:
        run = self.run
        return score(run.loss, adapter, self.examples, micro_batch=run.config.erasure.micro_batch, mesh=run.mesh)
