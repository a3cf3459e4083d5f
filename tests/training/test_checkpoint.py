"""Checkpoints: what goes in comes out, on any mesh, whole or not at all."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixel_jax.parallel import make_mesh
from pixel_jax.training.checkpoint import CheckpointError, Checkpoints
from pixel_jax.training.optimizer import OptimizerConfig, make_optimizer
from pixel_jax.training.state import init_state

OPTIMIZER = make_optimizer(OptimizerConfig(), 10)
HOST = {
    "data": {"epoch": 3, "order": np.arange(5, dtype=np.int16), "none": None},
    "random": np.random.default_rng(1).bit_generator.state,
    "empty": np.zeros((0, 3), np.float32),
    "nested": [{"x": np.ones((2, 2), bool)}, 0.1, "text", True],
}


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_everything_comes_back_on_any_mesh(model, tmp_path):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    state = init_state(half, OPTIMIZER, trainable="(?!visual)", mesh=make_mesh({"data": 2, "fsdp": 4}))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, HOST)
    with Checkpoints(tmp_path) as checkpoints:
        for mesh in (None, make_mesh({"fsdp": 2, "tensor": 4})):
            _, found, host, local = checkpoints.restore(jax.eval_shape(lambda: state), mesh=mesh)
            assert_equal(found, state)
            if mesh is not None:
                weight = found.trainable["model.layers.{}.mlp.up_proj.weight"]
                assert weight.sharding.mesh == mesh and weight.addressable_shards[0].data.size == weight.size // 8
    np.testing.assert_equal(host, HOST)
    random = np.random.default_rng()
    random.bit_generator.state = host["random"]
    assert random.random() == np.random.default_rng(1).random()
    assert host["data"]["order"].dtype == np.int16 and host["nested"][0]["x"].dtype == bool


def test_only_the_last_ones_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest is None
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            checkpoints.restore({"x": jnp.zeros(2)})
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": jnp.full(2, step)})
        assert checkpoints.manager.all_steps() == [2, 3] and checkpoints.latest == 3
        assert checkpoints.restore({"x": jnp.zeros(2, int)}, step=2).state["x"].tolist() == [2, 2]


def test_a_checkpoint_that_does_not_fit_says_what(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(2), "y": jnp.zeros(3)})
        with pytest.raises(CheckpointError, match=r"missing from .*\['z'\].*without a use \['y'\]"):
            checkpoints.restore({"x": jnp.zeros(2), "z": jnp.zeros(3)})
        with pytest.raises(
            CheckpointError, match=r"x is \['float32', \[2\]\] in the checkpoint, not \['float32', \[4\]\]"
        ):
            checkpoints.restore({"x": jnp.zeros(4), "y": jnp.zeros(3)})
        with pytest.raises(TypeError, match="host.f holds <function"):
            checkpoints.save(2, {"x": jnp.zeros(2)}, {"f": make_mesh})


def killed_before_sealing(directory, step, value):
    """A whole checkpoint whose files nobody has noted."""
    checkpoints = Checkpoints(directory)
    checkpoints.save(step, {"x": jnp.full(2, value)})
    checkpoints.manager.close()


def restored(directory):
    """(step, value) of what a run would go on from."""
    with Checkpoints(directory) as checkpoints:
        found = checkpoints.restore({"x": jnp.zeros(2, int)})
        return found.step, int(found.state["x"][0])


def test_what_was_noted_about_a_checkpoint_that_is_set_aside_does_not_condemn_the_next_of_its_name(tmp_path):
    directory = tmp_path / "checkpoints"
    with Checkpoints(directory) as checkpoints:
        for step in (4, 6):
            checkpoints.save(step, {"x": jnp.full(2, step)})
    next(path for path in (directory / "6").rglob("*") if path.stat().st_size and path.is_file()).unlink()
    assert restored(directory) == (4, 4)
    killed_before_sealing(directory, 6, 60)
    assert restored(directory) == (6, 60)


def test_what_other_processes_noted_before_the_checkpoints_were_deleted_does_not_count(tmp_path):
    directory = tmp_path / "checkpoints"
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(2, {"x": jnp.full(2, 2)})
    (noted,) = checkpoints.checksums.iterdir()
    noted.with_name("2.1.json").write_text(noted.read_text())
    noted.with_name("3.1.json").write_text(noted.read_text())
    shutil.rmtree(directory)
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(2, {"x": jnp.full(2, 20)})
    assert restored(directory) == (2, 20) and [path.name for path in checkpoints.checksums.iterdir()] == ["2.0.json"]


@pytest.mark.parametrize("content", [b"", b'{"processes": 1, "fil', b"[]", b'{"processes": 1, "files": {"a": 3}}'])
def test_a_damaged_note_beside_a_good_checkpoint_says_nothing_about_it(content, tmp_path, capsys):
    directory = tmp_path / "checkpoints"
    with Checkpoints(directory) as checkpoints:
        checkpoints.save(2, {"x": jnp.full(2, 20)})
    (noted,) = checkpoints.checksums.iterdir()
    noted.write_bytes(content)
    assert restored(directory) == (2, 20)
    assert str(noted) in capsys.readouterr().err
