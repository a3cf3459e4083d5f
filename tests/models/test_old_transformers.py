"""Directories that go between us and older releases of transformers, both ways. The releases are installed when first asked
for (`old_transformers.py`), which needs a package index."""

import dataclasses
import json
import subprocess

import numpy as np
import old_transformers
import pytest
from tiny_qwen import relative

import pixel_jax
from pixel_jax.models import TextConfig, VisionConfig
from pixel_jax.models.processor import Processor
from tests.dialog.qwen import qwen_vocabulary
from tests.rollouts import scripted_model

pytestmark = [pytest.mark.slow, pytest.mark.torch]
TEXT = "<|im_start|>user\nWhich digit? café 漢 12 <|im_end|>\n"
RELEASES = (*old_transformers.OLD, None)


@pytest.fixture(scope="module")
def ask():
    """`old_transformers.run`, where the releases can be had."""
    try:
        for release in old_transformers.OLD:
            old_transformers.install(f"transformers=={release}")
        old_transformers.torchvision()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"older releases of transformers cannot be installed here: {error.stderr[-300:]}")
    return old_transformers.run


@pytest.mark.parametrize("release", old_transformers.OLD)
def test_defaults(ask, release):
    """Ours are the classes', in every release that leaves fields out."""
    theirs = ask(release, "defaults")
    assert theirs["release"] == release
    for part, ours in (("text", TextConfig()), ("vision", VisionConfig())):
        for spec in dataclasses.fields(ours):
            if spec.name != "mrope_section":  # without which a model of these releases does not run
                value = theirs[part][spec.name]
                assert getattr(ours, spec.name) == (tuple(value) if isinstance(value, list) else value), spec.name
    assert theirs["own"]["tie_word_embeddings"] in (False, True)  # 4.57 has it in the text's part, as False
    assert theirs["text"]["tie_word_embeddings"] is False


@pytest.mark.parametrize("release", old_transformers.OLD)
def test_a_model_that_an_older_release_saved(ask, tmp_path, rng, release):
    """Loads, with what 4.49 leaves out filled in, and gives the logits that the release gives."""
    row = [1, 58, *[60] * 6, 59, 2, 58, *[61] * 8, 59, 3]
    arrays = {
        "input_ids": np.array([row]),
        "attention_mask": np.ones((1, len(row)), int),
        "pixel_values": rng.standard_normal((24, 1176), dtype=np.float32),
        "image_grid_thw": np.array([[1, 4, 6]]),
        "pixel_values_videos": rng.standard_normal((32, 1176), dtype=np.float32),
        "video_grid_thw": np.array([[2, 4, 4]]),
        "second_per_grid_ts": np.array([1.0], np.float32),
    }
    np.savez(tmp_path / "arrays.npz", **arrays)
    said = ask(release, "save", tmp_path / "model", tmp_path / "arrays.npz")
    if release == "4.49.0":
        assert said["vision"] == ["hidden_size", "in_chans", "model_type", "spatial_patch_size", "tokens_per_second"]
    model, _ = pixel_jax.from_pretrained(tmp_path / "model")
    difference = relative(pixel_jax.forward(model, **arrays), np.load(tmp_path / "model" / "logits.npy"))
    print(f"transformers {release}: logits differ by {difference:.1e} of the largest")
    assert difference < 1e-5


@pytest.mark.parametrize("vocabulary", [scripted_model.vocabulary, qwen_vocabulary])
@pytest.mark.parametrize("release", RELEASES)
def test_what_we_save_is_read(ask, tmp_path, release, vocabulary):
    """A tokenizer of our own making: the same tokens and the same picture in every release."""
    vocabulary = vocabulary()
    pixel_jax.save_pretrained(
        scripted_model.model(), Processor(vocabulary.tokenizer, min_pixels=784, max_pixels=8 * 784), tmp_path
    )
    found = ask(release, "read", tmp_path, TEXT)
    tokenizer = vocabulary.tokenizer
    assert found["tokens"] == len(tokenizer) and found["ids"] == tokenizer.encode(TEXT) and found["text"] == TEXT
    assert found["without special tokens"] == "user\nWhich digit? café 漢 12 \n"
    assert found["end"] == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    messages = [{"role": "user", "content": TEXT}]
    assert found["template"] == tokenizer.apply_chat_template(messages, tokenize=False)
    assert found["seen"] == {"ids": [[vocabulary.image_pad] * 6 + tokenizer.encode(TEXT)], "grid": [[1, 4, 6]]}


@pytest.mark.parametrize("release", RELEASES)
def test_what_came_in_is_read_when_it_went_out(ask, tmp_path, release):
    """Files of a release, through our hands, are the same files, and still say the same there."""
    source, ours = tmp_path / "source", tmp_path / "ours"
    pixel_jax.save_pretrained(scripted_model.model(), Processor(scripted_model.vocabulary().tokenizer), source)
    settings = json.dumps({"do_sample": True, "eos_token_id": [3, 5], "temperature": 0.1})
    (source / "generation_config.json").write_text(settings)
    pixel_jax.save_pretrained(*pixel_jax.from_pretrained(source), ours)
    found = ask(release, "read", ours, TEXT)
    assert found == ask(release, "read", source, TEXT) and found["stop"] == [3, 5]
