"""The device automaton gives the host parser's verdicts and values, on every text and however it is cut into tokens."""

import functools
import os
import pathlib
import random
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device_calls import device_calls, same_calls
from hypothesis import example, given, settings
from hypothesis import strategies as st
from qwen import qwen_vocabulary
from texts import any_response, response

from pixel_jax.dialog import CallParser, Language, Vocabulary, build_tokenizer, call_parser, parse_turn, token_table
from pixel_jax.dialog.automaton import build
from pixel_jax.dialog.call_parser import TokenTable
from pixel_jax.dialog.grammar import RELEASED_LANGUAGE
from pixel_jax.tools import RELEASED
from pixel_jax.tools.calls import ParsedCalls, arguments

READER = call_parser()
ROWS, CHUNKS = 512, 6
DATA = ROWS * 400


def assert_same(texts: list[bytes], device: ParsedCalls, language: Language = RELEASED_LANGUAGE):
    host = device_calls([parse_turn(text, language) for text in texts], language)
    if difference := same_calls(host, device):
        field, row = difference
        ours, theirs = (np.asarray(getattr(calls, field))[row] for calls in (host, device))
        pytest.fail(f"{field}: host {ours}, device {theirs} of {texts[row]!r}")


@functools.partial(jax.jit, static_argnames="parser")
def read(table: TokenTable, tokens: jax.Array, parser: CallParser = READER) -> ParsedCalls:
    """tokens [R, T]"""
    state, _ = jax.lax.scan(
        lambda state, token: (parser.step(table, state, token), None), parser.init(len(tokens)), tokens.T
    )
    return parser.finish(state)


def read_chunks(texts: list[bytes], rng: random.Random, parser: CallParser = READER) -> ParsedCalls:
    """Reads every text in at most CHUNKS tokens, cut at random, through a table that holds just these tokens."""
    chunks, tokens = [], np.full((ROWS, CHUNKS), -1, np.int32)
    for row, text in enumerate(texts):
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(CHUNKS)))
        for i, (start, end) in enumerate(zip([0, *cuts], [*cuts, len(text)], strict=True)):
            tokens[row, i] = len(chunks)
            chunks.append(text[start:end])
    table = TokenTable.of(chunks)
    assert len(table.data) <= DATA, len(table.data)
    fill = ROWS * CHUNKS - len(chunks)
    table = TokenTable(np.pad(table.data, (0, DATA - len(table.data))), *(np.pad(x, (0, fill)) for x in table[1:]))
    return jax.tree.map(np.asarray, read(table, tokens, parser))


def check_batch(seed: int) -> list[bytes]:
    rng = random.Random(seed)
    texts = [any_response(rng) for _ in range(ROWS)]
    assert_same(texts, read_chunks(texts, rng))
    return texts


def test_agrees_on_twenty_thousand_texts():
    texts = [text for seed in range(40) for text in check_batch(seed)]
    turns = [parse_turn(text) for text in texts]
    # The generator has all sorts of texts in it: no call, malformed, and calls of both tools.
    shares = [
        np.mean([not turn.required for turn in turns]),
        np.mean([turn.required and turn.call is None for turn in turns]),
        *(np.mean([turn.call is not None and turn.call.tool == tool for turn in turns]) for tool in (0, 1)),
    ]
    assert min(shares) > 0.1, shares


@pytest.mark.slow
def test_agrees_on_a_million_texts():
    for seed in range(1000, 1000 + -(-(10**6) // ROWS)):
        check_batch(seed)


PIECE = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<|im_end|>", '{"name": "select_frames", "arguments": {"target_frames": [1]}}']
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(PIECE, st.text(max_size=3)), max_size=8).map("".join), st.randoms(use_true_random=False))
@example("<|im_<|im_end|>end|>", random.Random(0))
@example(
    '<tool_call>{"name":"select_frames","arguments":{"target_frames":[1]}}<<|im_end|>/tool_call>', random.Random(0)
)
@example(
    '<tool_call>{"name":"select_frames","arguments":{"target_frames":[1]}}</tool_<|im_end|>call>', random.Random(0)
)
@example("</tool_call><|im_<|im_end|><|im_end|>end|>", random.Random(0))
@example(
    '<tool_call>{"name":"select_frames","arguments":{"target_frames":[1]}}<<|im_end|>|im_end|>/tool_call>',
    random.Random(0),
)
def test_agrees_on_marks_within_marks(text, rng):
    data = text.encode("utf-8", "surrogatepass")
    assert_same([data], read_chunks([data], rng))


def test_agrees_after_every_byte():
    """`finish` may be asked at any time: every prefix of a text has the verdict of that prefix as a whole response."""
    call = b'Hm.<tool_call>{"arguments": {"target_frames": [1, -20]}, "name": "select_frames"}</tool_call><|im_end|>'
    prefixes = [call[:end] for end in range(len(call) + 1)]
    assert_same(prefixes, read_chunks(prefixes, random.Random(0)))
    assert [parse_turn(prefix).required for prefix in prefixes].count(True) == 2  # before and after <|im_end|>


@functools.cache
def qwen_tables() -> tuple[Vocabulary, TokenTable, dict[bytes, int]]:
    vocabulary = qwen_vocabulary()
    ids = {vocabulary.to_bytes([index]): index for index in range(len(vocabulary.table.start))}
    return vocabulary, token_table(vocabulary), ids


def segment(text: bytes, ids: dict[bytes, int], rng: random.Random) -> list[int]:
    """Cuts a text into tokens of a vocabulary at random: most of the cuts are none that its tokenizer would make."""
    tokens, start = [], 0
    while start < len(text):
        ends = [end for end in range(start + 1, min(start + 20, len(text)) + 1) if text[start:end] in ids]
        tokens.append(ids[text[start : rng.choice(ends)]])
        start += len(qwen_vocabulary().to_bytes(tokens[-1:]))
    return tokens


def test_agrees_for_any_segmentation_into_the_tokens_of_qwen():
    vocabulary, table, ids = qwen_tables()
    rng = random.Random(7)
    texts = [any_response(rng)[:400] for _ in range(ROWS)]
    for way in ("random", "tokenizer"):
        tokens = np.full((ROWS, 400), -1, np.int32)
        read_texts = []
        for row, text in enumerate(texts):
            if way == "random":
                cut = segment(text, ids, rng)
            else:
                cut = vocabulary.encode(text.decode("utf-8", "replace"))  # may compose characters: read back
            tokens[row, : len(cut)] = cut
            read_texts.append(vocabulary.to_bytes(cut))
        assert way == "tokenizer" or read_texts == texts
        assert_same(read_texts, read(table, tokens))


def test_long_pieces_as_tokens():
    pieces = [
        'Now I will zoom in to look clearer.\n<tool_call>\n{"name": "crop_image_normalized", "arguments": {"bbox_2d": [',
        '], "target_image": 1}}\n</tool_call>', ", ", *(f"0.{i:02d}" for i in range(100)),
    ]  # fmt: skip
    vocabulary = Vocabulary.of(build_tokenizer(pieces))
    text = f"{pieces[0]}0.12, 0.34, 0.56, 0.78{pieces[1]}"
    ids = vocabulary.encode(text) + [vocabulary.im_end]
    assert len(ids) == 10
    table = token_table(vocabulary)
    assert table.quiet[256] > 30  # the prose before the mark costs nothing
    calls = read(table, np.array([ids]))
    assert_same([text.encode()], calls)
    assert arguments(calls, RELEASED, RELEASED[0])["bbox_2d"].micros.tolist() == [[120000, 340000, 560000, 780000]]


def test_rows_on_a_mesh_inside_a_loop():
    """Sharded over eight devices, in a while_loop whose rows end at different tokens: the same, in one compilation."""
    vocabulary, table, ids = qwen_tables()
    rng = random.Random(3)
    texts = [response(rng).encode("utf-8", "surrogatepass")[-300:] for _ in range(16)]
    tokens = np.full((16, 301), -1, np.int32)
    for row, text in enumerate(texts):
        cut = segment(text, ids, rng)
        tokens[row, : len(cut)] = cut

    @jax.jit
    def run(table, tokens):
        def body(carry):
            i, state = carry
            return i + 1, READER.step(table, state, tokens[:, i])

        def more(carry):
            return jnp.any(tokens[:, carry[0]] >= 0)

        return READER.finish(jax.lax.while_loop(more, body, (0, READER.init(len(tokens))))[1])

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    by_row = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for _ in range(2):
        calls = run(jax.device_put(table, everywhere), jax.device_put(tokens, by_row))
        tokens = tokens[::-1].copy()
        assert_same(texts, calls)
        texts = texts[::-1]
    assert run._cache_size() == 1


def test_ids_that_are_no_tokens_change_nothing():
    vocabulary, table, _ = qwen_tables()
    ids = vocabulary.encode('<tool_call>{"name": "select_frames", "arguments": {"target_frames": [3]}}</tool_call>')
    with_gaps = [other for index in ids for other in (-1, index, len(vocabulary.table.start), 152063)]
    assert_same([vocabulary.to_bytes(ids)], read(table, np.array([with_gaps])))
    assert read(table, np.array([with_gaps])).valid.all()


def test_the_automaton_is_the_same_in_every_process():
    """Its tables are constants of compiled programs, which several hosts must share."""
    code = (
        "import hashlib; from pixel_jax.dialog.automaton import build; a = build();"
        "print(hashlib.sha256(a.next.tobytes() + a.action.tobytes() + a.save.tobytes() + a.complete.tobytes()).hexdigest())"
    )
    root = str(pathlib.Path(__file__).parents[2])
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": root},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(digests) == 1
    assert len(build().save) < 1000
