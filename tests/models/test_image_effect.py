"""Whether a model sees, against transformers' log-probabilities, and of models that are blind on purpose."""

import jax
import numpy as np
import pytest
from tiny_families import END, IMAGE, START, VIDEO, pair
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pixel_jax.bench.check_trial import PICTURE, look
from pixel_jax.bench.checklist import Checklist, UsableExamples
from pixel_jax.bench.image_effect import measure_image_effect
from pixel_jax.data.example import Example
from pixel_jax.models.checkpoint import named_weights
from pixel_jax.models.processor import Processor

pytestmark = pytest.mark.torch
MARKS = {START: "<|vision_start|>", END: "<|vision_end|>", IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>"}
SEEING = ("qwen2_vl", "llava")
LAST = ("merger", "multi_modal_projector")  # of the names of a tower's last weights


def processor_of(model):
    """A tokenizer of words whose ids are those of the tiny models."""
    marks = {IMAGE: "<image>"} if model.config.model_type == "llava" else MARKS
    known = {marks.get(i, f"w{i}"): i for i in range(model.config.text.vocab_size)}
    core = Tokenizer(models.WordLevel(known, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(list(marks.values()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0", unk_token="w0")
    return Processor(tokenizer, family=type(model.config), vision=model.config.vision)


def broken(model, *names):
    """The model with zeros for the weights whose names have one of these in it."""
    paths = {path: any(name in key for name in names) for path, key, _ in named_weights(model)}
    assert any(paths.values())
    zero = lambda path, x: x * 0 if any(wrong and path[: len(p)] == p for p, wrong in paths.items()) else x
    return jax.tree_util.tree_map_with_path(zero, model)


ASKED = (np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8), "w3 w4 w5", "w6 w7 w8 w9")


@pytest.mark.parametrize("name", SEEING)
def test_against_transformers(name):
    """The move of the log-probabilities, from transformers' model and two calls, one for each picture."""
    import torch

    ours, theirs = pair(name)
    processor = processor_of(ours)
    effect = measure_image_effect(ours, processor, *ASKED)
    image, question, answer = ASKED
    grey = np.full_like(image, image.mean(axis=(0, 1)).round())
    placeholder = ours.config.placeholders[0]
    marks = ("", "\n") if name == "llava" else (MARKS[START], MARKS[END])
    found = []
    for shown in (image, grey):
        given = processor(f"{marks[0]}{placeholder}{marks[1]}{question}\n{answer}", images=[shown])
        given = {
            key: torch.tensor(x.astype(np.float32 if x.dtype == np.float32 else np.int64)) for key, x in given.items()
        }
        if name != "llava":
            given["mm_token_type_ids"] = (given["input_ids"] == IMAGE).int()
        with torch.no_grad():
            logprobs = theirs(**given, use_cache=False).logits.log_softmax(-1)[0]
        written = given["input_ids"][0, -4:]
        found.append(logprobs[-5:-1].gather(1, written[:, None].long()).numpy())
    assert effect.moved == pytest.approx(np.abs(found[0] - found[1]).max(), rel=1e-3) and effect.moved > 1e-3
    assert effect.sees and effect.rounding < 1e-4 and effect.changed > 0.01


@pytest.mark.parametrize("name", SEEING)
def test_a_model_that_is_blind(name, tmp_path, capsys):
    """The command says so, with the cause, and that it stops."""
    ours, _ = pair(name)
    processor, checks = processor_of(ours), Checklist(tmp_path / "check.json")
    rows = UsableExamples("rl", [Example("a", ASKED[1], (), (ASKED[2],))], ())  # it shows no picture: ours is shown
    assert look(checks, ours, processor, rows) and checks.lines[-1].status == "ok"
    for wrong, cause in {
        LAST: "the features of the picture are all zero: the last weights of the vision tower (merger, projector) are zero",
        ("patch_embed",): "the features are the same for every picture",
    }.items():
        model = broken(ours, *wrong)
        assert not look(checks, model, processor, None) and checks.wrong == ["sees"]
        line = checks.lines[-1]
        assert line.found.startswith("no: without the picture") and line.remedy.startswith(cause), line
        assert measure_image_effect(model, processor, *PICTURE).moved == 0
    assert "wrong  sees" in capsys.readouterr().out


def test_faint_features_and_a_decoder_that_passes_over_them():
    ours, _ = pair("qwen2_vl")
    faint = jax.tree.map(lambda x: x, ours)
    faint.visual = jax.tree.map(lambda x: x, ours.visual)
    last = [w for path, key, w in named_weights(faint) if "merger.mlp.2" in key]
    assert len(last) == 2
    for weight in last:
        weight[...] = weight[...] * 1e-12
    effect = measure_image_effect(faint, processor_of(ours), *ASKED)
    assert (
        not effect.sees
        and effect.cause.startswith("the features are ")
        and "the projector seems untrained" in effect.cause
    )
    effect = measure_image_effect(broken(ours, "model.layers"), processor_of(ours), *ASKED)
    assert not effect.sees and "the tokens of pictures are not replaced by them" in effect.cause


def test_a_language_model_has_nothing_to_see(tmp_path):
    ours, _ = pair("qwen3")
    checks = Checklist(tmp_path / "check.json")
    assert look(checks, ours, processor_of(ours), None) and checks.lines[-1].found == "text only: nothing to see"
    with pytest.raises(ValueError, match="family 'qwen3' sees no images"):
        measure_image_effect(ours, processor_of(ours), *ASKED)


def test_a_picture_of_one_colour_is_passed_over(tmp_path):
    ours, _ = pair("qwen2_vl")
    with pytest.raises(ValueError, match="one colour"):
        measure_image_effect(ours, processor_of(ours), np.full((56, 56, 3), 7, np.uint8), "w1", "w2")
