"""Tunes a tiny model, or lets the scripted model learn, in one process or several; tests start it, or call it, and watch.

    python shared_worker.py DIRECTORY SETTINGS

SETTINGS is JSON: `phase` ("sft", "rl", "pools", "ahead"), `mesh`, `rollout_mesh`, `steps`, `trainable`, `lora`, and an
event: `signal`, sent to the process `victim` by itself when its batch number `batch` is asked for. "pools": of RL, `pools`
(`POOLS`), `staleness` and `tokens` (of a budget). "ahead": the same with a rollout made by hand, which is quicker.
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys

import jax
import numpy as np
import scripted_model
import test_rl
from tiny_model import make_batch, make_model

from pixel_jax.data.batches import MemoryBatches
from pixel_jax.models.lora import add_lora
from pixel_jax.parallel import WHOLE, make_mesh, process_shard, replicate
from pixel_jax.parallel.processes import fail_together, initialize, is_main_process
from pixel_jax.rollouts.config import RolloutBudget
from pixel_jax.rollouts.prompts import build_prompts
from pixel_jax.training.losses import PolicyLossConfig
from pixel_jax.training.optimizer import OptimizerConfig
from pixel_jax.training.preemption import NOTICE
from pixel_jax.training.replay import ReplayConfig
from pixel_jax.training.rewards import Rewards, Term
from pixel_jax.training.rl import RLConfig, rl
from pixel_jax.training.sft import SFTConfig, sft
from pixel_jax.training.stages import Stages, collect
from pixel_jax.training.steps import ForwardConfig

PROMPTS = 4


def happen(batch, event):
    """At the appointed batch the process sends itself a signal."""
    if event and (event["victim"], event["batch"]) == (jax.process_index(), batch):
        os.kill(os.getpid(), event["signal"])


class Rows(MemoryBatches):
    """The same rows again and again."""

    event: dict = {}

    def __next__(self):
        happen(self.position, self.event)
        return super().__next__()


class Questions:
    """This process's share of the same questions, again and again."""

    def __init__(self, shard, event, prompts=PROMPTS):
        self.shard, self.event, self.prompts, self.asked = shard, event, prompts, 0

    def __next__(self):
        happen(self.asked, self.event)
        self.asked += 1
        size = self.prompts // self.shard.count
        mine = slice(self.shard.index * size, (self.shard.index + 1) * size)
        words, tables = scripted_model.vocabulary(), scripted_model.token_tables()
        prompts = build_prompts(
            scripted_model.queries(self.prompts)[mine],
            words,
            tables,
            scripted_model.CONFIG,
            shape=scripted_model.shape(),
        )
        return prompts, (["7", "3"] * (self.prompts // 2))[mine]

    def get_state(self):
        return {"asked": self.asked}

    def set_state(self, state):
        self.asked = state["asked"]


# Which of 8 devices, of which each of two processes has 4 in a row, train and roll out.
POOLS = {
    "together": (range(8), None),
    "apart": (range(4), range(4, 8)),  # each has a process of its own
    "beside": ((0, 1, 4, 5), (2, 3, 6, 7)),  # each process has a half of both
}


def pool_meshes(name, shape=("data", "fsdp")):
    devices, sizes = jax.devices(), dict.fromkeys(shape, 2)
    pick = lambda which: None if which is None else make_mesh(sizes, [devices[i] for i in which])
    training, rollouts = POOLS[name]
    return (make_mesh({"data": 4, "fsdp": 2}) if name == "together" else pick(training)), pick(rollouts)


def written(row, answer):
    """Whether the answer was written."""
    return f"boxed{{{answer}}}" in row.response


def decode(ids):
    return scripted_model.vocabulary().to_bytes(ids).decode("utf-8", "replace")


def tune(directory, mesh, steps, *, trainable="(?!visual)", lora=False, **event):
    config = SFTConfig(
        steps=steps,
        batch_size=8,
        trainable=trainable,
        save_every=2,
        optimizer=OptimizerConfig(learning_rate=1e-2, eps=1e-2),
        forward=ForwardConfig(remat=False),
    )
    model = make_model()
    if lora:
        model = add_lora(model, jax.random.key(1), rank=2, alpha=4, targets=r"model\..*")
    shard = process_shard(mesh)
    data = Rows(make_batch(20), 8, seed=3, process_index=shard.index, process_count=shard.count)
    data.event = event
    return sft(model, data, config, directory=directory, mesh=mesh)


def learn(directory, mesh, steps, *, rollout_mesh=None, trainable=".*", lora=False, **event):
    config = RLConfig(
        iterations=steps,
        prompts=PROMPTS,
        train_batch=8,
        trainable=trainable,
        rollout=scripted_model.CONFIG,
        replay=ReplayConfig(episode=2),
        optimizer=OptimizerConfig(learning_rate=1e-3, eps=1e-2),
        forward=ForwardConfig(remat=False),
        time_operations=1,
    )
    model, data = scripted_model.model(), Questions(process_shard(mesh), event)
    if lora:
        model = add_lora(model, jax.random.key(1), rank=2, alpha=4, targets=r"model\..*")
    stages = Stages(Rewards.of(config.reward, decode, {"answer": Term(written)}))
    return rl(model, data, stages, config, directory=directory, mesh=mesh, rollout_mesh=rollout_mesh)


def learn_in_pools(directory, pools, steps, *, staleness=0, tokens=None, lora=False, prompts=8, **event):
    """RL whose rows are written ahead, carry over, or both. All processes read all questions."""
    mesh, rollout_mesh = pool_meshes(pools)
    config = RLConfig(
        iterations=steps,
        prompts=prompts,
        train_batch=8,
        trainable=".*lora_" if lora else ".*",
        rollout=scripted_model.CONFIG,
        rollout_budget=RolloutBudget(tokens=tokens),
        staleness=staleness,
        loss=PolicyLossConfig(importance_cap=2.0),
        replay=ReplayConfig(episode=2),
        optimizer=OptimizerConfig(learning_rate=1e-3, eps=1e-2),
        forward=ForwardConfig(remat=False),
    )
    model = scripted_model.model()
    if lora:
        model = add_lora(model, jax.random.key(1), rank=2, alpha=4, targets=r"model\..*")
    stages = Stages(Rewards.of(config.reward, decode, {"answer": Term(written)}))
    data = Questions(WHOLE, event, prompts)
    trained = rl(model, data, stages, config, directory=directory, mesh=mesh, rollout_mesh=rollout_mesh)
    return mesh, trained


class AskedByHand(test_rl.Questions):
    """The prompts of a rollout made by hand."""

    event: dict = {}

    def __next__(self):
        happen(self.asked, self.event)
        return super().__next__()


def learn_ahead(directory, pools, steps, *, lora=False, **event):
    """RL whose rows are written ahead by a rollout made by hand."""
    mesh, rollout_mesh = pool_meshes(pools)
    loss = PolicyLossConfig(importance_cap=2.0)
    trainable = ".*lora_" if lora else ".*"
    config = dataclasses.replace(test_rl.CONFIG, iterations=steps, staleness=1, loss=loss, trainable=trainable)
    stages = test_rl.stages(config, test_rl.score, collect=functools.partial(collect, roll=test_rl.rollout))
    model, data = make_model(), AskedByHand()
    if lora:
        model = add_lora(model, jax.random.key(1), rank=2, alpha=4, targets=r"model\..*")
    data.event = event
    return mesh, rl(model, data, stages, config, directory=directory, mesh=mesh, rollout_mesh=rollout_mesh)


def work(directory, phase="sft", mesh=None, rollout_mesh=None, steps=3, **settings):
    """The trained model's weights, on the host."""
    if phase in ("pools", "ahead"):
        learning = learn_in_pools if phase == "pools" else learn_ahead
        axes, model = learning(directory, steps=steps, **settings)
        leaves = jax.tree.leaves(model)
        return [np.asarray(x) for x in replicate(leaves, axes)] if axes.local_devices else []
    axes = mesh and make_mesh(mesh)
    if phase == "rl":
        model = learn(directory, axes, steps, rollout_mesh=rollout_mesh and make_mesh(rollout_mesh), **settings)
    else:
        model = tune(directory, axes, steps, **settings)
    leaves = jax.tree.leaves(model)
    return [np.asarray(x) for x in (replicate(leaves, axes) if axes else leaves)]


def main(directory, settings):
    initialize()
    directory = pathlib.Path(directory)
    with fail_together():
        NOTICE.listen()
        weights = work(directory, **json.loads(settings))
        if is_main_process():
            np.savez(directory / "weights.npz", *weights)


if __name__ == "__main__":
    main(*sys.argv[1:])
