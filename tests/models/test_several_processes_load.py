"""Two processes read one sharded checkpoint, each what its devices hold, and save it together."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import several_loading_worker
from safetensors.numpy import load_file
from tiny_qwen import tiny_config

import pixel_jax
from pixel_jax.models import LanguageModel, checkpoint
from pixel_jax.models.model import forward_hidden
from tests.training import fleet


def weights(directory: pathlib.Path) -> dict[str, np.ndarray]:
    return {key: x for file in directory.glob("*.safetensors") for key, x in load_file(file).items()}


@pytest.mark.slow
def test_two_processes_load_compute_and_save_what_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_SHARD_BYTES", 20_000)
    model = LanguageModel(tiny_config(), jax.random.key(3))
    pixel_jax.save_pretrained(model, None, tmp_path / "whole")
    assert len([*(tmp_path / "whole").glob("model-*.safetensors")]) > 3
    tokens = jnp.asarray(several_loading_worker.TOKENS, jnp.int32)
    expected = model.logits(forward_hidden(model, tokens, tokens > 0, None))

    worker = pathlib.Path(several_loading_worker.__file__)
    fleet.expect(fleet.start(2, worker, tmp_path / "whole", tmp_path, devices=2))
    for number in range(2):
        found = json.loads((tmp_path / f"found-{number}.json").read_text())
        assert found["devices"] == 4 and found["same"]
        assert found["read"] == found["held"] < 0.6 * found["whole"]
        logits = np.load(tmp_path / f"logits-{number}.npy")
        np.testing.assert_allclose(logits, expected, atol=1e-5 * float(jnp.abs(expected).max()))
    whole, saved = weights(tmp_path / "whole"), weights(tmp_path / "model")
    assert whole.keys() == saved.keys()
    for key, x in whole.items():
        np.testing.assert_array_equal(x, saved[key], key)
