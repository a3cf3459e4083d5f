"""Every family in every command: a tiny model of it, with the chat template that it is published with, is tuned, learns, is
evaluated, chats, is planned for, is checked, serves, and forgets."""

import base64
import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient
from tokenizers import AddedToken

from pixel_jax.dialog import observations, template
from pixel_jax.dialog.formats import MARKS, call_format
from pixel_jax.dialog.tokenizer import Vocabulary, build_tokenizer
from pixel_jax.evaluation.transcript import load as load_transcripts
from pixel_jax.models import config_from_hf
from pixel_jax.models.io import save_pretrained
from pixel_jax.models.processor import Processor
from pixel_jax.rollouts.shapes import prompt_shape
from pixel_jax.run_record import RunRecord
from pixel_jax.serving.app import make_app
from pixel_jax.serving.engine import Engine
from pixel_jax.serving.metrics import Metrics
from pixel_jax.serving.session import Session
from pixel_jax.serving.speakers import load_speaker
from pixel_jax.tools import RELEASED
from pixel_jax.training.writers import read_metrics
from tests.dialog.published_templates import LLAMA2, LLAMA3, QWEN2, QWEN2_5, QWEN3
from tests.dialog.spaced import spaced
from tests.rollouts import llava, scripted_model
from tests.rollouts.test_rollout_of_families import PIXELS, TEXT, llama, qwen2_vl, qwen3_5, qwen3_vl, visible
from unlearn_jax.requests.log import LOG, verify

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parent.parent
ANSWERS = {"\\boxed{7}": 0.35, "\\boxed{3}": 0.15}
END, START = scripted_model.END, scripted_model.START
CROP = '\n{"name": "crop_image_normalized", "arguments": {"bbox_2d": [0.10, 0.11, 0.71, 0.82], "target_image": 1}}\n'
SELECT = '\n{"name": "select_frames", "arguments": {"target_frames": [1, 2]}}\n'
TAGGED = (
    "\n<function=image_zoom_in_tool>\n<parameter=bbox_2d>\n[100, 110, 710, 820]\n</parameter>\n<parameter=label>\nsign\n"
    "</parameter>\n<parameter=img_idx>\n0\n</parameter>\n</function>\n"
)
# Qwen3.5, without the branches for tools; an answer begins within <think>.
QWEN3_5 = """{%- macro render_content(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for item in content %}
            {%- if item.type == 'image' or 'image' in item %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif item.type == 'video' or 'video' in item %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- else %}
                {{- item.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages if message.role == 'user' %}
    {%- set ns.last = messages.index(message) %}
{%- endfor %}
{%- if ns.last < 0 %}
    {{- raise_exception('No user query found in messages.') }}
{%- endif %}
{%- for message in messages %}
    {%- set content = render_content(message.content) | trim %}
    {%- if message.role == 'system' and not loop.first %}
        {{- raise_exception('System message must be at the beginning.') }}
    {%- elif message.role == 'assistant' %}
        {%- set thoughts = '' %}
        {%- if '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].split('<think>')[-1] | trim %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {%- set content = '<think>\\n' + thoughts + '\\n</think>\\n\\n' + content %}
        {%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- else %}
        {{- '<think>\\n' }}
    {%- endif %}
{%- endif %}"""


def chain_of(start: str, *calls: str) -> dict[str, dict[str, float]]:
    """A scripted model that calls or answers where a turn begins."""
    if not calls:
        return {start: ANSWERS, **dict.fromkeys(ANSWERS, {END: 1.0})}
    chain = {start: {"<tool_call>": 0.5, **ANSWERS}, "<tool_call>": dict.fromkeys(calls, 1 / len(calls))}
    return {
        **chain,
        **dict.fromkeys(calls, {"</tool_call>": 1.0}),
        **dict.fromkeys(["</tool_call>", *ANSWERS], {END: 1.0}),
    }


def chatml(written: str, chain: Mapping, calls: str = "pixel_reasoner", *, sees: bool = True):
    """A tokenizer of Qwen's kind, in which tags of calls and thoughts are tokens that are no special ones."""
    tags = ["<think>", "</think>", *sorted(MARKS)]
    known = call_format(calls)
    texts = ["system\n", "user\n", "assistant\n", template.GUIDELINES["vcot"], *chain]
    texts.append(template.system_prompt(RELEASED if sees else (), known))
    for kind in observations.kinds_of(RELEASED, known):
        texts += scripted_model.stretches(kind.outcome.text)
    parts = [part for text in texts for part in re.split("|".join(map(re.escape, (*tags, END))), text)]
    made = build_tokenizer(sorted({part for part in parts if len(part) > 1}))
    made.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in tags])
    made.chat_template = written
    return made


def qwen2(words, size, hidden):
    text = {name: value for name, value in TEXT.items() if name != "head_dim"}
    return config_from_hf({"model_type": "qwen2", **text, "vocab_size": size, "hidden_size": hidden})


def qwen3(words, size, hidden):
    return config_from_hf({"model_type": "qwen3", **TEXT, "vocab_size": size, "hidden_size": hidden})


class Family(NamedTuple):
    """What a tiny model of a family is made of."""

    config: Callable  # of a vocabulary, its size and a width
    tokenizer: Callable
    chain: Mapping  # what it says
    call: str | None = None  # that its traces have; None: none
    videos: bool = False
    calls: str = "pixel_reasoner"  # format of its calls


SEES = chain_of(START, CROP, SELECT)
THINKS = chain_of("\n", TAGGED)
BLIND = chain_of(START)
TOLD = f"<tool_call>{CROP}</tool_call>"


def of_qwen(config, written, **more):
    return Family(config, functools.partial(chatml, written, SEES), SEES, TOLD, videos=True, **more)


def of_text(config, written):
    return Family(config, functools.partial(chatml, written, BLIND, sees=False), BLIND)


FAMILIES = {
    "llava": Family(llava.config, lambda: llava.vocabulary().tokenizer, llava.CHAIN, TOLD),
    "qwen3_vl": of_qwen(qwen3_vl, QWEN2_5),
    "qwen3_5": Family(
        qwen3_5, functools.partial(chatml, QWEN3_5, THINKS, "qwen3_5"), THINKS,
        f"I look.\n</think>\n\n<tool_call>{TAGGED}</tool_call>", videos=True, calls="qwen3_5",
    ),
    "llama2": Family(llama, lambda: spaced("normalizer", LLAMA2), {}),
    "qwen2_5_vl": of_qwen(scripted_model.qwen2_5_vl, QWEN2_5),
    "qwen2_vl": of_qwen(qwen2_vl, QWEN2_5),
    "qwen2": of_text(qwen2, QWEN2),
    "qwen3": of_text(qwen3, QWEN3),
    "llama3": Family(llama, lambda: llama3_tokenizer(), {}),
}  # fmt: skip


def llama3_tokenizer():
    made = build_tokenizer(["user", "assistant", "system", template.GUIDELINES["vcot"]])
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    made.add_special_tokens(
        {"bos_token": special[0], "eos_token": special[3], "additional_special_tokens": special[1:3]}
    )
    made.chat_template = LLAMA3
    return made


CONFIG = """
import importlib.util
from ml_collections import ConfigDict

def get_config():
    spec = importlib.util.spec_from_file_location("own_data", {own_data!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("lora")
    limits = {limits!r}
    config.image_buffer, config.prompt_width = (1, 192, 192), 640
    config.video_buffer, config.video_prompt_width = (2, 64, 64), 640
    config.trace_tokens, config.trace_frames, config.trace_patches, config.buckets = 896, 3, 16, ()
    config.video_frames, config.video_patches = 6, 8
    config.rollout = ConfigDict(limits)
    config.sft.steps, config.sft.batch_size, config.sft.forward.micro_batches = 2, 2, 1
    config.sft.replayable, config.sft.save_every = True, 1
    config.rl.iterations, config.rl.prompts, config.rl.train_batch, config.rl.forward.micro_batches = 1, 2, 4, 1
    config.rl.replay = {{"kind": "none"}}
    config.rl.rollout = ConfigDict({{**limits, "group_size": 2}})
    config.watch.share = 0.0
    return config
"""


class Made(NamedTuple):
    """A model, what it is tuned on, and how."""

    family: Family
    folder: pathlib.Path
    model: pathlib.Path
    data: pathlib.Path
    config: pathlib.Path

    @property
    def sees(self):
        return self.family.call is not None

    @property
    def shown(self):
        return [self.folder / "a.png"] * self.sees

    def run(self, program, *arguments, devices=1):
        """What a command printed, in a process of its own."""
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from {program}.cli import main; main()"
        flags = re.sub(r"(device_count=)\d+", rf"\g<1>{devices}", os.environ["XLA_FLAGS"])  # which compile fast
        found = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], cwd=self.folder, env=os.environ | {"XLA_FLAGS": flags},
            capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert found.returncode == 0, f"{' '.join(map(str, arguments))}\n{found.stdout}\n{found.stderr}"
        return found.stdout

    def train(self, phase, *more):
        places = {"model": self.model, "data": self.data, "out": self.folder / phase, "mesh": "{}"}
        flags = [f"--config.{name}={value}" for name, value in places.items()]
        self.run("pixel_jax", phase, f"--config={self.config}", *flags, *more)
        return self.folder / phase


def make(name, folder) -> Made:
    family = FAMILIES[name]
    words = Vocabulary.of(family.tokenizer())
    model = visible(scripted_model.network(words, family.chain, make_config=family.config))
    vision = model.config.vision
    processor = Processor(
        words.tokenizer, family=type(model.config), vision=vision, min_pixels=1024, max_pixels=4 * 1024
    )
    save_pretrained(model, processor, folder / "model")
    limits = dataclasses.replace(
        scripted_model.CONFIG, **PIXELS, max_response=256, max_calls=1, observe_chunk=2, call_format=family.calls
    ).for_model(model.config)
    (folder / "model" / "rollout.json").write_text(json.dumps(dataclasses.asdict(limits)))
    known = {key: value for key, value in dataclasses.asdict(limits).items() if value is not None}
    (folder / "config.py").write_text(CONFIG.format(own_data=str(ROOT / "configs/pixel/own_data.py"), limits=known))
    for picture, size in (("a", (120, 150)), ("b", (110, 130)), ("0", (100, 100)), ("1", (100, 100))):
        Image.fromarray(scripted_model.image(ord(picture), *size)).save(folder / f"{picture}.png")
    row = {"question": "Which digit?", "answer": "7", "turns": ["\\boxed{7}"]}
    rows = [row, row | {"question": "Which digit is it?"}, row | {"turns": ["\\boxed{3}"]}, row | {"answer": "3"}]
    if vision is not None:
        rows = [x | {"images": [f"{'ab'[i % 2]}.png"]} for i, x in enumerate(rows)]
        rows[0]["turns"] = [family.call, "\\boxed{7}"]
    if family.videos:
        rows += [row | {"images": ["0.png", "1.png"], "video": True}] * 2
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(x | {"id": f"t{i}"}) + "\n" for i, x in enumerate(rows)))
    return Made(family, folder, folder / "model", data, folder / "config.py")


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    return make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def tuned(made):
    """The directory of a run of `pixel-jax sft` on adapters."""
    return made.train("sft")


def test_sft(made, tuned):
    metrics = read_metrics(tuned / "sft" / "metrics.jsonl")
    assert len(metrics) == 2 and all(np.isfinite(x["loss"]) and x["grad_norm"] > 0 for x in metrics)
    assert (tuned / "model" / "adapter" / "adapter_model.safetensors").exists()
    assert len(RunRecord.read(tuned / "sft").examples) == len(made.data.read_text().splitlines())


def test_rl(made, tuned):
    out = made.train("rl", f"--adapter={tuned / 'model' / 'adapter'}")
    (metrics,) = read_metrics(out / "rl" / "metrics.jsonl")
    assert metrics["updates"] == 1 and np.isfinite(metrics["loss"]) and 0 <= metrics["accuracy"] <= 1
    assert (out / "model" / "adapter" / "adapter_model.safetensors").exists()


def test_eval(made, tuned):
    flags = {
        "model": made.model,
        "out": made.folder / "eval",
        "mesh": "{}",
        "batch": 2,
        "benchmarks.own.data": made.data,
    }
    limits = json.loads((made.model / "rollout.json").read_text())
    chosen = {
        "rollout." + x: limits[x] for x in (*PIXELS, "max_response", "max_new_tokens", "max_calls", "call_format")
    }
    settings = [f"--config.{key}={value}" for key, value in (flags | chosen).items()]
    made.run("pixel_jax", "eval", "--config=pixel/eval", *settings, f"--adapter={tuned / 'model' / 'adapter'}")
    found = [json.loads(x) for x in next((made.folder / "eval").rglob("*.jsonl")).read_text().splitlines()]
    assert len(found) >= len(made.data.read_text().splitlines())


def test_chat(made, tuned):
    """About a video where the family has them."""
    adapter = f"--adapter={tuned / 'model' / 'adapter'}"
    frames = [*(made.folder / f"{i}.png" for i in range(2)), "--video"] if made.family.videos else made.shown
    flags = ("--question=Which digit?", "--json=chat.json", adapter)
    out = made.run("pixel_jax", "chat", made.model, *frames, *flags)
    (talk,) = load_transcripts(made.folder / "chat.json")
    assert "question  Which digit?" in out and talk.turns and bool(talk.pictures) == made.sees


def test_plan(made):
    places = {"model": made.model, "data": made.data, "out": "none", "mesh": '{"data": 2}'}
    flags = [f"--config.{name}={value}" for name, value in places.items()]
    steps = ("--topology=cpu:2", "--configured", "--config.rl.old_logprobs=recomputed", "--json=plan.json")
    made.run("pixel_jax", "plan", f"--config={made.config}", *flags, *steps, devices=8)
    found = json.loads((made.folder / "plan.json").read_text())
    assert found["best"]["cpu:2"].keys() == {"sft", "rollout", "score", "update"}
    assert all(x["flops_per_chip"] > 0 and x["fits"] for x in found["plans"])


def test_check(made):
    flags = (f"--config={made.config}", "--config.mesh={}")
    out = made.run("pixel_jax", "check", made.model, f"--data={made.data}", *flags)
    assert "All is well" in out and "update" in out


def test_serve(made):
    speaker = load_speaker(made.model, tools=None, call_format=None, temperature=0.0)
    shape = prompt_shape(1, 192, 192, 640, speaker.config, video=False)
    engine = Engine({"tiny": Session(speaker, shape, slots=1)}, limit=4, budget=8, metrics=Metrics())
    client = TestClient(make_app(engine, {"tiny": speaker}, hosts=(), key=None, body_bytes=1 << 20), "http://127.0.0.1")
    parts = [{"type": "text", "text": "Which digit?"}]
    for path in made.shown:
        url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    engine.start()
    try:
        body = {"model": "tiny", "messages": [{"role": "user", "content": parts}]}
        found = client.post("/v1/chat/completions", json=body)
    finally:
        engine.close()
        engine.join(60)
    assert found.status_code == 200, found.text
    assert found.json()["usage"]["completion_tokens"] > 0 and engine.failed is None


def test_erase(made, tuned):
    request = {"id": "t1", "kind": "remove", "reason": "consent withdrawn", "who": "A. Person", "when": "2026-11-30"}
    (made.folder / "requests.jsonl").write_text(json.dumps(request))
    made.run("unlearn_jax", "erase", f"--run={tuned}", "--request=requests.jsonl")
    entries, faults = verify(tuned / "edits" / LOG)
    assert len(entries) == 1 and not faults
