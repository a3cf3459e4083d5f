"""Tools of the user's own that run on the host, called by a model behind the server and in a chat: `docs/your-own-tool.md`."""

import asyncio
import base64
import dataclasses
import io
import re

import jax
import numpy as np
import openai
import pytest
from PIL import Image

from pixel_jax.chat import Chat, Screen
from pixel_jax.config import load
from pixel_jax.evaluation.transcript import Transcript
from pixel_jax.ops import host_crop_resize
from pixel_jax.rollouts.prompts import tables
from pixel_jax.serving import main
from pixel_jax.serving.conversation import Speaker
from pixel_jax.tools.host import HostTools, HostToolsConfig
from pixel_jax.tools.named import find_tools
from tests.rollouts import scripted_model
from tests.rollouts.scripted_model import END, START
from tests.serving.conftest import CONFIG as USUAL
from tests.serving.test_server import IMAGES, Running, ask

CODE = """
import time

from PIL import Image, ImageOps

from pixel_jax import Tool
from pixel_jax.tools import Integer, Text


def measure(images, word):
    if word == "broken":
        raise KeyError("no such word")
    if word == "slow":
        time.sleep(600)
    height, width, _ = images[0].shape
    return f"{word}: {width}x{height}, first pixel {images[0][0, 0].tolist()}"


def mirror(images, image):
    return "Here it is:", ImageOps.mirror(Image.fromarray(images[image - 1]))


MEASURE = Tool("measure", "Measures.", (Text("word"),), execute=measure, host=True)
MIRROR = Tool("mirror", "Mirrors.", (Integer("image"),), execute=mirror, host=True, picture=True)
"""
pytestmark = pytest.mark.slow  # a minute of compiling
NAMES = ("my_host_tools:MEASURE", "my_host_tools:MIRROR")
CALL = '<tool_call>\n{"name": "%s", "arguments": {%s}}\n</tool_call>'
GOOD, BROKEN, SLOW = (CALL % ("measure", f'"word": "{word}"') for word in ("good", "broken", "slow"))
MIRRORED = CALL % ("mirror", '"image": 1')
AFTER = {GOOD: 0.4, BROKEN: 0.15, SLOW: 0.05, MIRRORED: 0.2, "\\boxed{7}": 0.2}
CHAIN = {START: AFTER, **{text: {END: 1.0} for text in AFTER}}
CONFIG = dataclasses.replace(USUAL, max_calls=2, temperature=1.0)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A speaker with the two tools, and their workers, which import them from the current directory."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "my_host_tools.py").write_text(CODE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tools = find_tools(NAMES)
        words = scripted_model.vocabulary_of(CHAIN, tools)
        speaker = Speaker(scripted_model.network(words, CHAIN), words, tables(words, tools), CONFIG, "vcot")
        with HostTools(NAMES, HostToolsConfig(workers=2, seconds=2.0)) as host:
            yield speaker, host


@pytest.fixture(scope="module")
def server(served):
    signals, (speaker, host) = main.SIGNALS, served
    running = Running(speaker, host=host)
    yield running
    running.stop()
    assert running.engine.failed is None
    main.SIGNALS = signals


def tools_of(turns):
    return [turn for turn in turns if turn["role"] == "tool"]


def check(turn, image):
    """What a tool said is about the request's own image; an error names its kind."""
    height, width, _ = image.shape
    if found := re.search(r"good: (\d+)x(\d+), first pixel (\[.*\])", turn["text"]):
        assert found.groups() == (str(width), str(height), str(image[0, 0].tolist())) and not turn["failed"]
        return "good"
    if "Here it is:" in turn["text"]:
        assert not turn["failed"]
        return "mirrored"
    assert turn["failed"] and turn["text"].lstrip().startswith("Execution error:"), turn
    if "did not answer: KeyError: 'no such word'" in turn["text"]:
        return "broken"
    assert "`measure` did not answer: no answer within 2 seconds" in turn["text"], turn
    return "slow"


def test_many_at_a_time(server):
    """Each is told of its own image; an exception and a timeout are read by the model that asked, and all are answered."""

    async def all_of_them():
        async with server.client(openai.AsyncOpenAI) as client:
            asked = [ask(client, f"Which? ({i})", IMAGES[i % 6], temperature=1, seed=i) for i in range(24)]
            return await asyncio.gather(*asked)

    found = asyncio.run(all_of_them())
    kinds = set()
    for i, answer in enumerate(found):
        turns = answer.model_extra["pixel_jax"]["turns"]
        written = "\n".join(turn["text"] for turn in turns if turn["role"] == "assistant")
        assert written == answer.choices[0].message.content
        for call, turn in zip(
            re.findall(r'"word": "(\w+)"|"name": "(mirror)"', written), tools_of(turns), strict=False
        ):
            kind = check(turn, IMAGES[i % 6])
            assert kind == (call[0] or "mirrored")
            kinds.add(kind)
    assert kinds == {"good", "broken", "slow", "mirrored"}
    assert server.engine.counts() == {"tiny": (0, 0)}


def test_streams_tell_of_each_call(server):
    client = server.client()
    told = 0
    for seed in range(4):
        whole = ask(client, "Which?", IMAGES[seed], temperature=1, seed=seed)
        chunks = list(ask(client, "Which?", IMAGES[seed], temperature=1, seed=seed, stream=True))
        text = "".join(x.choices[0].delta.content or "" for x in chunks)
        turns = [x.model_extra["pixel_jax"]["turn"] for x in chunks if "turn" in x.model_extra.get("pixel_jax", {})]
        assert text == whole.choices[0].message.content
        assert turns == tools_of(whole.model_extra["pixel_jax"]["turns"])
        told += len(turns)
    assert told > 2


def test_pictures_that_a_tool_has_drawn_are_in_the_transcript(server):
    client = server.client()
    own = {"extra_body": {"pixel_jax": {"pictures": True}}, "temperature": 1}
    drawn = 0
    for seed in range(12):
        image = IMAGES[seed % 6]
        answer = ask(client, "Which?", image, seed=seed, **own)
        trace = load(Transcript, answer.model_extra["pixel_jax"]["transcript"], "transcript")
        pictures = [picture for turn in trace.turns for picture in turn.pictures]
        drawn += len(pictures)
        for picture in pictures:
            size = (picture.height, picture.width)
            expected = host_crop_resize(image[:, ::-1], (0, 0, image.shape[1], image.shape[0]), size)
            file = io.BytesIO(base64.b64decode(picture.uri.partition(",")[2]))
            np.testing.assert_array_equal(np.asarray(Image.open(file)), expected)
    assert drawn > 0


def test_chat(served):
    """The pictures that a tool drew are shown and kept, question after question."""
    speaker, host = served
    stream = io.StringIO()
    chat = Chat(speaker, host=host, seed=3, screen=Screen(stream))
    for number in range(4):
        chat.ask("Which?", [IMAGES[0]] if number == 0 else [])
        chat.messages = chat.messages[:2]  # the first question and its answer
    shown = stream.getvalue()
    assert len(chat.transcripts) == 4 and "good: 150x90" in shown
    turns = [turn for trace in chat.transcripts for turn in trace.turns if turn.role == "tool"]
    assert turns and all(jax.tree.leaves(turn.pictures) or "Here it is" not in turn.text for turn in turns)
    assert np.all([trace.pictures for trace in chat.transcripts])
