"""Language models are talked to and tuned as models that see are: tiny Llamas, in ChatML and in the layouts of Llama 2 and 3."""

import dataclasses
import importlib.util
import io
import json

import jax
import numpy as np
import pytest
from test_gguf_files import write

from pixel_jax import phases
from pixel_jax.chat import Chat, Screen
from pixel_jax.data.example import ExampleError
from pixel_jax.dialog import Observations, Vocabulary
from pixel_jax.dialog.grammar import parse_turn
from pixel_jax.dialog.observations import observation_text
from pixel_jax.dialog.template import ABSENT, GUIDELINES
from pixel_jax.dialog.tokenizer import byte_alphabet
from pixel_jax.evaluation import main as evaluation
from pixel_jax.evaluation.config import BenchmarkConfig, EvalConfig
from pixel_jax.files import FileError
from pixel_jax.models import LanguageModel, config_from_hf
from pixel_jax.models.io import save_pretrained
from pixel_jax.models.processor import Processor
from pixel_jax.models.text_families import LlamaConfig
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.limits import read_limits, write_limits
from pixel_jax.serving.conversation import ChatMessage, prompt_of
from pixel_jax.serving.speakers import load_speaker
from pixel_jax.train_config import TrainConfig
from pixel_jax.training.optimizer import OptimizerConfig
from pixel_jax.training.rl import RLConfig
from pixel_jax.training.sft import SFTConfig
from pixel_jax.training.writers import read_metrics
from tests.dialog.published_templates import LLAMA2
from tests.dialog.spaced import spaced

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # in SmolLM2's order
# SmolLM2's own template.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a "
    "helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"]
# Llama 3's own template.
TEMPLATE3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Llama 2's, of which the tokenizer is one of SentencePiece.
KINDS = {"chatml": (CHATML, TEMPLATE), "llama3": (LLAMA3, TEMPLATE3), "llama2": (["<s>", "</s>"], LLAMA2)}
LIMITS = RolloutConfig(max_new_tokens=12, max_tokens=1024, max_response=64, max_calls=1)
SHAPE = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}


def make_tokenizer(special=CHATML, template=TEMPLATE):
    """The bytes and `special` tokens, with none for images and videos."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbers = {token: i for i, token in enumerate([*special, *byte_alphabet()])}
    tokenizer = Tokenizer(models.BPE(numbers, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    named = {"bos_token": special[0], "eos_token": special[-1], "pad_token": special[-1]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **named)


def tokenizer_of(kind):
    return spaced("normalizer") if kind == "llama2" else make_tokenizer(*KINDS[kind])


def save(kind, folder):
    """A tiny Llama that is talked to in a layout."""
    tokenizer = tokenizer_of(kind)
    config = config_from_hf(SHAPE | {"vocab_size": len(tokenizer)})
    model = LanguageModel(config, jax.random.key(3))
    save_pretrained(model, Processor(tokenizer, family=LlamaConfig, vision=None), folder)
    write_limits(folder, LIMITS)
    return model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save("chatml", folder)
    return folder


def answers(path, question):
    """What `pixel-jax chat` says, and the speaker."""
    speaker = load_speaker(path, tools=None, call_format=None, temperature=0.0)
    return Chat(speaker, host=None, seed=0, screen=Screen(io.StringIO())).ask(question), speaker


def test_a_tokenizer_without_tokens_of_images():
    words = Vocabulary.of(make_tokenizer())
    assert (words.end_of_text, words.im_start, words.im_end) == (0, 1, 2)
    assert {words.vision_start, words.vision_end, words.image_pad, words.video_pad} == {ABSENT}
    assert words.structure == {0, 1, 2}
    assert words.to_bytes(words.encode("<|im_end|> 7")) == b"<|im_end|> 7"
    with pytest.raises(ValueError, match=r"the tokenizer has no special token <\|im_start\|>; put one that"):
        Vocabulary.of(make_tokenizer(["<|begin_of_text|>", "<|eot_id|>", "<|endoftext|>"]))


def test_the_layout_of_llama_3():
    """Observations have its marks; for parsers, rewards and transcripts a turn ends as in ChatML."""
    tokenizer = make_tokenizer(LLAMA3, TEMPLATE3)
    words = Vocabulary.of(tokenizer)
    assert [words.special[x] for x in LLAMA3[:3]] == [0, 1, 2] and [words.im_end, words.end_of_text] == [3, 4]
    assert words.structure == {0, 1, 2, 3, 4} and words.image_pad == ABSENT
    assert not words.structure & set(words.encode("".join(LLAMA3)))
    observations = Observations.of(words)
    text = observations.kinds[observations.malformed].outcome.text
    ids = observations.ids(observations.malformed)
    opening = "<|start_header_id|>{}<|end_header_id|>\n\n"
    written = opening.format("user") + text + "<|eot_id|>" + opening.format("assistant")
    assert ids == tokenizer.encode(written, add_special_tokens=False)
    assert observation_text(np.array(ids), words) == text.strip("\n")
    assert observations.text(observations.malformed).encode() == words.to_bytes(ids)
    assert words.to_bytes([words.im_end]) == b"<|im_end|>"
    call = '<tool_call>{"name": "select_frames", "arguments": {"target_frames": [1]}}</tool_call>'
    assert parse_turn(words.to_bytes([*words.encode(call), words.im_end])).call is not None


@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_is_what_transformers_generates(kind, tmp_path):
    import torch
    from transformers import LlamaForCausalLM

    save(kind, tmp_path)
    question = "Wie viele Beine hat eine Katze?"
    answer, speaker = answers(tmp_path, question)
    words = speaker.vocabulary
    ids = prompt_of([ChatMessage("user", (question,))], speaker).ids
    told = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": f"{question}\n\n{GUIDELINES['notool']}"},
    ]
    theirs = tokenizer_of(kind).apply_chat_template(told, add_generation_prompt=True)["input_ids"]
    assert ids == theirs  # nothing is said of images, or of tools that look at them
    network = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    options: dict = {"eos_token_id": [words.im_end, words.end_of_text], "pad_token_id": 0, "min_new_tokens": 1}
    given = torch.tensor([ids])
    options["attention_mask"] = torch.ones_like(given)  # Llama 3's first token is the one that pads here
    with torch.no_grad():
        out = network.generate(given, do_sample=False, max_new_tokens=LIMITS.max_new_tokens, **options)
    written = [x for x in out[0, len(ids) :].tolist() if x not in options["eos_token_id"]]
    said = words.to_bytes(written).decode("utf-8", "replace").removeprefix(words.layout.lead)
    assert len(written) > 3 and answer == said


def tuned(path, out, monkeypatch):
    """One step of `pixel-jax sft` on questions without images: its metrics."""
    monkeypatch.setattr(phases, "use_compilation_cache", lambda _: None)
    lines = [{"question": f"{a} + {a}?", "answer": str(2 * a), "turns": [f"\\boxed{{{2 * a}}}"]} for a in range(4)]
    lines += [{"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "\\boxed{1}"}]}]
    (out / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tuning = SFTConfig(steps=1, batch_size=2, optimizer=OptimizerConfig(learning_rate=1e-2, warmup=0.0))
    tuning = dataclasses.replace(tuning, trainable=".*")
    phases.train("sft", TrainConfig(str(path), str(out / "data.jsonl"), str(out / "run"), sft=tuning, rollout=LIMITS))
    (found,) = read_metrics(out / "run" / "sft" / "metrics.jsonl")
    return found


def test_a_step_of_tuning_in_llama_2_s_layout(tmp_path, monkeypatch):
    save("llama2", tmp_path)
    found = tuned(tmp_path, tmp_path, monkeypatch)
    assert np.isfinite(found["loss"]) and found["grad_norm"] > 0
    assert answers(tmp_path / "run" / "model", "Hm?")[0] != ""


def test_a_step_of_tuning(directory, tmp_path, monkeypatch):
    with pytest.raises(ExampleError, match="nowhere.jsonl is not a file or directory"):
        phases.train("sft", TrainConfig(str(directory), "nowhere.jsonl", str(tmp_path / "none"), sft=SFTConfig()))
    found = tuned(directory, tmp_path, monkeypatch)
    assert np.isfinite(found["loss"]) and found["grad_norm"] > 0
    limits = read_limits(tmp_path / "run" / "model")
    assert limits is not None and limits.max_images == 0
    weights = [x / "model.safetensors" for x in (directory, tmp_path / "run" / "model")]
    assert weights[0].read_bytes() != weights[1].read_bytes()


@pytest.mark.slow
def test_learning_and_evaluation(directory, tmp_path, monkeypatch):
    """`pixel-jax rl` and `eval`, whose questions have no images, with tools and without."""
    monkeypatch.setattr(phases, "use_compilation_cache", lambda _: None)
    monkeypatch.setattr("pixel_jax.training.progress.use_compilation_cache", lambda _: None)
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"question": f"{a} + {a}?", "answer": str(2 * a)}) for a in range(4)))
    learning = RLConfig(iterations=1, prompts=2, train_batch=4, rollout=dataclasses.replace(LIMITS, group_size=2))
    learning = dataclasses.replace(learning, replay=dataclasses.replace(learning.replay, kind="none"))
    phases.train("rl", TrainConfig(str(directory), str(data), str(tmp_path / "rl"), rl=learning))
    (found,) = read_metrics(tmp_path / "rl" / "rl" / "metrics.jsonl")
    assert np.isfinite(found["loss"])
    limits = read_limits(tmp_path / "rl" / "model")
    assert limits is not None
    asked = BenchmarkConfig(format="jsonl", data=str(data))
    config = EvalConfig(
        model=str(tmp_path / "rl" / "model"), out=str(tmp_path / "eval"), benchmarks={"sums": asked}, rollout=limits
    )
    evaluation.answer(dataclasses.replace(config, modes=("operations", "none"), batch=2))
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["benchmarks"]["sums"]["modes"].keys() == {"operations", "none"}


def gguf_file(path, model):
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*CHATML, *byte_alphabet()],
        "tokenizer.ggml.token_type": [3] * len(CHATML) + [1] * 256,
        "tokenizer.chat_template": TEMPLATE,
    }
    return write(path, "llama", model, lambda own, _: own.update(fields))


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="pip install gguf")
def test_a_gguf_file_is_a_model(tmp_path, monkeypatch):
    """Chat and tuning take its path; the limits lie beside it."""
    directory = tmp_path / "directory"
    path = gguf_file(tmp_path / "tiny.gguf", save("chatml", directory))
    write_limits(tmp_path, LIMITS)
    answer, speaker = answers(path, "Hm?")
    assert speaker.config.max_new_tokens == LIMITS.max_new_tokens and answer == answers(directory, "Hm?")[0]
    out = tmp_path / "out"
    out.mkdir()
    found = tuned(path, out, monkeypatch)
    assert found["loss"] == pytest.approx(tuned(directory, tmp_path, monkeypatch)["loss"], rel=1e-3)  # some are float16
    assert answers(out / "run" / "model", "Hm?")[0] != ""
    with pytest.raises((FileError, FileNotFoundError), match="none.gguf"):
        load_speaker(tmp_path / "none.gguf", tools=None, call_format=None)
