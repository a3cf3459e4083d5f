"""What does not fit a device's memory is taken in turns: by formulas that are held against XLA's own count and real arrays."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixel_jax.parallel import memory
from pixel_jax.rollouts import rollout as rollouts
from pixel_jax.rollouts.queue import start
from pixel_jax.rollouts.rollout import limit_in_flight, put_prompts, static_shape, traced_settings
from pixel_jax.training import cost
from pixel_jax.training.cost import bytes_of, fixed_bytes, micro_batches, row_bytes
from pixel_jax.training.optimizer import OptimizerConfig, make_optimizer
from pixel_jax.training.state import init_state
from pixel_jax.training.steps import ForwardConfig, make_sft_step
from tests.rollouts import scripted_model
from tests.training.tiny_model import make_batch, make_model, tiny_config

NETWORK = tiny_config()


def test_a_row_takes_what_xla_says():
    """Of five rows, each twenty times as long and with sixteen times the patches of a row of the batch, against one."""
    model, batch = make_model(), make_batch(5)
    wide = lambda x, axis, times: np.concatenate([x] * times, axis=axis)
    batch = jax.tree.map(lambda x: wide(x, 1, 20) if x.ndim == 2 else x, batch)
    batch = batch._replace(visual=batch.visual._replace(patches=wide(batch.visual.patches, 2, 16)))
    optimizer = make_optimizer(OptimizerConfig(), 3)
    step = make_sft_step(ForwardConfig(micro_batches=1, logit_chunk=16), optimizer)
    state = jax.eval_shape(lambda model: init_state(model, optimizer), model)
    takes = [
        step.lower(state, jax.tree.map(lambda x: x[:rows], batch)).compile().memory_analysis().temp_size_in_bytes  # noqa: B023
        for rows in (1, 5)
    ]
    said = row_bytes(NETWORK, 480, (1, 256))
    assert 0.5 * said < (takes[1] - takes[0]) / 4 < 1.5 * said, (takes, said)


@given(st.integers(1, 64), st.integers(1, 4000), st.integers(0, 8), st.integers(1, 10), st.booleans())
def test_turns_are_as_few_as_fit(rows, tokens, slices, room, remat):
    row = row_bytes(NETWORK, tokens, (slices, 64), width=2, remat=remat)
    visual = make_batch(1).visual
    visual = visual._replace(slices=np.zeros((rows, slices, 2)), patches=np.zeros((rows, 0, 64, 588), np.uint8))
    held = memory.device_memory() - fixed_bytes(NETWORK, 8) - room * row
    turns = micro_batches(NETWORK, rows, tokens, visual, None, held=held, width=2, remat=remat, logit_chunk=8)
    assert rows % turns == 0 and (rows // turns <= room)
    assert not [fewer for fewer in range(1, turns) if rows % fewer == 0 and rows // fewer <= room]


def test_a_step_takes_turns_where_memory_is_short(monkeypatch):
    """The same loss and the same gradient; where there is room for all rows there is one turn."""
    model, batch, optimizer = make_model(), make_batch(8), make_optimizer(OptimizerConfig(), 3)
    reports = []
    for short in (False, True):
        state = init_state(model, optimizer)
        config = ForwardConfig(logit_chunk=16)
        if short:
            row = row_bytes(NETWORK, 24, (1, 16))
            held = bytes_of(state) + 3 * bytes_of(state.trainable) + bytes_of(batch)
            monkeypatch.setattr(cost, "device_memory", lambda: held + fixed_bytes(NETWORK, 16) + 3 * row)  # noqa: B023
        held = bytes_of(state) + 3 * bytes_of(state.trainable)
        assert config.turns(NETWORK, batch, None, held=held) == (4 if short else 1)  # of 2 rows: 8 is no multiple of 3
        reports.append(make_sft_step(config, optimizer)(state, batch)[1])
    for name in ("loss", "grad_norm"):
        assert float(reports[0].metrics[name]) == pytest.approx(float(reports[1].metrics[name]), rel=1e-5)


def test_as_many_prompts_are_in_flight_as_fit(monkeypatch):
    """Against the arrays that a rollout begins with: one more prompt in flight would have been one too many."""
    prompts, model = scripted_model.prompts(6), scripted_model.model()
    config = dataclasses.replace(scripted_model.CONFIG, max_response=4096)
    shape, placed = static_shape(prompts, config, None), put_prompts(prompts, None)
    assert limit_in_flight(config, model, prompts, shape, None) is config  # all fit

    def begins(count: int) -> int:
        assistant_prefix, _, alone = traced_settings(dataclasses.replace(config, in_flight=count), ())
        arrays = jax.eval_shape(
            lambda: start(model, placed, assistant_prefix, alone, shape)  # noqa: B023
        )
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))

    group = begins(3) - begins(2)
    for count in (1, 2, 4):
        monkeypatch.setattr(rollouts, "device_memory", lambda: int(rollouts.CACHES_DIVISOR * group * (count + 0.5)))  # noqa: B023
        assert limit_in_flight(config, model, prompts, shape, None).in_flight == count
    given_by_hand = dataclasses.replace(config, in_flight=5)
    assert limit_in_flight(given_by_hand, model, prompts, shape, None) is given_by_hand


def test_memory_is_what_there_is():
    told = next(line for line in pathlib.Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert memory.host_memory() <= 1024 * int(told.split()[1])
    assert 0 < memory.device_memory() <= memory.host_memory()
