"""Responses for the parsers: valid calls in all their forms, calls that are nearly valid, mutations, and noise."""

import random

SPACE = " \t\n\r"
FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<|im_end|>", "<", ">", "</", "<|", "<t", "tool_call>", "/tool_call>", "|im_end|>",
    "im_end|>", "<tool_", "call>", "</tool_", '"name"', '"arguments"', '"bbox_2d"', '"target_image"', '"target_frames"',
    '"crop_image_normalized"', '"select_frames"', '"crop_image"', '"label"', ":", ",", "{", "}", "[", "]", '"', "\\",
    " ", "\n", "\t", "\r", "-", ".", "0", "1", "9", "0.5", "1e3", "E", "+", "null", "true", "NaN", "-Infinity", "é",
    "日", "\\n", "\\u00e9", "e-3", ',"label": "x"', "\x00", "\x0b", "\xa0", "\u2028",
    "\ufeff", "'", "//", "Now", "zoom in", "\\u006e", "\ud800",
    "<function=", "</function>", "<parameter=label>", "</parameter>", "/parameter>",
]  # fmt: skip

LARGE = ["99999999", "999999989", "999999990", "999999999", "1000000000", "999999999999"]  # about where units saturate


def space(rng: random.Random) -> str:
    return "".join(rng.choice(SPACE) for _ in range(rng.choice([0, 0, 0, 1, 1, 3])))


def number(rng: random.Random, integer: bool = False) -> str:
    """A number of the grammar."""
    sign = rng.choice(["", "", "", "-"])
    whole = rng.choice(
        ["0", str(rng.randrange(20)), str(rng.randrange(10**6)), str(rng.randrange(10**15)), rng.choice(LARGE)]
    )
    decimals = "" if integer else rng.choice(["", "." + "".join(rng.choices("0123456789", k=rng.randint(1, 18)))])
    exponent = f"{rng.choice('eE')}{rng.choice(['', '+', '-'])}{rng.choice(['', '0'])}{rng.choice([0, 1, 2, 5, 15, 16, 17, 400])}"
    return sign + whole + decimals + (exponent if rng.random() < 0.2 and not integer else "")


def string(rng: random.Random) -> str:
    """A string of JSON without a beginning of a mark."""
    pieces = [
        "a",
        "the sign",
        " ",
        "0",
        "name",
        "\\n",
        '\\"',
        "\\\\",
        "\\u00e9",
        "é",
        "日",
        "{",
        "}",
        "[",
        ",",
        ":",
        "\x7f",
        ">",
    ]
    return '"' + "".join(rng.choices(pieces, k=rng.choice([0, 1, 1, 3]))) + '"'


def further(rng: random.Random) -> tuple[str, str]:
    """A key that is not looked at, and a scalar."""
    key = rng.choice(
        ['"label"', '"id"', '""', '"nam"', '"names"', '"bbox_2d "', '"target_"', '"target_image2"', '"é"', '"Name"']
    )
    return key, rng.choice([string, number, lambda rng: rng.choice(["true", "false", "null"])])(rng)


def odd_number(rng: random.Random) -> str:
    """A number, most often one outside the grammar."""
    return rng.choice(
        [
            lambda: f"{rng.randrange(100)}e",
            lambda: f"{rng.randrange(100)}.5e{rng.choice('+-')}",
            lambda: f"{rng.randrange(100)}e.5",
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
    """The JSON of a call, which may have more in it; with probability `odd` each part is not as the grammar wants it."""

    def numeral(integer=False):
        return odd_number(rng) if rng.random() < odd else number(rng, integer)

    def maybe(text, *others):
        return rng.choice(others) if rng.random() < odd else text

    if rng.random() < 0.5:
        name = '"crop_image_normalized"'
        box = array(rng, [numeral() for _ in range(maybe(rng.choice([4, 4, 4, 4, 5, 7]), 0, 1, 3))])
        pairs = [('"bbox_2d"', box), ('"target_image"', numeral(rng.random() < 0.8))]
    else:
        name = '"select_frames"'
        count = rng.choice([0, 1, 2, 3, 8, 9, 15, 16, 17, 20])
        pairs = [('"target_frames"', array(rng, [numeral(True) for _ in range(count)]))]
    more = lambda: [further(rng) for _ in range(rng.choice([0, 0, 0, 0, 1, 2]))]
    if rng.random() < 0.1:  # what belongs to the other tool, or has been said
        pairs += [
            rng.choice(
                [('"target_frames"', array(rng, [number(rng, True)])), ('"target_image"', number(rng)), pairs[0]]
            )
        ]
    pairs += more()
    if rng.random() < odd:
        extra = rng.choice(['"label"', '"bbox_2d"', '"target_frames"', '"target_image"', '""', '"\\u006eame"'])
        pairs = rng.choice([pairs[1:], pairs + pairs[:1], [*pairs, (extra, numeral())]])
    name = maybe(name, '"crop_image"', '"select_frames"', '"crop_image_normalized"', "1", "[]")
    outer = [('"name"', name), ('"arguments"', members(rng, pairs)), *more()]
    if rng.random() < 0.05:
        outer.append(rng.choice(outer[:2]))
    if rng.random() < odd:
        outer = rng.choice([outer[1:], outer[:1], outer + outer[:1], outer + outer[1:], [*outer, ('"id"', "1")]])
    return space(rng) + members(rng, outer) + space(rng)


def response(rng: random.Random, odd: float = 0.0) -> str:
    before = "".join(rng.choices(FRAGMENTS, k=rng.choice([0, 0, 2, 6])))
    if rng.random() < 0.2:  # a call that is taken up again leaves nothing behind
        before += "<tool_call>" + call(rng, odd)[: rng.choice([60, 90, 300])]
    after = rng.choice(
        ["", "", "<|im_end|>", "<|im_end|>", "<|im_end|><|im_end|>", "\n", "\n<|im_end|>", "<|endoftext|>"]
    )
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
