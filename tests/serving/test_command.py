"""`pixel-jax serve DIR` as a person starts it: asked by OpenAI's client, told to end by SIGTERM."""

import base64
import dataclasses
import io
import json
import os
import pathlib
import signal
import subprocess
import sys

import openai
from PIL import Image

from pixel_jax.models.io import save_pretrained
from pixel_jax.models.processor import Processor
from tests.rollouts import scripted_model

ROOT = pathlib.Path(__file__).parents[2]


def test_serve(tmp_path):
    """What runs when it is told to end is answered to its end; then it goes, and says so."""
    directory = tmp_path / "talker"
    save_pretrained(scripted_model.model(), Processor(scripted_model.vocabulary().tokenizer), directory)
    limits = dataclasses.replace(scripted_model.CONFIG, max_response=256, observe_chunk=1)
    (directory / "rollout.json").write_text(json.dumps(dataclasses.asdict(limits)))
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pixel_jax.cli import main; main()"
    small = ("--port=0", "--slots=1", "--prompt_tokens=256", "--images=1", "--image_side=192", "--budget=1")
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", f"again={directory}", *small],
        env=os.environ | {"PIXEL_JAX_API_KEY": "secret"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if " at http://" in line), "")
        assert line.startswith("'again' at http://127.0.0.1:") and "with an API key" in line
        client = openai.OpenAI(base_url=line.split(" at ")[1].split(",")[0], api_key="secret", max_retries=0)
        file = io.BytesIO()
        Image.fromarray(scripted_model.image(1, 120, 150)).save(file, "PNG")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Which digit?"}]
        asked = {"model": "again", "messages": [{"role": "user", "content": parts}], "temperature": 0}
        whole = client.chat.completions.create(**asked)
        assert "crop_image_normalized" in whole.choices[0].message.content
        stream = client.chat.completions.create(**asked, stream=True)
        first = next(stream)
        process.send_signal(signal.SIGTERM)
        text = (first.choices[0].delta.content or "") + "".join(x.choices[0].delta.content or "" for x in stream)
        assert text == whole.choices[0].message.content
        out, error = process.communicate(timeout=60)
        assert process.returncode == 0 and "All requests are answered." in out and "Traceback" not in error
    finally:
        process.kill()
        process.communicate()
