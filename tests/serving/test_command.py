"""`pixel-jax serve DIR` as a person starts it: asked by OpenAI's client, told to end by SIGTERM."""

import base64
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import openai
import pytest
from PIL import Image

from pixel_jax import save_adapter
from pixel_jax.models.io import save_pretrained
from pixel_jax.models.lora import add_lora, merge_lora
from pixel_jax.models.processor import Processor
from tests.rollouts import scripted_model

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def directory(tmp_path):
    """A talker, with limits that fit the flags of `serving`."""
    save(scripted_model.model(), tmp_path / "talker")
    return tmp_path / "talker"


def save(model, directory):
    save_pretrained(model, Processor(scripted_model.vocabulary().tokenizer), directory)
    limits = dataclasses.replace(scripted_model.CONFIG, max_response=256, observe_chunk=1)
    (directory / "rollout.json").write_text(json.dumps(dataclasses.asdict(limits)))


@contextlib.contextmanager
def serving(*arguments, **environment):
    """A server that answers one request of a model at a time: its process, and the line that it prints when it is ready."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pixel_jax.cli import main; main()"
    small = ("--port=0", "--slots=1", "--prompt_tokens=256", "--images=1", "--image_side=192", "--budget=1")
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", *map(str, arguments), *small],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, next((line for line in process.stdout if " at http://" in line), "")
    finally:
        process.kill()
        process.communicate()


def client_of(line):
    return openai.OpenAI(base_url=line.split(" at ")[1].split(",")[0], api_key="secret", max_retries=0)


def question(model):
    """A request about a picture, greedily answered."""
    file = io.BytesIO()
    Image.fromarray(scripted_model.image(1, 120, 150)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Which digit?"}]
    return {"model": model, "messages": [{"role": "user", "content": parts}], "temperature": 0}


def test_serve(directory):
    """What runs when it is told to end is answered to its end; then it goes, and says so."""
    with serving(f"again={directory}", PIXEL_JAX_API_KEY="secret") as (process, line):
        assert line.startswith("'again' at http://127.0.0.1:") and "with an API key" in line
        client, asked = client_of(line), question("again")
        whole = client.chat.completions.create(**asked)
        assert "crop_image_normalized" in whole.choices[0].message.content
        stream = client.chat.completions.create(**asked, stream=True)
        first = next(stream)
        process.send_signal(signal.SIGTERM)
        text = (first.choices[0].delta.content or "") + "".join(x.choices[0].delta.content or "" for x in stream)
        assert text == whole.choices[0].message.content
        out, error = process.communicate(timeout=60)
        assert process.returncode == 0 and "All requests are answered." in out and "Traceback" not in error


@pytest.mark.slow
def test_adapters_by_name(directory, tmp_path):
    """Each is a model on the weights of the first, and says what the merged model says."""
    base = scripted_model.model()
    adapted = add_lora(base, jax.random.key(0), rank=1, alpha=64.0, targets="lm_head")
    for number in range(2):
        adapted.lm_head.lora_b[...] = jax.random.normal(jax.random.key(number), adapted.lm_head.lora_b.shape)
        save_adapter(adapted, tmp_path / f"adapter{number}")
        save(merge_lora(adapted), tmp_path / f"merged{number}")
    merged = [tmp_path / f"merged{number}" for number in range(2)]
    adapters = f"--adapter=one={tmp_path / 'adapter0'},{tmp_path / 'adapter1'}"
    with serving(directory, *merged, adapters) as (_, line):
        client = client_of(line)
        names = [model.id for model in client.models.list()]
        assert names == ["talker", "merged0", "merged1", "one", "adapter1"]
        said = {
            x: client.chat.completions.create(**question(x), max_tokens=24).choices[0].message.content for x in names
        }
    assert said["one"] == said["merged0"] and said["adapter1"] == said["merged1"]
    assert len({said["talker"], said["merged0"], said["merged1"]}) == 3
