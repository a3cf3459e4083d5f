"""Responses with calls of any language, and what the device reads of them."""

import functools
import random

import jax
import numpy as np
from texts import FRAGMENTS, mutate, number, odd_number, space, string

from pixel_jax.dialog import CallParser, Language, call_parser
from pixel_jax.dialog.call_parser import TokenTable
from pixel_jax.dialog.formats import Body
from pixel_jax.tools import Box, Choice, Integer, Integers, Text
from pixel_jax.tools.calls import ParsedCalls

ROWS, CHUNKS, DATA = 256, 4, 256 * 320


def written(rng: random.Random, argument, odd: float) -> str:
    if rng.random() < odd:
        return rng.choice([odd_number(rng), string(rng), "[1]", "[]", "null"])
    match argument:
        case Box():
            return "[" + ",".join(space(rng) + number(rng) for _ in range(rng.choice([4, 4, 5]))) + "]"
        case Integers():
            return "[" + ",".join(number(rng, True) + space(rng) for _ in range(rng.randrange(6))) + "]"
        case Choice():
            return f'"{rng.choice(argument.options)}"'
        case Text():
            return string(rng)
        case Integer():
            return rng.choice([str(rng.randrange(-2, 9)), number(rng, True)])
    return rng.choice([f"{rng.uniform(-1, 5):.3f}", "-0.5", "4.25", "4.250001", "-0.500001", number(rng)])


def tagged(rng: random.Random, language: Language, tool, members: list, odd: float) -> str:
    """A call between tags, with these arguments in any order."""

    def value(x) -> str:
        text = written(rng, x, odd)
        if isinstance(x, Choice | Text):  # texts have no quotation marks, or only such as are part of them
            text = text[1:-1] if text.startswith('"') else text
            text = rng.choice([f"\n{text}\n"] * 4 + [f"\n\n{text}\n", text, f"\n{text} \n", f"\n{text}\n\n"])
        return f"<parameter={x.name}>{space(rng)}{text}" if rng.random() < odd else f"<parameter={x.name}>{text}"

    parts = [value(x) + space(rng) * (not isinstance(x, Text)) for x in rng.sample(members, len(members))]
    parts += [f"<parameter={rng.choice(['label', 'bbox', 'a b', ''])}>{string(rng)}"] if rng.random() < 0.3 else []
    name = tool.name if tool and rng.random() > odd else "x"
    return f"<function={name}>{space(rng)}" + "".join(f"{x}</parameter>{space(rng)}" for x in parts) + "</function>"


def response(rng: random.Random, language: Language, odd: float) -> str:
    keys = [*language.keys.values()]
    tool = rng.choice(language.spellings) if language.spellings else None
    mine = [x.written for x in tool.arguments if x.written is not None] if tool else []
    members = [x for x in mine if rng.random() > 0.15] + [x for x in keys if rng.random() < 0.05]
    pairs = [f'"{x.name}"{space(rng)}:{space(rng)}{written(rng, x, odd)}' for x in rng.sample(members, len(members))]
    pairs += [f'"label":{string(rng)}'] if rng.random() < 0.3 or not pairs else []
    body = "{" + f"{space(rng)},{space(rng)}".join(pairs) + "}"
    if language.format.body == Body.TAGS:
        body = tagged(rng, language, tool, members, odd)
    elif language.named:
        outer = [f'"name":{space(rng)}"{tool.name if tool and rng.random() > odd else "x"}"', f'"arguments": {body}']
        body = "{" + ",".join(rng.sample(outer, 2)) + "}"
    before = "".join(rng.choices(FRAGMENTS, k=rng.choice([0, 0, 4])))
    return f"{before}{language.format.opening}{space(rng)}{body}{space(rng)}{language.format.closing}"


def any_response(rng: random.Random, language: Language) -> bytes:
    text = response(rng, language, rng.choice([0, 0, 0, 0.1]))
    text = mutate(rng, text) if rng.random() < 0.25 else text
    return text.encode("utf-8", "surrogatepass")[:600]


@functools.partial(jax.jit, static_argnames="parser")
def read(table: TokenTable, tokens: jax.Array, parser: CallParser) -> ParsedCalls:
    state, _ = jax.lax.scan(
        lambda state, token: (parser.step(table, state, token), None), parser.init(len(tokens)), tokens.T
    )
    return parser.finish(state)


def read_texts(texts: list[bytes], rng: random.Random, language: Language) -> ParsedCalls:
    chunks, tokens = [], np.full((ROWS, CHUNKS), -1, np.int32)
    for row, text in enumerate(texts):
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(CHUNKS - 1))
        for i, (start, end) in enumerate(zip([0, *cuts], [*cuts, len(text)], strict=True)):
            tokens[row, i] = len(chunks)
            chunks.append(text[start:end])
    table, fill = TokenTable.of(chunks), ROWS * CHUNKS - len(chunks)
    table = TokenTable(np.pad(table.data, (0, DATA - len(table.data))), *(np.pad(x, (0, fill)) for x in table[1:]))
    return jax.tree.map(np.asarray, read(table, tokens, call_parser(language)))
