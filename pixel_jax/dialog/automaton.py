"""The grammar of `grammar.py` on the device: an automaton over the bytes of the tokens that a policy writes.

Whether a text is a call is the state of a finite automaton that it ends in (some five hundred states, built here from the
grammar). Which tool and keys it had, and what its numbers are worth, is kept beside it in integer registers, by an action
that hangs on the state entered.

Three marks begin with "<" and contain no other "<", so one state tells how much of a mark has been read:
`<tool_call>` starts a call anew, wherever it appears; `</tool_call>` ends one; `<|im_end|>` is taken out of the text,
so the automaton goes back to where it was before the mark's "<", which is all that has to be remembered.

    state = init(rows)
    state = step(table, state, tokens)      # tokens i32 [R]; ids outside the vocabulary, as -1, are nothing
    calls = finish(state)                   # may be asked at any time
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.dialog.grammar import BOX_NUMBERS, CLOSE, END, MAX_SHIFT, MAX_UNITS, OPEN, TOOL_NAMES, WHITE_SPACE
from pixel_jax.dialog.tokenizer import TokenBytes, Vocabulary

MAX_FRAMES = 16  # frame numbers that are kept; `num_frames` counts on
CROP, SELECT = range(len(TOOL_NAMES))
_BOX_KEY, _TARGET_KEY, _FRAMES_KEY = 1, 2, 4  # bits of the keys of the arguments
_NEEDS = {CROP: _BOX_KEY | _TARGET_KEY, SELECT: _FRAMES_KEY}

# Number registers: the box, target_image, then the frames.
_TARGET, _FRAMES = BOX_NUMBERS, BOX_NUMBERS + 1
_SLOTS = _FRAMES + MAX_FRAMES
_NO_SLOT = -1

DIGITS = b"0123456789"
# What a string of a further key may hold as it is: no quotation mark, backslash, control character, or beginning of a mark.
_PLAIN = bytes(byte for byte in range(32, 256) if byte not in b'"\\<')


class Calls(NamedTuple):
    """What the rows' responses ask for; everything but `required` and `valid` is zero (tool: -1) unless valid."""

    required: jax.Array  # bool [R]      the response ends with </tool_call>
    valid: jax.Array  # bool [R]         and its call is in the grammar
    tool: jax.Array  # i32 [R]           index into grammar.TOOL_NAMES, -1: none
    box_units: jax.Array  # i32 [R, 4]   x1, y1, x2, y2 = (-1)^negative * (units + micros / 10^6)
    box_micros: jax.Array  # i32 [R, 4]
    box_negative: jax.Array  # bool [R, 4]
    target_image: jax.Array  # i32 [R]   signed, decimals cut off
    target_micros: jax.Array  # i32 [R]  the decimals, in millionths
    target_integer: jax.Array  # bool [R]  written without a decimal point
    frames: jax.Array  # i32 [R, 16]     signed; the first num_frames of them, zero beyond
    num_frames: jax.Array  # i32 [R]     how many the call lists, also beyond 16


class State(NamedTuple):
    """Automaton and registers of R rows."""

    state: jax.Array  # i32 [R]
    saved: jax.Array  # i32 [R]          the state to go back to if the "<" just read begins <|im_end|>
    tool: jax.Array  # i32 [R]           the name that was read, -1: none
    keys: jax.Array  # i32 [R]           the keys of the arguments that were read
    units: jax.Array  # i32 [R, 21]
    micros: jax.Array  # i32 [R, 5]      frames have none
    exponent: jax.Array  # i32 [R, 5]
    negative: jax.Array  # bool [R, 21]
    target_integer: jax.Array  # bool [R]
    num_frames: jax.Array  # i32 [R]


class _Action(NamedTuple):
    """What entering a state does to the registers."""

    slot: int = _NO_SLOT  # which number the byte belongs to; frames count from the running one
    begin: int = 0  # the byte is its first character
    digit: int = 0  # the byte is a digit before the point
    micros: int = 0  # what a digit behind the point is worth
    power: int = 0  # the byte is a digit of an exponent: 1, or -1 behind a minus
    real: int = 0  # the byte makes it no integer
    clear: int = 0  # the byte opens the list of frames
    call: int = 0  # the byte opens a call: nothing of it was read
    arguments: int = 0  # the byte opens the arguments: none of their keys was read
    key: int = 0  # the byte begins the value of this key of theirs
    name: int = 0  # the byte ends the name of tool `name` - 1


class Automaton(NamedTuple):
    """The tables: `next[state * num_classes + byte_class[byte]]`. Two states carry no meaning of their own: 0, where
    nothing is under way, and `restore`, which stands for the saved one."""

    next: np.ndarray  # i32 [S * C]
    byte_class: np.ndarray  # i32 [256]
    num_classes: int
    action: np.ndarray  # i32 [S, 11]    columns of _Action
    save: np.ndarray  # i32 [S]          what to go back to after <|im_end|>
    restore: int
    required: np.ndarray  # bool [S]
    complete: np.ndarray  # bool [S]     required, and an object of the grammar stands between the marks


class _Builder:
    """Builds the automaton. A state is a dict from byte to state; a byte without an entry leads to `NOTHING`, and "<"
    to the beginning of a mark."""

    NOTHING = 0

    def __init__(self):
        self.edges: list[dict[int, int]] = []
        self.actions: list[_Action] = []
        assert self.state() == self.NOTHING
        self.restore = self.state()
        self.required: list[int] = []
        self.complete: list[int] = []
        self.saves: dict[int, int] = {}
        start, accepted = self.spaced(), self.spaced()
        self.less = self.marks(start, [])
        self.edges[accepted][ord("<")] = self.marks(start, self.complete)
        self.call(start, accepted)

    def state(self, action: _Action = _Action()) -> int:  # noqa: B008
        self.edges.append({})
        self.actions.append(action)
        return len(self.edges) - 1

    def spaced(self, action: _Action = _Action()) -> int:  # noqa: B008
        """A new state that white space does not leave."""
        state = self.state(action)
        self.edges[state] |= dict.fromkeys(WHITE_SPACE, state)
        return state

    def spell(self, start: int, texts: Mapping[bytes, int]) -> dict[bytes, int]:
        """Edges from `start` that spell each of `texts` and lead to its state; texts that begin alike share states.

        Returns the states by what has been spelled.
        """
        between = {b"": start}
        for text, target in texts.items():
            for i, byte in enumerate(text[:-1]):
                if text[: i + 1] not in between:
                    between[text[: i + 1]] = self.edges[between[text[:i]]][byte] = self.state()
            self.edges[between[text[:-1]]][text[-1]] = target
        return between

    def marks(self, start: int, ends: list[int]) -> int:
        """The state after a "<"; the state in which a closing mark leads from there is added to `ends`."""
        required = self.spaced()
        self.required.append(required)
        ends.append(required)
        less, barred = self.state(), self.state()
        for state in (less, barred):
            self.spell(state, {OPEN[1:]: start, CLOSE[1:]: required})
        self.spell(less, {END[1:]: self.restore})
        # Removal is one pass: a <|im_end|> that only comes about by removing another stays. So a "<" that is gone
        # back to must not begin one. (Further into the mark it may go on: that ends where it was gone back to.)
        self.saves[less] = barred
        return less

    def call(self, start: int, accepted: int):
        after = self.spaced()
        name, arguments = self.spaced(), self.spaced()
        self.edges[start][ord("{")] = self.object(
            after, accepted, {b"name": name, b"arguments": arguments}, _Action(call=1)
        )
        ends = {tool: self.like(after, _Action(name=1 + tool)) for tool in (CROP, SELECT)}
        self.spell(name, {b'"%s"' % TOOL_NAMES[tool].encode(): end for tool, end in ends.items()})

        inner = self.spaced()
        box, target, frames = self.spaced(), self.spaced(), self.spaced()
        keys = {b"bbox_2d": box, b"target_image": target, b"target_frames": frames}
        self.edges[arguments][ord("{")] = self.object(inner, after, keys, _Action(arguments=1))
        self.edges[box][ord("[")] = opened = self.spaced(_Action(key=_BOX_KEY))
        self.box(opened, inner)
        self.number(target, inner, _TARGET, key=_TARGET_KEY)
        self.edges[frames][ord("[")] = opened = self.spaced(_Action(key=_FRAMES_KEY, clear=1))
        self.edges[opened][ord("]")] = inner
        self.numbers(opened, inner, _FRAMES)

    def like(self, state: int, action: _Action) -> int:
        """A new state that goes on as `state` does."""
        new = self.state(action)
        self.edges[new] |= self.edges[state]
        return new

    def object(self, after: int, closed: int, values: Mapping[bytes, int], action: _Action) -> int:
        """The state behind the "{" of an object that ends in `closed`.

        A member ends in `after`; the value of each known key begins in the state that `values` has for it.
        """
        before, other, value = self.spaced(), self.state(), self.spaced()
        colons = {key: self.spaced() for key in values}
        for key, colon in colons.items():
            self.edges[colon][ord(":")] = values[key]
        other_colon = self.spaced()
        self.edges[other_colon][ord(":")] = value
        self.edges[other] |= dict.fromkeys(_PLAIN, other) | {ord('"'): other_colon}
        self.edges[before][ord('"')] = quoted = self.state()
        for state in self.spell(quoted, {key + b'"': colon for key, colon in colons.items()}).values():
            self.edges[state] = self.edges[other] | self.edges[state]
        self.edges[after] |= {ord(","): before, ord("}"): closed}
        self.scalar(value, after)
        return self.like(before, action)

    def scalar(self, start: int, after: int):
        self.number(start, after, _NO_SLOT)
        self.spell(start, dict.fromkeys((b"true", b"false", b"null"), after))
        string, escape = self.state(), self.state()
        self.edges[start][ord('"')] = string
        self.edges[string] |= dict.fromkeys(_PLAIN, string) | {ord("\\"): escape, ord('"'): after}
        self.edges[escape] |= dict.fromkeys(b'"\\/bfnrt', string)
        digits = [self.state() for _ in range(4)]
        self.edges[escape][ord("u")] = digits[0]
        for digit, following in zip(digits, [*digits[1:], string], strict=True):
            self.edges[digit] |= dict.fromkeys(DIGITS + b"abcdefABCDEF", following)

    def box(self, start: int, after: int):
        for slot in range(BOX_NUMBERS):
            ended, following = self.spaced(), self.spaced()
            self.edges[ended][ord(",")] = following
            if slot == BOX_NUMBERS - 1:
                self.edges[ended][ord("]")] = after
            self.number(start, ended, slot)
            start = following
        self.numbers(start, after, _NO_SLOT)

    def numbers(self, start: int, after: int, slot: int):
        """One or more numbers and the "]" behind them."""
        ended, following = self.spaced(), self.spaced()
        self.edges[ended] |= {ord("]"): after, ord(","): following}
        self.number(start, ended, slot)
        # The numbers behind a comma are the same states as the first.
        self.edges[following] |= {byte: self.edges[start][byte] for byte in b"-" + DIGITS}

    def number(self, start: int, ended: int, slot: int, key: int = 0):
        """A number from `start`; what may follow it is what may follow in `ended`. Frames are integers."""
        of = functools.partial(_Action, slot)
        first = functools.partial(of, begin=1, key=key)
        minus, first_zero, first_digit = (
            self.state(first()),
            self.like(ended, first(digit=1)),
            self.like(ended, first(digit=1)),
        )
        zero, digit = self.like(ended, of(digit=1)), self.like(ended, of(digit=1))
        self.edges[start] |= {ord("-"): minus, ord("0"): first_zero} | dict.fromkeys(DIGITS[1:], first_digit)
        self.edges[minus] |= {ord("0"): zero} | dict.fromkeys(DIGITS[1:], digit)
        for state in (first_digit, digit):
            self.edges[state] |= dict.fromkeys(DIGITS, digit)
        if slot == _FRAMES:
            return
        point, exponent = self.state(of(real=1)), self.state(of(real=1))
        decimals = [self.like(ended, of(micros=10**place)) for place in range(5, -1, -1)]
        decimals.append(self.like(ended, of()))  # cut off
        for state, following in zip([point, *decimals], [*decimals, decimals[-1]], strict=True):
            self.edges[state] |= dict.fromkeys(DIGITS, following)
        for state in (first_zero, first_digit, zero, digit):
            self.edges[state][ord(".")] = point
        for state in (first_zero, first_digit, zero, digit, *decimals):
            self.edges[state] |= dict.fromkeys(b"eE", exponent)
        for sign, power in ((b"+", 1), (b"-", -1)):
            signed, place = self.state(of()), self.like(ended, of(power=power))
            self.edges[exponent][sign[0]] = signed
            for state in (signed, place, *([exponent] if power == 1 else [])):
                self.edges[state] |= dict.fromkeys(DIGITS, place)


@functools.cache
def build() -> Automaton:
    """The automaton of the grammar."""
    builder = _Builder()
    count = len(builder.edges)
    full = np.zeros((count, 256), np.int32)
    full[:, ord("<")] = builder.less
    for state, edges in enumerate(builder.edges):
        for byte, target in edges.items():
            full[state, byte] = target
    columns, byte_class = np.unique(full, axis=1, return_inverse=True)
    save = np.arange(count, dtype=np.int32)
    save[list(builder.saves)] = list(builder.saves.values())
    required, complete = np.zeros((2, count), bool)
    required[builder.required] = True
    complete[builder.complete] = True
    return Automaton(
        next=np.ascontiguousarray(columns).reshape(-1),
        byte_class=byte_class.reshape(-1).astype(np.int32),
        num_classes=columns.shape[1],
        action=np.array(builder.actions, np.int32),
        save=save,
        restore=builder.restore,
        required=required,
        complete=complete,
    )


class TokenTable(NamedTuple):
    """The bytes of every token, as the device needs them."""

    data: jax.Array  # u8 [N]
    start: jax.Array  # i32 [V]
    length: jax.Array  # i32 [V]
    quiet: jax.Array  # i32 [V]          bytes before the first "<": they change nothing where nothing is under way

    @classmethod
    def of(cls, tokens: Sequence[bytes]) -> TokenTable:
        quiet = np.array([len(token.partition(b"<")[0]) for token in tokens], np.int32)
        return cls(*TokenBytes.of(tokens), quiet)


def token_table(vocabulary: Vocabulary) -> TokenTable:
    """The table of a vocabulary."""
    tokens = [vocabulary.to_bytes([index]) for index in range(len(vocabulary.table.start))]
    return jax.tree.map(jnp.asarray, TokenTable.of(tokens))


def init(rows: int) -> State:
    """The state of `rows` responses of which nothing has been written."""
    return State(
        state=jnp.full(rows, _Builder.NOTHING, jnp.int32),
        saved=jnp.full(rows, _Builder.NOTHING, jnp.int32),
        tool=jnp.full(rows, -1, jnp.int32),
        keys=jnp.zeros(rows, jnp.int32),
        units=jnp.zeros((rows, _SLOTS), jnp.int32),
        micros=jnp.zeros((rows, _FRAMES), jnp.int32),
        exponent=jnp.zeros((rows, _FRAMES), jnp.int32),
        negative=jnp.zeros((rows, _SLOTS), bool),
        target_integer=jnp.zeros(rows, bool),
        num_frames=jnp.zeros(rows, jnp.int32),
    )


def step(table: TokenTable, state: State, tokens: jax.Array) -> State:
    """Reads one token of every row. tokens i32 [R]; an id outside the table (say -1: the row waits) changes nothing."""
    known = (tokens >= 0) & (tokens < table.length.shape[0])
    index = jnp.where(known, tokens, 0)
    quiet = jnp.where(state.state == _Builder.NOTHING, table.quiet[index], 0)
    length = jnp.where(known, table.length[index] - quiet, 0)
    start = table.start[index] + quiet
    # A step takes as long as the longest token: most rows think aloud, and are done at once.
    longest = jnp.max(length)  # over all rows, on whatever device: the trips of the loop are the same everywhere

    def read(carry):
        i, state = carry
        byte = table.data[jnp.minimum(start + i, table.data.shape[0] - 1)]
        return i + 1, _read_byte(state, byte.astype(jnp.int32), i < length)

    with jax.named_scope("bytes"):
        return jax.lax.while_loop(lambda carry: carry[0] < longest, read, (jnp.int32(0), state))[1]


def _read_byte(state: State, byte: jax.Array, active: jax.Array) -> State:
    """byte i32 [R], active bool [R]."""
    tables = build()
    following = jnp.asarray(tables.next)[state.state * tables.num_classes + jnp.asarray(tables.byte_class)[byte]]
    following = jnp.where(active, following, _Builder.NOTHING)
    action = _Action(*jnp.moveaxis(jnp.asarray(tables.action)[following], -1, 0))

    num_frames = jnp.where(action.clear == 1, 0, state.num_frames) + (action.begin & (action.slot == _FRAMES))
    slot = action.slot + jnp.where(action.slot == _FRAMES, num_frames - 1, 0)
    here = slot[:, None] == jnp.arange(_SLOTS)
    begin = action.begin[:, None] == 1
    digit = (byte - ord("0"))[:, None]
    units = jnp.where(begin, 0, state.units)
    shifted = jnp.where(units > MAX_UNITS // 10, MAX_UNITS, units * 10 + digit)
    units = jnp.where(action.digit[:, None] == 1, shifted, units)
    micros = jnp.where(begin, 0, state.micros) + action.micros[:, None] * digit
    power = action.power[:, None]
    exponent = jnp.where(begin, 0, jnp.where(power == 0, state.exponent, state.exponent * 10 + power * digit))
    opens = (action.call | action.arguments) == 1
    at_target = action.slot == _TARGET
    new = State(
        state=jnp.where(following == tables.restore, state.saved, following),
        saved=jnp.where(byte == ord("<"), jnp.asarray(tables.save)[state.state], state.saved),
        tool=jnp.where(action.call == 1, -1, jnp.where(action.name > 0, action.name - 1, state.tool)),
        keys=jnp.where(opens, 0, state.keys | action.key),
        units=jnp.where(here, units, state.units),
        micros=jnp.where(here[:, :_FRAMES], micros, state.micros),
        exponent=jnp.where(here[:, :_FRAMES], jnp.clip(exponent, -MAX_SHIFT, MAX_SHIFT), state.exponent),
        negative=jnp.where(here & begin, byte[:, None] == ord("-"), state.negative),
        target_integer=jnp.where(
            at_target & (action.begin == 1), True, state.target_integer & ~(at_target & (action.real == 1))
        ),
        num_frames=num_frames,
    )
    # The wide registers are already untouched where inactive: no action belongs to NOTHING.
    return new._replace(
        state=jnp.where(active, new.state, state.state), saved=jnp.where(active, new.saved, state.saved)
    )


def finish(state: State) -> Calls:
    """What the text read so far asks for, if it is the whole response."""
    tables = build()
    complete = jnp.asarray(tables.complete)[state.state]
    crop, select = (
        complete & (state.tool == tool) & (state.keys & _NEEDS[tool] == _NEEDS[tool]) for tool in (CROP, SELECT)
    )
    units, micros = _shift(state.units[:, :_FRAMES], state.micros, state.exponent)
    state = state._replace(units=state.units.at[:, :_FRAMES].set(units), micros=micros)
    signed = jnp.where(state.negative, -state.units, state.units)
    box = crop[:, None] & jnp.ones(BOX_NUMBERS, bool)
    num_frames = jnp.where(select, state.num_frames, 0)
    return Calls(
        required=jnp.asarray(tables.required)[state.state],
        valid=crop | select,
        tool=jnp.where(crop | select, state.tool, -1),
        box_units=jnp.where(box, state.units[:, :BOX_NUMBERS], 0),
        box_micros=jnp.where(box, state.micros[:, :BOX_NUMBERS], 0),
        box_negative=box & state.negative[:, :BOX_NUMBERS],
        target_image=jnp.where(crop, signed[:, _TARGET], 0),
        target_micros=jnp.where(crop, state.micros[:, _TARGET], 0),
        target_integer=crop & state.target_integer,
        frames=jnp.where(jnp.arange(MAX_FRAMES) < num_frames[:, None], signed[:, _FRAMES:], 0),
        num_frames=num_frames,
    )


def _shift(units: jax.Array, micros: jax.Array, places: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Numbers times ten to the power of `places`, -MAX_SHIFT to MAX_SHIFT: read as the grammar says."""

    def by_one(i, number):
        units, micros = number
        more = jnp.where(units > MAX_UNITS // 10, MAX_UNITS, units * 10 + micros // 100_000), micros % 100_000 * 10
        less = units // 10, (units % 10 * 10**6 + micros) // 10
        return tuple(
            jnp.select([places > i, places < -i], [up, down], same)
            for up, down, same in zip(more, less, number, strict=True)
        )

    return jax.lax.fori_loop(0, MAX_SHIFT, by_one, (units, micros))
