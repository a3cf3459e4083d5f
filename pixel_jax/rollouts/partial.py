"""Rollouts that end early: rows that are not done carry over to a later call, without their caches.

    records = no_records(prompts, config)
    while ...:
        trajectories, records = partial_rollout(model, prompts, records, key, config, budget)

`model` may be another one in each call. Rows that were begun read again what they wrote and were shown, with its weights, and go
on; what they wrote keeps its log-probabilities. A row's tokens follow from its key and its position, whatever the calls: with the
same weights they are those of `rollout`, but for rounding, because a text that is read again is computed in other pieces.
"""

import dataclasses
import math

import jax
import numpy as np

from pixel_jax.models.model import Model
from pixel_jax.rollouts import loop
from pixel_jax.rollouts.config import RolloutBudget, RolloutConfig
from pixel_jax.rollouts.materialize import VisualRecord
from pixel_jax.rollouts.queue import RowRecord
from pixel_jax.rollouts.rollout import advance, begin, finish, on_mesh, static_shape
from pixel_jax.rollouts.trajectory import HostPrompts, Trajectories

STEP = 64  # tokens between two counts of the rows that are done


def no_records(prompts: HostPrompts, config: RolloutConfig) -> RowRecord:
    """Returns the records of the rows of B prompts, none of which has begun: on the host, [B * group_size, ...]."""
    rows = prompts.tokens.shape[0] * config.group_size
    return jax.tree.map(np.asarray, RowRecord.empty(rows, prompts, config, static_shape(prompts, config, None)))


def partial_rollout(
    model: Model,
    prompts: HostPrompts,
    records: RowRecord,
    key: jax.Array,
    config: RolloutConfig,
    budget: RolloutBudget,
) -> tuple[Trajectories[VisualRecord], RowRecord]:
    """Goes on with the rows of B prompts until all are done or the budget is spent.

    Args:
      model: the policy.
      prompts: as for `rollout`.
      records: of their rows, from `no_records` or an earlier call.
      key: as for `rollout`; the same in all calls.
      config: as for `rollout`.
      budget: what ends the call. The share of rows is counted every `STEP` tokens.

    Returns:
      The rows as `rollout` returns them, where one that is not done (`stop` -1) has what it has written so far; their records.

    Raises:
      ValueError: the records are of other shapes, or a tool runs on the host.
    """
    if hosts := [tool.name for tool in prompts.tables.tools if tool.host]:
        raise ValueError(f"{', '.join(hosts)} run on the host, where no budget ends a rollout: leave the budget out")
    state = begin(model, prompts, key, config, records=records)
    at_first = left = _count(state)
    # Each call may end with this number of rows unfinished.
    enough = 0 if budget.share is None else at_first - math.ceil(budget.share * at_first)
    tokens = math.inf if budget.tokens is None else budget.tokens
    while left > enough and tokens > 0:
        step = min(tokens, STEP if enough or tokens == math.inf else tokens)
        state, tokens = advance(model, state, int(step), donate=True), tokens - step
        left = _count(state)
    with on_mesh(state.mesh):
        state = dataclasses.replace(state, rows=_settle(state))
        return finish(state), _records(state)


def _count(state: loop.RolloutState) -> int:
    with on_mesh(state.mesh):
        return int(_unfinished(state))


_unfinished = jax.jit(loop.unfinished)
_settle = jax.jit(lambda state: loop.settle(state).rows)
_records = jax.jit(loop.records)
