"""What an adapter says about the traces, in their old and new forms: one compiled program for all adapters."""

import dataclasses

import numpy as np
from jax.tree_util import Partial

from unlearn_jax.baselines.divergence import divergence
from unlearn_jax.dataset import Dataset
from unlearn_jax.loss import Params
from unlearn_jax.metrics.distance import delta_w_cosine, delta_w_distance
from unlearn_jax.objective import Objective, element_counts, on_device
from unlearn_jax.quickstart.job import Job, to_host
from unlearn_jax.quickstart.traces import Edited


@dataclasses.dataclass(frozen=True, eq=False)
class Measure:
    job: Job
    edited: Edited
    objective: Objective
    tokens: np.ndarray  # [n], learned tokens of each example

    @classmethod
    def of(cls, job: Job, edited: Edited) -> "Measure":
        examples = edited.everything()
        tokens = element_counts(job.loss, job.fresh, Dataset.of(examples))
        options = {"micro_batch": job.config.erasure.micro_batch, "mesh": job.mesh}
        objective = on_device(Objective.of(job.loss, examples, np.ones(len(tokens)), **options))
        return cls(job, edited, objective, tokens)

    def losses(self, adapter: Params) -> dict[str, float]:
        """Mean loss per learned token of each group of examples."""
        return self._means(np.asarray(self.objective.per_example(adapter)))

    def from_reference(self, adapter: Params, reference: Params) -> dict[str, float]:
        """How far `adapter` is from `reference`: KL(adapter || reference) per token, and the distance of their weights."""
        kl = dataclasses.replace(self.objective, loss=Partial(divergence, self.job.loss, adapter))
        per_token = np.asarray(kl.per_example(reference)) / self.tokens
        forget, new = self.edited.forgotten(), np.arange(len(self.edited.dataset), len(self.tokens))
        kept = np.setdiff1d(np.arange(len(self.edited.dataset)), forget)
        sets = {"forget": forget, "new": new, "retain": kept}
        found = {f"kl_{name}": float(per_token[index].mean()) for name, index in sets.items() if len(index)}
        return {**found, "distance": delta_w_distance(to_host(adapter), to_host(reference))}

    def cosine(self, adapter: Params, reference: Params, origin: Params) -> float:
        return delta_w_cosine(*map(to_host, (adapter, reference, origin)))

    def _means(self, sums: np.ndarray) -> dict[str, float]:
        return {name: float((sums / self.tokens)[index].mean()) for name, index in self.edited.groups().items()}
