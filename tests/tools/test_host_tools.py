"""Tools of the host: concurrent, within their time, and what goes wrong is an answer."""

import time

import numpy as np
import pytest
from PIL import Image

from pixel_jax.config import ConfigError, load
from pixel_jax.evaluation.config import EvalConfig
from pixel_jax.settings import listing
from pixel_jax.tools import ToolError
from pixel_jax.tools.host import HostTools, HostToolsConfig, ToolReply, ToolRequest
from pixel_jax.tools.tool import ANSWERED, FAILED, TIMED_OUT
from pixel_jax.train_config import TrainConfig

TOOLS = """
import os, time
import numpy as np
from PIL import Image
from pixel_jax.tools import Integer, Number, Text, Tool


def measure(images, word, times=1):
    print("printed, not an answer")
    return f"{word * times}: {[int(image.sum()) for image in images]}"


def sleep(images, seconds):
    time.sleep(seconds)
    return f"slept {seconds}"


def broken(images, how):
    if how == "exit":
        os._exit(3)
    if how == "number":
        return 7
    raise ValueError(f"no {how} here")


def paint(images, how):
    made = 255 - images[0]
    return {
        "array": made,
        "both": ("Here it is.", made),
        "pillow": ("", Image.fromarray(made).convert("RGBA")),
        "large": np.repeat(np.repeat(made, 50, 0), 50, 1),
        "floats": made / 255,
        "grey": made[..., 0],
        "two": [made, made],
        "empty": made[:0],
    }[how]


MEASURE = Tool("measure", "Adds up.", (Text("word"), Integer("times", default=1)), execute=measure, host=True)
SLEEP = Tool("sleep", "Waits.", (Number("seconds"),), execute=sleep, host=True)
BROKEN = Tool("broken", "Fails.", (Text("how"),), execute=broken, host=True)
PAINT = Tool("paint", "Paints.", (Text("how"),), execute=paint, host=True, picture=True)
SECRET = Tool("secret", "Paints.", (Text("how"),), execute=paint, host=True)
"""
NAMES = (
    "rotate",
    "slow_tools:MEASURE",
    "slow_tools:SLEEP",
    "slow_tools:BROKEN",
    "slow_tools:PAINT",
    "slow_tools:SECRET",
)
MEASURE, SLEEP, BROKEN, PAINT, SECRET = 1, 2, 3, 4, 5


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    (folder / "slow_tools.py").write_text(TOOLS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        with HostTools(NAMES, HostToolsConfig(workers=2, seconds=3.0, picture_side=100)) as found:
            yield found


def test_answers_come_in_order_with_what_was_asked(tools):
    images = [np.full((3, 5, 3), i, np.uint8) for i in range(3)]
    requests = [ToolRequest(MEASURE, {"word": "ä", "times": i}, images[:i]) for i in range(4)]
    assert tools.call(requests) == [
        ToolReply(ANSWERED, f"{'ä' * i}: {[int(image.sum()) for image in images[:i]]}") for i in range(4)
    ]
    assert set(tools.metrics().values()) == {0.0}


def test_what_goes_wrong_is_an_answer_and_counted(tools):
    """An exception, a result that is no text, a process that ends: and the next call is carried out all the same."""
    requests = [ToolRequest(BROKEN, {"how": how}, ()) for how in ("paper", "number", "exit")]
    requests += [ToolRequest(MEASURE, {"word": "a"}, ()), ToolRequest(MEASURE, {"no": 1}, ())]
    paper, number, exit, fine, unknown = tools.call(requests)
    assert paper == ToolReply(FAILED, "ValueError: no paper here")
    assert number.outcome == FAILED and "not int" in number.text
    assert exit == ToolReply(FAILED, "the process ended")
    assert fine == ToolReply(ANSWERED, "a: []")
    assert unknown.outcome == FAILED and "TypeError" in unknown.text
    facts = tools.metrics()
    assert (facts["host_tool_errors"], facts["host_tool_timeouts"]) == (4.0, 0.0)


def test_calls_run_beside_each_other_and_end_in_time(tools):
    tools.call([ToolRequest(MEASURE, {"word": "a"}, ())] * 2)  # both have begun
    began = time.monotonic()
    slow, fast = tools.call([ToolRequest(SLEEP, {"seconds": 60}, ()), ToolRequest(SLEEP, {"seconds": 1}, ())])
    assert slow == ToolReply(TIMED_OUT, "no answer within 3 seconds") and fast == ToolReply(ANSWERED, "slept 1")
    assert time.monotonic() - began < 30
    assert (
        tools.call([ToolRequest(MEASURE, {"word": "b"}, ())] * 3) == [ToolReply(ANSWERED, "b: []")] * 3
    )  # it was replaced
    assert tools.metrics()["host_tool_timeouts"] == 1.0


def test_tools_that_cannot_be_imported_stop_the_run(tmp_path, monkeypatch):
    with (
        HostTools(("not_there:TOOL",), HostToolsConfig(workers=1)) as tools,
        pytest.raises(ToolError, match="not_there:TOOL did not start"),
    ):
        tools.call([ToolRequest(0, {}, ())])


def test_pictures_come_back(tools):
    """NumPy's and Pillow's, with and without a text; one longer than `picture_side` is Pillow's thumbnail of it."""
    image = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)
    tools.metrics()
    array, both, pillow, large = tools.call(
        [ToolRequest(PAINT, {"how": how}, [image]) for how in ("array", "both", "pillow", "large")]
    )
    assert [x.text for x in (array, both, pillow, large)] == ["", "Here it is.", "", ""]
    for reply in (array, both, pillow):
        assert reply.outcome == ANSWERED and reply.picture.dtype == np.uint8
        np.testing.assert_array_equal(reply.picture, 255 - image)
    thumbnail = Image.fromarray(np.repeat(np.repeat(255 - image, 50, 0), 50, 1))
    thumbnail.thumbnail((100, 100), reducing_gap=None)
    np.testing.assert_array_equal(large.picture, thumbnail)
    facts = tools.metrics()
    assert (facts["host_tool_pictures"], facts["host_tool_shrunk"], facts["host_tool_errors"]) == (4.0, 1.0, 0.0)


def test_what_is_no_picture_is_an_answer(tools):
    image = np.zeros((3, 5, 3), np.uint8)
    how = {
        "floats": "not float64",
        "grey": "not uint8 (3, 5)",
        "two": "not list",
        "empty": "uint8 [h, w, 3], not (0, 5, 3)",
    }
    for name, said in how.items():
        (reply,) = tools.call([ToolRequest(PAINT, {"how": name}, [image])])
        assert reply.outcome == FAILED and reply.picture is None and said in reply.text, reply.text
    (reply,) = tools.call([ToolRequest(SECRET, {"how": "array"}, [image])])
    assert reply.outcome == FAILED and "'secret' returns a picture: it needs Tool(..., picture=True)" in reply.text


@pytest.mark.parametrize("name", ["workers", "seconds", "picture_side"])
def test_settings_are_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be positive: 0"):
        HostToolsConfig(**{name: 0})


def test_the_current_directory_is_searched_last(tmp_path, monkeypatch):
    """By workers, too: a file there takes the place of no package, and a tool there is found."""
    for name in ("queue", "numpy", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "here_tools.py").write_text(
        "from pixel_jax.tools import Tool\nHERE = Tool('here', 'Is.', execute=lambda images: 'here', host=True)\n"
    )
    monkeypatch.chdir(tmp_path)
    with HostTools(("here_tools:HERE",), HostToolsConfig(workers=1)) as tools:
        assert tools.call([ToolRequest(0, {}, ())]) == [ToolReply(ANSWERED, "here")]


def test_settings_of_commands():
    """`rl`, `sft` and `eval` have them, and `--help` lists them."""
    rl = {"model": "m", "data": "d", "out": "o", "rl": {"iterations": 1}}
    judged = {"model": "m", "out": "o", "benchmarks": {"x": {"format": "jsonl", "data": "d"}}}
    for cls, values in ((TrainConfig, rl), (EvalConfig, judged)):
        assert load(cls, values).host_tools == HostToolsConfig(workers=4, seconds=30.0, picture_side=1024)
        given = load(cls, values | {"host_tools": {"workers": 2, "seconds": 1}}).host_tools
        assert given == HostToolsConfig(workers=2, seconds=1.0)
        with pytest.raises(ConfigError, match="config.host_tools: seconds must be positive: 0"):
            load(cls, values | {"host_tools": {"seconds": 0}})
        with pytest.raises(ConfigError, match="unknown key config.host_tools.second; the nearest known one is"):
            load(cls, values | {"host_tools": {"second": 1}})
        said = listing(cls, values)
        assert all(f"host_tools.{name}" in said for name in ("workers", "seconds", "picture_side")), said
