"""The plan of an edit: the program that is compiled is that of a real edit, and its work is that of the formula."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from rich.console import Console

from pixel_jax.cli import UserError
from pixel_jax.config import ConfigFileParser, load
from pixel_jax.models.flops import forward_flops, padded_work
from pixel_jax.parallel import make_mesh
from pixel_jax.parallel.sharding import shardings
from pixel_jax.planning.machines import machine
from pixel_jax.planning.main import read_recipe
from pixel_jax.planning.programs import abstract_model, sft_batch
from pixel_jax.planning.search import plan
from pixel_jax.train_config import LoRAConfig, TrainConfig
from tests.planning.small_recipe import recipe
from unlearn_jax.objective import Objective
from unlearn_jax.planning.recipe import EditRecipe
from unlearn_jax.vision_language import adapter_loss, examples

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@functools.cache
def adapted():
    lora = LoRAConfig(rank=4, alpha=8.0, targets=r"model\.layers\..*")
    return EditRecipe.of(dataclasses.replace(recipe(), config=dataclasses.replace(recipe().config, lora=lora)))


def test_an_unlearning_step_is_that_of_an_edit():
    mesh, small = make_mesh(MESH), adapted()
    assert small.steps == ("unlearn",)
    zeros = lambda x: np.zeros(x.shape, x.dtype)
    batch = jax.tree.map(zeros, sft_batch(small, packed=False))
    batch.tokens[:, :] = batch.valid[:, :] = batch.loss_mask[:, 1:] = True
    batch.visual.slices[:] = np.arange(2)[None, :, None]
    batch.visual.grids[:] = (1, 4, 8)
    model = abstract_model(small)
    model = jax.tree.map(lambda x, place: jax.device_put(zeros(x), place), model, shardings(model, mesh))
    loss, adapter = adapter_loss(model)
    rows = examples(batch)
    rows.pop("id")
    real = (Objective.of(loss, rows, np.ones(8, np.float32), micro_batch=4, mesh=mesh), adapter, adapter)
    expected = small.build("unlearn", mesh).arguments
    assert jax.tree.structure(expected) == jax.tree.structure(real)
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for (path, imagined), found in zip(paths, jax.tree.leaves(real), strict=True):
        name = jax.tree_util.keystr(path)
        if "places" not in name and "labels" not in name and "loss_mask" not in name:  # as wide as the rows need
            assert (imagined.shape, imagined.dtype) == (found.shape, found.dtype), name


def test_flops_of_an_unlearning_step():
    """Rows forward with a tangent, backward once; with blocks computed again on the way back."""
    small = adapted()
    found = plan(small, "unlearn", machine("cpu:8"), MESH).plan
    forward = sum(forward_flops(small.network, padded_work(8, small.length("sft"), 2, 32, small.network)))
    assert 4 * forward < 8 * found.flops_per_chip < 7 * forward


@pytest.mark.slow
def test_memory_of_a_device_does_not_grow_with_the_examples():
    """Those of an edit lie in the memory of the hosts; a device holds one coefficient of each, and their work grows."""
    shards, plans = 4, {}
    for count in (200, 2_000, 20_000):
        small = dataclasses.replace(adapted(), examples=count)
        assert small.micro_batches("unlearn", make_mesh(MESH)) == count // shards
        plans[count] = plan(small, "unlearn", machine("cpu:8"), MESH).plan
    few, most = plans[200], plans[20_000]
    for count, found in plans.items():
        assert found.bytes_per_chip <= few.bytes_per_chip + 2 * 4 * (count - 200) / shards
    assert most.flops_per_chip == pytest.approx(100 * few.flops_per_chip, rel=0.01)


def test_the_micro_batches_of_the_training_are_not_those_of_an_edit():
    """Configured or not, one row at a time on every part of the mesh, whose positions are not split."""
    small = dataclasses.replace(adapted(), configured=True)
    assert small.micro_batches("unlearn", make_mesh(MESH)) == 8 // 4 and small.sequences("unlearn") == (1,)


def test_without_an_adapter_there_is_nothing_to_edit():
    with pytest.raises(UserError, match="the config has no lora"):
        EditRecipe.of(recipe())


def test_the_shipped_tuning_of_an_adapter_can_be_edited():
    config = ConfigFileParser("config", lock_config=False).parse("pixel/qwen2_5_vl_7b_sft:lora")
    made = EditRecipe.of(read_recipe(load(TrainConfig, config), Console(quiet=True)))
    assert made.steps == ("unlearn",) and made.rows("unlearn") == made.config.sft.batch_size
    assert made.length("unlearn") == made.config.trace_tokens


@pytest.mark.slow
@pytest.mark.libtpu
def test_memory_of_a_described_tpu_does_not_grow_with_the_examples():
    """Rows of words are what libtpu can slice in the memory of the host; fields of bytes and truth values are not."""
    target, plans = machine("v5e:2x4"), {}
    for count in (64, 20_000):
        small = dataclasses.replace(adapted(), examples=count)
        plans[count] = plan(small, "unlearn", target, {"data": 4, "tensor": 2}).plan
    few, most = plans[64], plans[20_000]
    assert most.bytes_per_chip <= few.bytes_per_chip + 2 * 4 * 20_000 / 4
    assert most.flops_per_chip == pytest.approx(20_000 / 64 * few.flops_per_chip, rel=0.01)
