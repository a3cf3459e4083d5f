"""Responses for the parsers: valid calls in all their forms, calls that are nearly valid, mutations, and noise."""

import random

SPACE = " \t\n\r"
FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<|im_end|>", "<", ">", "</", "<|", "<t", "tool_call>", "/tool_call>", "|im_end|>",
    "im_end|>", "<tool_", "call>", "</tool_", '"name"', '"arguments"', '"bbox_2d"', '"target_image"', '"target_frames"',
    '"crop_image_normalized"', '"select_frames"', '"crop_image"', '"label"', ":", ",", "{", "}", "[", "]", '"', "\\",
    " ", "\n", "\t", "\r", "-", ".", "0", "1", "9", "0.5", "1e3", "E", "+", "null", "true", "NaN", "-Infinity", "é",
    "日", "\x00", "\x0b", "\xa0", "\u2028", "\ufeff", "'", "//", "Now", "zoom in", "\\u006e", "\ud800",
]  # fmt: skip

LARGE = ["99999999", "999999989", "999999990", "999999999", "1000000000", "999999999999"]  # about where units saturate


def space(rng: random.Random) -> str:
    return "".join(rng.choice(SPACE) for _ in range(rng.choice([0, 0, 0, 1, 1, 3])))


def number(rng: random.Random, integer: bool = False) -> str:
    """A number of the grammar."""
    sign = rng.choice(["", "", "", "-"])
    whole = rng.choice(
        ["0", str(rng.randrange(20)), str(rng.randrange(10**6)), str(rng.randrange(10**12)), rng.choice(LARGE)]
    )
    decimals = "" if integer else rng.choice(["", "." + "".join(rng.choices("0123456789", k=rng.randint(1, 10)))])
    text = sign + whole + decimals
    if len(text) <= 12 and rng.random() < 0.9:
        return text
    text = sign + ("0" if decimals else whole[: 12 - len(sign)]) + decimals
    return text[:12] if len(text) > 12 else text


def odd_number(rng: random.Random) -> str:
    """A number, most often one outside the grammar."""
    return rng.choice(
        [
            lambda: "".join(rng.choices("0123456789", k=rng.randint(11, 14))),
            lambda: "0." + "".join(rng.choices("0123456789", k=rng.randint(9, 12))),
            lambda: "-" + str(rng.randrange(10**9, 10**13)),
            lambda: rng.choice(["", "-"]) + "0" + str(rng.randrange(10)),
            lambda: f"{rng.randrange(100)}.",
            lambda: f".{rng.randrange(100)}",
            lambda: f"{rng.random():.2e}",
            lambda: f"1E{rng.randint(-3, 3)}",
            lambda: rng.choice(
                ["-", "+1", "--1", "NaN", "Infinity", "-Infinity", "null", "true", '"1"', "[1]", "{}", "1_0"]
            ),
            lambda: number(rng),
        ]
    )()


def array(rng: random.Random, items: list[str]) -> str:
    inner = ",".join(space(rng) + item + space(rng) for item in items)
    return f"[{inner or space(rng)}]"


def members(rng: random.Random, pairs: list[tuple[str, str]]) -> str:
    pairs = rng.sample(pairs, len(pairs))
    inner = ",".join(f"{space(rng)}{key}{space(rng)}:{space(rng)}{value}{space(rng)}" for key, value in pairs)
    return "{" + inner + "}"


def call(rng: random.Random, odd: float = 0.0) -> str:
    """The JSON of a call; with probability `odd` each part of it is another than the grammar wants."""

    def numeral(integer=False):
        return odd_number(rng) if rng.random() < odd else number(rng, integer)

    def maybe(text, *others):
        return rng.choice(others) if rng.random() < odd else text

    if rng.random() < 0.5:
        name = '"crop_image_normalized"'
        box = array(rng, [numeral() for _ in range(maybe(4, 0, 1, 3, 5))])
        pairs = [('"bbox_2d"', box), ('"target_image"', numeral(rng.random() < 0.8))]
    else:
        name = '"select_frames"'
        count = rng.choice([0, 1, 2, 3, 8, 9, 15, 16, 17, 20])
        pairs = [('"target_frames"', array(rng, [numeral(True) for _ in range(count)]))]
    if rng.random() < odd:
        extra = rng.choice(['"label"', '"bbox_2d"', '"target_frames"', '"target_image"', '""', '"\\u006eame"'])
        pairs = rng.choice([pairs[1:], pairs + pairs[:1], [*pairs, (extra, numeral())]])
    name = maybe(name, '"crop_image"', '"select_frames"', '"crop_image_normalized"', "1", "[]")
    outer = [('"name"', name), ('"arguments"', members(rng, pairs))]
    if rng.random() < odd:
        outer = rng.choice([outer[1:], outer[:1], outer + outer[:1], outer + outer[1:], [*outer, ('"id"', "1")]])
    return space(rng) + members(rng, outer) + space(rng)


def response(rng: random.Random, odd: float = 0.0) -> str:
    before = "".join(rng.choices(FRAGMENTS, k=rng.choice([0, 0, 2, 6])))
    if rng.random() < 0.2:  # a call that is taken up again leaves nothing behind
        before += "<tool_call>" + call(rng, odd)[: rng.choice([60, 90, 300])]
    after = rng.choice(["", "", "<|im_end|>", "<|im_end|>", "<|im_end|><|im_end|>", "\n", "<|endoftext|>"])
    return f"{before}<tool_call>{call(rng, odd)}</tool_call>{after}"


def mutate(rng: random.Random, text: str) -> str:
    for _ in range(rng.choice([1, 1, 2, 4])):
        i, j = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        j = min(j, i + rng.choice([0, 1, 2, 30]))
        text = rng.choice(
            [
                lambda t, i, j: t[:i] + t[j:],
                lambda t, i, j: t[:i] + rng.choice(FRAGMENTS) + t[j:],
                lambda t, i, j: t[:i] + rng.choice(FRAGMENTS) + t[i:],
                lambda t, i, j: t[:j] + t[i:],
                lambda t, i, j: t[:i] + "<|im_end|>" + t[i:],
                lambda t, i, j: t[:i] + chr(rng.randrange(256)) + t[j:],
                lambda t, i, j: t[:j],
            ]
        )(text, i, j)
    return text


def noise(rng: random.Random) -> str:
    return "".join(rng.choices(FRAGMENTS, k=rng.randint(0, 30))) + rng.choice(["", "</tool_call>"])


def any_response(rng: random.Random) -> bytes:
    """A response of at most 600 bytes, of any of these sorts; at times not UTF-8."""
    text = rng.choice(
        [
            lambda: response(rng),
            lambda: response(rng, odd=0.05),
            lambda: response(rng, odd=0.3),
            lambda: mutate(rng, response(rng)),
            lambda: mutate(rng, response(rng)),
            lambda: noise(rng),
        ]
    )()
    data = text.encode("utf-8", "surrogatepass")[:600]
    if rng.random() < 0.02:
        at = rng.randrange(len(data) + 1)
        data = data[:at] + bytes([rng.randrange(256)]) + data[at:]
    return data
