"""LLaVA-1.5, whose images have one size, rolls out with zooms, is tuned, learns and chats."""

import dataclasses
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pixel_jax import save_pretrained
from pixel_jax.chat import Chat, Screen
from pixel_jax.data.traces import Trace, right, to_trajectories
from pixel_jax.dialog import template
from pixel_jax.dialog.tokenizer import Vocabulary
from pixel_jax.models import config_from_hf
from pixel_jax.models.llava import LlavaConfig
from pixel_jax.models.processor import Processor
from pixel_jax.rollouts.limits import write_limits
from pixel_jax.rollouts.prompts import PromptError, Query, build_prompts, prompt_tokens, tables
from pixel_jax.rollouts.rollout import rollout
from pixel_jax.rollouts.shapes import BatchShape, RolloutShape, budgets
from pixel_jax.rollouts.trajectory import to_host
from pixel_jax.rollouts.views import frame_patches, render
from pixel_jax.serving.speakers import load_speaker
from tests.rollouts import llava, scripted_model
from tests.rollouts.test_rollout_of_families import learn, visible

KEY = jax.random.key(7)
PADS = (llava.SIDE // 14) ** 2
SIZES = ((120, 150), (96, 200), (64, 64), (110, 130))
QUERIES = [Query("Which digit?", [scripted_model.image(i, *size)]) for i, size in enumerate(SIZES)]
QUERIES[2] = QUERIES[2]._replace(images=[*QUERIES[2].images, scripted_model.image(9, 90, 100)])


@pytest.fixture(scope="module")
def model():
    return visible(llava.model())


@pytest.fixture(scope="module")
def config(model):
    return scripted_model.CONFIG.for_model(model.config)


def token_tables():
    return tables(llava.vocabulary())


def asked(config, queries=QUERIES):
    return build_prompts(queries, llava.vocabulary(), token_tables(), config)


@pytest.mark.slow
def test_rolls_out_and_learns(model, config):
    prompts = asked(config)
    t = to_host(rollout(model, prompts, KEY, config))
    assert (scripted_model.outcomes(t) == scripted_model.CROPPED).any()
    words, shown = llava.vocabulary(), t.visual.grids.prod(axis=-1)
    assert set(shown.ravel().tolist()) == {0, PADS}
    np.testing.assert_array_equal((t.tokens == words.image_pad).sum(axis=1), shown.sum(axis=1))
    learn(model, scripted_model.with_pixels(t, prompts, config))
    blank = to_host(rollout(model, prompts, KEY, dataclasses.replace(config, blank=True)))
    assert (blank.logprobs != t.logprobs).any()  # it sees the crops


def test_what_does_not_fit_is_named(model, config):
    with pytest.raises(ValueError, match="merge_size=2, square=None; the model needs merge_size=1, square=28: take"):
        rollout(model, asked(config), KEY, scripted_model.CONFIG)
    with pytest.raises((PromptError, ValueError), match="the dialog shows 1 videos"):
        asked(config, [Query("Which frame?", [QUERIES[0].images[0]] * 2, is_video=True)])
    values = model.config.to_hf() | {"vision_feature_select_strategy": "full"}
    with pytest.raises(ValueError, match="reads the class token beside the patches"):
        config.check_model(config_from_hf(values), videos=False)


@settings(max_examples=20, deadline=None)
@given(st.tuples(st.integers(1, 96), st.integers(1, 96)), st.randoms(use_true_random=False))
def test_pictures_of_a_zoom_are_those_of_the_processor(size, random):
    """On the device, in tuning on the host, and of the crop alone."""
    config = scripted_model.CONFIG.for_model(llava.model().config)
    x, y = random.randrange(97 - size[1]), random.randrange(97 - size[0])
    image, region = scripted_model.image(3, 96, 96), (x, y, x + size[1], y + size[0])
    prompts = asked(config, QUERIES[:1])
    _, budget = budgets(config, RolloutShape.of(prompts.shape, config, prompts.tables.tools, 1))
    on_host = frame_patches(image, region, (llava.SIDE, llava.SIDE), config)
    on_device = jax.jit(render, static_argnums=3)(image, jnp.array(region), jnp.array([llava.SIDE] * 2), budget)
    np.testing.assert_array_equal(on_device, on_host)
    vision = llava.model().config.vision
    whole = Processor(llava.vocabulary().tokenizer, family=LlavaConfig, vision=vision)
    values = whole("<image>", images=[image[region[1] : region[3], region[0] : region[2]]])["pixel_values"][0]
    squares = values.reshape(3, 2, 14, 2, 14).transpose(1, 3, 0, 2, 4).reshape(PADS, 3, -1)
    mean, std = (np.array(x, np.float32)[:, None] for x in (vision.pixel_mean, vision.pixel_std))
    np.testing.assert_array_equal(np.rint((squares * std + mean) * 255), on_host.reshape(PADS, 3, -1))


class TheirConversation:
    """transformers' `generate`, Pillow's crops and the processor of CLIP."""

    def __init__(self, folder, tokenizer):
        import torch
        from transformers import LlavaForConditionalGeneration
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        self.torch, self.tokenizer = torch, tokenizer
        self.network = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        square = {"height": llava.SIDE, "width": llava.SIDE}
        self.processor = CLIPImageProcessorPil(size={"shortest_edge": llava.SIDE}, crop_size=square)

    def generate(self, ids, images):
        seen = self.processor([Image.fromarray(x) for x in images])["pixel_values"]
        given = self.torch.tensor([ids])
        arrays = {"pixel_values": self.torch.tensor(np.stack(seen)), "attention_mask": self.torch.ones_like(given)}
        options = {"max_new_tokens": scripted_model.CONFIG.max_new_tokens, "min_new_tokens": 1, "eos_token_id": 2}
        banned = [self.tokenizer.convert_tokens_to_ids("<image>")]
        with self.torch.no_grad():
            out = self.network.generate(
                given, **arrays, **options, do_sample=False, suppress_tokens=banned, pad_token_id=0
            )
        return out[0, len(ids) :].tolist()

    def encode(self, text, behind):
        text = text.replace("<image>", "<image>" * PADS)
        return self.tokenizer.encode(behind + text, add_special_tokens=False)[1:]

    def write(self, query, max_calls):
        """The ids of a conversation, where its answer begins, and all images."""
        question = [
            *({"type": "image"} for _ in query.images),
            {"type": "text", "text": f"{query.question}\n\n{GUIDE}"},
        ]
        told = [
            {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
            {"role": "user", "content": question},
        ]
        text = self.tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
        ids, images = [1, *self.encode(text, "<s>")], list(query.images)
        begin = len(ids)
        for call in range(max_calls + 1):
            turn = self.generate(ids, images)
            ids += turn
            found = re.search(r"<tool_call>(.*)</tool_call>", self.tokenizer.decode(turn), re.DOTALL)
            if found is None or call == max_calls:
                break
            said, crop = answered(json.loads(found[1])["arguments"], images)
            images += [crop] * (crop is not None)
            ids += self.encode(" USER: " + "<image>\n" * (crop is not None) + said + " ASSISTANT:", "</s>")
        return begin, ids, images


SYSTEM, GUIDE = template.system_prompt(), template.GUIDELINES["vcot"]


def answered(call, images):
    """What a crop says, and shows."""
    if call["target_image"] > len(images):
        return MISSING.format(len(images)), None
    image = Image.fromarray(images[call["target_image"] - 1])
    box = [round(share * side) for share, side in zip(call["bbox_2d"], image.size * 2, strict=True)]
    width, height = box[2] - box[0], box[3] - box[1]
    if min(width, height) <= 28:
        return f"\nExecution error:\nCropped image is too small: {width}x{height}\n", None
    return f"\nHere is the cropped image (Image Size: {llava.SIDE}x{llava.SIDE}):", np.asarray(image.crop(box))


MISSING = (
    "\nExecution error:\nExecution Error: Incorrect `target_image` argument in `crop_image_normalized` operation. You can only "
    "pick an image within [1,{}]\n"
)


@pytest.mark.slow
@pytest.mark.torch
def test_greedy_conversations_are_those_of_transformers(model, config, tmp_path):
    save_pretrained(model, None, tmp_path)
    theirs = TheirConversation(tmp_path, llava.vocabulary().tokenizer)
    greedy = dataclasses.replace(config, temperature=0.0, group_size=1)
    t = to_host(rollout(model, asked(greedy), KEY, greedy))
    zooms = 0
    for row, query in enumerate(QUERIES):
        begin, ids, images = theirs.write(query, greedy.max_calls)
        assert t.tokens[row][t.valid[row]].tolist() == ids
        zooms += len(images) - len(query.images)
    assert zooms > 2


def trained(legacy):
    """transformers' tokenizer of LLaVA, with the tokens and merges that a text gives."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    core = Tokenizer(models.BPE(byte_fallback=True))
    digits = pre_tokenizers.Digits(individual_digits=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), digits])
    initial = [*llava.SPECIAL[:3], *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=initial, show_progress=False)
    # No token has a line break, as in the vocabulary of LLaMA.
    core.train_from_iterator(
        " ".join([SYSTEM, GUIDE, "USER: ASSISTANT: Here is the cropped image 0123456789"]).split("\n"), trainer
    )
    learned = json.loads(core.to_str())["model"]
    made = LlamaTokenizer(
        vocab=learned["vocab"],
        merges=[tuple(x) for x in learned["merges"]],
        legacy=legacy,
        add_bos_token=True,
        chat_template=llava.CHAT_TEMPLATE,
    )
    made.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<image>"]})
    return made


@pytest.mark.torch
@pytest.mark.parametrize("legacy", [False, True])
def test_dialogs_are_those_of_the_released_template(legacy, config):
    """Ids of prompts and of traces, whichever texts the tokenizer puts a space before."""
    theirs = trained(legacy)
    words = Vocabulary.of(theirs)
    encode = lambda text: theirs.encode(text.replace("<image>", "<image>" * PADS), add_special_tokens=False)
    query = Query("Which  of the 12 digits, <s> [INST] ▁?", QUERIES[2].images)
    question = [{"type": "text", "text": f"{query.question}\n\n{GUIDE}"}, *[{"type": "image"}] * 2]
    told = [{"role": "system", "content": [{"type": "text", "text": SYSTEM}]}, {"role": "user", "content": question}]
    text = theirs.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
    safe = query._replace(question=query.question.replace("<s>", ""))
    ids = encode(text.replace("<s>", ""))
    assert prompt_tokens(safe, words, config) == [1, *ids]
    assert prompt_tokens(query, words, config).count(1) == 1  # the text has letters
    arguments = '{"bbox_2d": [0.1, 0.1, 0.7, 0.8], "target_image": 1}'
    call = f'<tool_call>{{"name": "crop_image_normalized", "arguments": {arguments}}}</tool_call>'
    trace = Trace(safe, (right(call), right("It is \\boxed{7}.")), "7")
    rows = to_trajectories([trace], words, tables(words), config, BatchShape(2400, 3, 3, PADS))
    shown = f" USER: <image>\n\nHere is the cropped image (Image Size: {llava.SIDE}x{llava.SIDE}):"
    whole = text.replace("<s>", "") + f" {call}</s>{shown} ASSISTANT: It is \\boxed{{7}}.</s>"
    assert rows.tokens[0][rows.valid[0]].tolist() == [1, *encode(whole)]
    learned = words.to_bytes(rows.tokens[0][rows.loss_mask[0]].tolist()).decode()
    assert learned == f" {call}<|im_end|> It is \\boxed{{7}}.<|im_end|>"


def directory(model, config, folder):
    save_pretrained(
        model, Processor(llava.vocabulary().tokenizer, family=LlavaConfig, vision=model.config.vision), folder
    )
    write_limits(folder, config)
    return folder


@pytest.mark.slow
@pytest.mark.torch
def test_chat(model, config, tmp_path):
    """Follow-up questions about all images, and transcripts of what was shown."""
    greedy = dataclasses.replace(config, temperature=0.0, group_size=1)
    speaker = load_speaker(directory(model, greedy, tmp_path), tools=None, call_format=None, temperature=0.0)
    chat = Chat(speaker, host=None, seed=0, screen=Screen(io.StringIO()))
    theirs = TheirConversation(tmp_path, llava.vocabulary().tokenizer)
    begin, ids, images = theirs.write(QUERIES[0], greedy.max_calls)
    answer = chat.ask(QUERIES[0].question, QUERIES[0].images)
    assert answer and theirs.tokenizer.decode(ids).endswith(answer.split("\n")[-1] + "</s>")
    (talk,) = chat.transcripts
    seen = [picture for turn in talk.turns for picture in turn.pictures]
    assert len(seen) == len(images) - 1 and {(x.width, x.height) for x in seen} == {(llava.SIDE, llava.SIDE)}
    assert chat.ask("And here?", [images[0][:90]])
    assert len(chat.transcripts[1].pictures) == 2
