"""Prompts of several processes are the parts of the one that a single process would build."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pixel_jax.data.example import Example, ReadReport
from pixel_jax.data.prompt_shapes import ShapeFinder
from pixel_jax.data.questions import assign_shapes, question_batches
from pixel_jax.data.read import read_examples
from pixel_jax.ops import smart_resize
from pixel_jax.rollouts.images import pad
from pixel_jax.rollouts.prompts import PromptError, Query, build_prompts, prompt_tokens
from pixel_jax.rollouts.shapes import prompt_shape
from tests.data import released_files as files
from tests.rollouts import scripted_model

WIDTH, BUFFER = 96, (4, 192, 192)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return read_examples(files.write_questions(tmp_path_factory.mktemp("questions")), turns=False)[0]


def both(*sizes, config=scripted_model.CONFIG):
    """The same sizes for pictures and for videos."""
    return [prompt_shape(*sizes, config, video=video) for video in (False, True)]


def first(examples, index=0, processes=1, size=4, config=scripted_model.CONFIG):
    data = question_batches(
        assign_shapes(
            examples, both(*BUFFER, WIDTH, config=config), scripted_model.vocabulary(), config, ReadReport("here")
        ),
        scripted_model.vocabulary(),
        scripted_model.token_tables(),
        config,
        size=size,
        seed=0,
        process_index=index,
        process_count=processes,
        threads=3,
        ahead=5,
    )
    found = [next(data) for _ in range(3)]
    data.close()
    return found


def test_a_batch_is_what_build_prompts_makes_of_its_questions(examples):
    seen = []
    for prompts, asked, sizes in first(examples):
        assert all(x in examples for x in asked)
        assert sizes == [[image.shape[:2] for image in x.query().images] for x in asked]
        expected = build_prompts(
            [x.query() for x in asked],
            scripted_model.vocabulary(),
            scripted_model.token_tables(),
            scripted_model.CONFIG,
            shape=prompts.shape,
        )
        padded = lambda prompts: prompts._replace(images=pad(prompts.images, prompts.shape))
        jax.tree.map(np.testing.assert_array_equal, padded(prompts), padded(expected))
        (video,) = {x.video for x in asked}  # kinds are asked apart, each as often as it comes up
        assert prompts.shape == both(*BUFFER, WIDTH)[video]
        alike = [x.id for x in examples if x.video == video]
        assert sorted(x.id for x in asked) == sorted(alike * (4 // len(alike)))
        seen.append(video)
    assert set(seen) == {False, True}


def test_processes_build_the_parts(examples):
    parts = [first(examples, index, 4) for index in range(4)]
    for i, (prompts, asked, sizes) in enumerate(first(examples)):
        assert [x for part in parts for x in part[i][1]] == asked and [x for part in parts for x in part[i][2]] == sizes
        arrays = lambda prompts: prompts._replace(tables=(), uid=(), images=pad(prompts.images, prompts.shape))
        joined = jax.tree.map(lambda *xs: np.concatenate(xs), *(arrays(part[i][0]) for part in parts))
        jax.tree.map(
            np.testing.assert_array_equal, joined, arrays(prompts)
        )  # `uid` is told apart where they meet, in `rl`


LARGE = dataclasses.replace(scripted_model.CONFIG, max_pixels=24 * 28**2, max_side=224)
TEXT = 66  # tokens of a prompt without its question and its image
SIDES = st.integers(28, 400)


def outline(*sizes, question="", video=False):
    return Query(question, [np.broadcast_to(np.uint8(0), (*size, 3)) for size in sizes], video)


def tokens(query, config=LARGE):
    return len(prompt_tokens(query, scripted_model.vocabulary(), config))


@given(SIDES, SIDES, st.integers(0, 40))
def test_a_picture_is_as_large_as_its_shape_allows(height, width, words):
    """The buffer, the tokens left by the question and the longest side shown are kept, and the picture's shape."""
    text = tokens(outline((28, 28), question="?" * words)) - 1
    shape = prompt_shape(1, 112, 168, TEXT + 26, LARGE, video=False)
    query = outline((height, width), question="?" * words)
    if text >= shape.tokens:
        with pytest.raises(PromptError, match=f"a prompt of .* tokens does not fit the width of {shape.tokens}"):
            ShapeFinder(scripted_model.vocabulary(), LARGE).scaled(query, shape)
        return
    try:
        found = ShapeFinder(scripted_model.vocabulary(), LARGE).scaled(query, shape)
    except PromptError:
        assert shape.tokens - text < 8 * max(height / width, width / height)  # a thin picture has many tokens
        return
    ((high, wide),) = found.sizes
    assert high <= 112 and wide <= 168 and abs(high / height - wide / width) < 1 / min(height, width)
    assert tokens(outline((high, wide), question="?" * words)) <= shape.tokens
    if found.scale < 1:  # half as large again would break one of the rules
        large = (int(high * 1.5) + 1, int(wide * 1.5) + 1)
        shown = smart_resize(*large, min_pixels=28**2, max_pixels=LARGE.max_pixels)
        too_many = text + shown[0] * shown[1] // 28**2 > shape.tokens
        assert large[0] > 112 or large[1] > 168 or max(shown) > LARGE.max_side or too_many
    shrunk = found.apply(query._replace(images=[np.full((height, width, 3), 7, np.uint8)]))
    assert shrunk.images[0].shape == (high, wide, 3) and (shrunk.images[0] == 7).all()


SHAPES = (
    prompt_shape(1, 192, 192, 96, scripted_model.CONFIG, video=False),
    prompt_shape(4, 64, 64, 128, scripted_model.CONFIG, video=True),
)


def some_examples(tmp_path):
    """Two questions about images, one of them large, one about two frames, and one about nothing that can be read."""
    sizes = {"a": (40, 60), "b": (700, 500), "c": (40, 60), "d": (40, 60)}
    for name, size in sizes.items():
        Image.fromarray(scripted_model.image(1, *size)).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    of = lambda name, *files, **more: Example(name, "?", tuple(tmp_path / f"{x}.png" for x in files), ("7",), **more)
    return [of("one", "a"), of("large", "b"), of("clip", "c", "d", video=True), of("broken", "broken")]


def test_every_question_has_a_shape_or_is_counted(tmp_path):
    shapes = SHAPES
    given = some_examples(tmp_path), shapes, scripted_model.vocabulary(), scripted_model.CONFIG
    with pytest.raises(PromptError, match=r"broken: .*broken.png cannot be read"):
        assign_shapes(*given, ReadReport("here"))
    report = ReadReport("here", drop=True)
    asked = assign_shapes(*given, report)
    assert [(x.example.id, x.shape) for x in asked] == [("one", shapes[0]), ("large", shapes[0]), ("clip", shapes[1])]
    assert asked[1].prompt.sizes == [(192, 137)] and report.mended == {
        "a picture was made smaller to fit its batch shape": 1
    }
    assert len(report.dropped) == 1 and report.dropped[0].startswith("broken: ")
    with pytest.raises(PromptError, match="no question is left. here: 1 rows dropped"):
        assign_shapes(given[0][3:], *given[1:], ReadReport("here", drop=True))
    with pytest.raises(
        PromptError, match="clip: 2 images are more than the 1 there is room for .config.image_buffer and"
    ):
        assign_shapes(given[0][2:3], both(1, 192, 192, 96), *given[2:], ReadReport("here"))
    with pytest.raises(PromptError, match="clip: there is no room for videos"):
        assign_shapes(given[0][2:3], shapes[:1], *given[2:], ReadReport("here"))


def test_a_batch_is_of_one_shape(tmp_path):
    shapes = SHAPES
    asked = assign_shapes(
        some_examples(tmp_path)[:3], shapes, scripted_model.vocabulary(), scripted_model.CONFIG, ReadReport("here")
    )
    data = question_batches(
        asked,
        scripted_model.vocabulary(),
        scripted_model.token_tables(),
        scripted_model.CONFIG,
        size=2,
        seed=0,
        threads=1,
    )
    kinds = set()
    for prompts, asked, _ in (next(data) for _ in range(8)):
        assert len(set(prompts.is_video.tolist())) == 1 and len(asked) == 2
        shape = shapes[int(prompts.is_video[0])]
        assert prompts.shape == shape and prompts.tokens.shape == (2, shape.tokens)
        kinds.add(bool(prompts.is_video[0]))
    data.close()
    assert kinds == {False, True}
