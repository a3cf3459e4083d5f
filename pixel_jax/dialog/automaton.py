"""The grammar of `grammar.py` on the device: an automaton over the bytes of the tokens that a policy writes.

The verdict is a finite automaton alone: whether a text is a call, and of which tool, is the state it ends in. Keys that
were seen, the place in an array and the length of a number are all part of the state (some two thousand of them, built
here from the grammar). What a number is worth is kept beside it in integer registers, by an action that hangs on the
state entered.

Three marks begin with "<" and contain no other "<", so one state tells how much of a mark has been read:
`<tool_call>` starts a call anew, wherever it appears; `</tool_call>` ends one; `<|im_end|>` is taken out of the text,
so the automaton goes back to where it was before the mark's "<", which is all that has to be remembered.

    state = init(rows)
    state = step(table, state, tokens)      # tokens i32 [R]; ids outside the vocabulary, as -1, are nothing
    calls = finish(state)                   # may be asked at any time
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.dialog.grammar import BOX_NUMBERS, CLOSE, END, MAX_CHARACTERS, MAX_UNITS, OPEN, TOOL_NAMES
from pixel_jax.dialog.tokenizer import TokenBytes, Vocabulary

MAX_FRAMES = 16  # frame numbers that are kept; `num_frames` counts on
WHITE_SPACE = b" \t\n\r"
CROP, SELECT = range(len(TOOL_NAMES))
ARGUMENTS = {CROP: ("bbox_2d", "target_image"), SELECT: ("target_frames",)}

# Number registers: the box, target_image, then the frames.
_TARGET, _FRAMES = BOX_NUMBERS, BOX_NUMBERS + 1
_SLOTS = _FRAMES + MAX_FRAMES


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
    units: jax.Array  # i32 [R, 21]
    micros: jax.Array  # i32 [R, 5]      frames have none
    negative: jax.Array  # bool [R, 21]
    target_integer: jax.Array  # bool [R]
    num_frames: jax.Array  # i32 [R]


class _Action(NamedTuple):
    """What entering a state does to the number registers."""

    slot: int = -1  # which number the byte belongs to; frames count from the running one
    begin: int = 0  # the byte is its first character
    digit: int = 0  # the byte is a digit before the point
    micros: int = 0  # what a digit behind the point is worth
    point: int = 0  # the byte is the point
    clear: int = 0  # the byte opens the list of frames


class Automaton(NamedTuple):
    """The tables: `next[state * num_classes + byte_class[byte]]`. Two states carry no meaning of their own: 0, where
    nothing is under way, and `restore`, which stands for the saved one."""

    next: np.ndarray  # i32 [S * C]
    byte_class: np.ndarray  # i32 [256]
    num_classes: int
    action: np.ndarray  # i32 [S, 6]     columns of _Action
    save: np.ndarray  # i32 [S]          what to go back to after <|im_end|>
    restore: int
    required: np.ndarray  # bool [S]
    tool: np.ndarray  # i32 [S]          the tool of a valid call that ends here, else -1
    killers: frozenset[int]  # bytes after which nothing is under way, whatever was


class _Builder:
    """Builds the automaton. A state is a dict from byte to state; a byte without an entry leads to `NOTHING`, and "<"
    to the beginning of a mark."""

    NOTHING = 0

    def __init__(self):
        self.edges: list[dict[int, int]] = []
        self.actions: list[_Action] = []
        self.named: dict[object, int] = {}
        self.tools: dict[int, int] = {}
        self.saves: dict[int, int] = {}
        assert self.state() == self.NOTHING
        self.restore = self.state()
        self.marks()

    def state(self, action: _Action = _Action()) -> int:  # noqa: B008
        self.edges.append({})
        self.actions.append(action)
        return len(self.edges) - 1

    def once(self, name: object) -> tuple[int, bool]:
        """The state of that name, and whether it is new and wants its edges."""
        new = name not in self.named
        if new:
            self.named[name] = self.state()
        return self.named[name], new

    def spell(self, start: int, texts: Mapping[bytes, int]):
        """Edges from `start` that spell each of `texts` and lead to its state; texts that begin alike share states."""
        between = {b"": start}
        for text, target in texts.items():
            for i, byte in enumerate(text[:-1]):
                if text[: i + 1] not in between:
                    between[text[: i + 1]] = self.edges[between[text[:i]]][byte] = self.state()
            self.edges[between[text[:-1]]][text[-1]] = target

    # The marks. `tool` is that of the valid call right before a mark, or None.

    def marks(self):
        for tool in (None, CROP, SELECT):
            required = self.once(("required", tool))[0]
            if tool is not None:
                self.tools[required] = tool
            rest = {OPEN[1:]: self.value_start(), CLOSE[1:]: required}
            less, barred = self.once(("less", tool))[0], self.once(("barred", tool))[0]
            self.spell(barred, rest)
            self.spell(less, rest)
            self.spell(less, {END[1:]: self.restore})
            # Removal is one pass: a <|im_end|> that only comes about by removing another stays. So a "<" that is gone
            # back to must not begin one. (Further into the mark it may go on: that ends where it was gone back to.)
            self.saves[less] = barred

    # The call. Each method names a state by what has been read and gives it its edges when it is first asked for.

    def white(self, name: object) -> tuple[int, bool]:
        state, new = self.once(name)
        if new:
            self.edges[state] |= dict.fromkeys(WHITE_SPACE, state)
        return state, new

    def value_start(self) -> int:
        state, new = self.white("start")
        if new:
            self.edges[state][ord("{")] = self.member(None, None)
        return state

    def member(self, name: int | None, arguments: int | None) -> int:
        """Before a key of the outer object, which already has these members (each a tool's index, or None)."""
        state, new = self.white(("member", name, arguments))
        if new:
            keys = {}
            if name is None:
                keys[b'"name"'] = self.colon("name", name, arguments)
            if arguments is None:
                keys[b'"arguments"'] = self.colon("arguments", name, arguments)
            self.spell(state, keys)
        return state

    def colon(self, key: str, name: int | None, arguments: int | None) -> int:
        state, new = self.white(("colon", key, name, arguments))
        if new:
            value, _ = self.white(("value", key, name, arguments))
            self.edges[state][ord(":")] = value
            if key == "name":
                tools = (CROP, SELECT) if arguments is None else (arguments,)
                self.spell(value, {b'"%s"' % TOOL_NAMES[t].encode(): self.after_member(t, arguments) for t in tools})
            else:
                self.edges[value][ord("{")] = self.argument(name, ())
        return state

    def after_member(self, name: int | None, arguments: int | None) -> int:
        state, new = self.white(("after member", name, arguments))
        if new and None in (name, arguments):
            self.edges[state][ord(",")] = self.member(name, arguments)
        elif new:
            self.edges[state][ord("}")] = accepted = self.white(("accepted", name))[0]
            self.edges[accepted][ord("<")] = self.once(("less", name))[0]
        return state

    def argument(self, name: int | None, seen: tuple[str, ...]) -> int:
        """Before a key of the arguments, which already have the keys `seen`."""
        state, new = self.white(("argument", name, seen))
        if new:
            keys = {}
            for tool in (CROP, SELECT) if name is None else (name,):
                if set(seen) <= set(ARGUMENTS[tool]):
                    for key in (key for key in ARGUMENTS[tool] if key not in seen):
                        keys[b'"%s"' % key.encode()] = self.argument_colon(name, tool, seen, key)
            self.spell(state, keys)
        return state

    def argument_colon(self, name: int | None, tool: int, seen: tuple[str, ...], key: str) -> int:
        state, new = self.white(("argument colon", name, seen, key))
        if new:
            value, _ = self.white(("argument value", name, seen, key))
            self.edges[state][ord(":")] = value
            after = self.after_argument(name, tool, tuple(sorted({*seen, key})))
            here = (name, seen)
            if key == "bbox_2d":
                self.edges[value][ord("[")] = self.white(("box", *here))[0]
                self.box(self.edges[value][ord("[")], after)
            elif key == "target_image":
                self.number(value, after, _TARGET)
            else:
                self.edges[value][ord("[")] = opened = self.state(_Action(clear=1))
                self.frames(opened, after)
        return state

    def after_argument(self, name: int | None, tool: int, seen: tuple[str, ...]) -> int:
        state, new = self.white(("after argument", name, seen))
        if new and len(seen) < len(ARGUMENTS[tool]):
            self.edges[state][ord(",")] = self.argument(name, seen)
        elif new:
            self.edges[state][ord("}")] = self.after_member(name, tool)
        return state

    def spaced(self) -> int:
        """A new state that white space does not leave."""
        state = self.state()
        self.edges[state] |= dict.fromkeys(WHITE_SPACE, state)
        return state

    def box(self, start: int, after: int):
        for slot in range(BOX_NUMBERS):
            ended = self.spaced()
            self.edges[ended][ord("]" if slot == BOX_NUMBERS - 1 else ",")] = following = (
                after if slot == BOX_NUMBERS - 1 else self.spaced()
            )
            self.number(start, ended, slot)
            start = following

    def frames(self, start: int, after: int):
        self.edges[start] |= dict.fromkeys(WHITE_SPACE, start)
        self.edges[start][ord("]")] = after
        ended, following = self.spaced(), self.spaced()
        self.edges[ended] |= {ord("]"): after, ord(","): following}
        self.number(start, ended, _FRAMES)
        # The numbers behind a comma are the same states as the first.
        self.edges[following] |= {byte: self.edges[start][byte] for byte in b"-0123456789"}

    def number(self, start: int, ended: int, slot: int):
        """A number of at most 12 characters from `start`; what may follow it is what may follow in `ended`."""
        of = functools.partial(_Action, slot)
        made: dict[tuple, int] = {}

        def reach(phase: str, length: int, decimals: int = 0) -> int:
            key = (phase, length, decimals)
            if key in made:
                return made[key]
            if phase == "digits" or phase == "zero":
                action = of(begin=length == 1, digit=1)
            elif phase == "minus":
                action = of(begin=1)
            elif phase == "point":
                action = of(point=1)
            else:
                action = of(micros=10 ** (6 - decimals) if decimals <= 6 else 0)
            made[key] = state = self.state(action)
            edges = self.edges[state]
            if phase in ("digits", "zero", "decimals"):
                edges |= self.edges[ended]
            if length < MAX_CHARACTERS:
                if phase == "minus":
                    edges |= whole(length + 1)
                if phase == "digits":
                    edges |= dict.fromkeys(b"0123456789", reach("digits", length + 1))
                if phase in ("digits", "zero") and slot != _FRAMES:
                    edges[ord(".")] = reach("point", length + 1)
                if phase in ("point", "decimals"):
                    edges |= dict.fromkeys(b"0123456789", reach("decimals", length + 1, decimals + 1))
            return state

        def whole(length: int) -> dict[int, int]:
            return {ord("0"): reach("zero", length)} | dict.fromkeys(b"123456789", reach("digits", length))

        self.edges[start] |= whole(1) | {ord("-"): reach("minus", 1)}


@functools.cache
def build() -> Automaton:
    """The automaton of the grammar."""
    builder = _Builder()
    count = len(builder.edges)
    full = np.zeros((count, 256), np.int32)
    full[:, ord("<")] = builder.named["less", None]
    for state, edges in enumerate(builder.edges):
        for byte, target in edges.items():
            full[state, byte] = target
    columns, byte_class = np.unique(full, axis=1, return_inverse=True)
    save = np.arange(count, dtype=np.int32)
    save[list(builder.saves)] = list(builder.saves.values())
    tool = np.full(count, -1, np.int32)
    tool[list(builder.tools)] = list(builder.tools.values())
    required = np.zeros(count, bool)
    required[[state for name, state in builder.named.items() if name[0] == "required"]] = True
    return Automaton(
        next=np.ascontiguousarray(columns).reshape(-1),
        byte_class=byte_class.reshape(-1).astype(np.int32),
        num_classes=columns.shape[1],
        action=np.array(builder.actions, np.int32),
        save=save,
        restore=builder.restore,
        required=required,
        tool=tool,
        killers=frozenset(np.flatnonzero((full == _Builder.NOTHING).all(0)).tolist()),
    )


def relevant(token: bytes) -> bytes:
    """The part of a token that matters: what stands in front of its last `<tool_call>`, or of its last byte that ends
    whatever is under way, changes nothing."""
    killers = build().killers
    last = max((i for i, byte in enumerate(token) if byte in killers), default=0)
    return token[max(token.rfind(OPEN), last) :]


def token_table(vocabulary: Vocabulary) -> TokenBytes:
    """The bytes of every token, as the device needs them: data u8 [N], start i32 [V], length i32 [V].

    Only the part that matters: a step takes as long as the longest token in the batch.
    """
    tokens = [relevant(vocabulary.to_bytes([index])) for index in range(len(vocabulary.table.start))]
    return TokenBytes(*map(jnp.asarray, TokenBytes.of(tokens)))


def init(rows: int) -> State:
    """The state of `rows` responses of which nothing has been written."""
    return State(
        state=jnp.full(rows, _Builder.NOTHING, jnp.int32),
        saved=jnp.full(rows, _Builder.NOTHING, jnp.int32),
        units=jnp.zeros((rows, _SLOTS), jnp.int32),
        micros=jnp.zeros((rows, _FRAMES), jnp.int32),
        negative=jnp.zeros((rows, _SLOTS), bool),
        target_integer=jnp.zeros(rows, bool),
        num_frames=jnp.zeros(rows, jnp.int32),
    )


def step(table: TokenBytes, state: State, tokens: jax.Array) -> State:
    """Reads one token of every row. tokens i32 [R]; an id outside the table (say -1: the row waits) changes nothing."""
    known = (tokens >= 0) & (tokens < table.length.shape[0])
    index = jnp.where(known, tokens, 0)
    length = jnp.where(known, table.length[index], 0)
    start = table.start[index]
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
    at_target = action.slot == _TARGET
    new = State(
        state=jnp.where(following == tables.restore, state.saved, following),
        saved=jnp.where(byte == ord("<"), jnp.asarray(tables.save)[state.state], state.saved),
        units=jnp.where(here, units, state.units),
        micros=jnp.where(here[:, :_FRAMES], micros, state.micros),
        negative=jnp.where(here & begin, byte[:, None] == ord("-"), state.negative),
        target_integer=jnp.where(
            at_target & (action.begin == 1), True, state.target_integer & ~(at_target & (action.point == 1))
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
    tool = jnp.asarray(tables.tool)[state.state]
    crop, select = tool == CROP, tool == SELECT
    signed = jnp.where(state.negative, -state.units, state.units)
    box = crop[:, None] & jnp.ones(BOX_NUMBERS, bool)
    num_frames = jnp.where(select, state.num_frames, 0)
    return Calls(
        required=jnp.asarray(tables.required)[state.state],
        valid=crop | select,
        tool=tool,
        box_units=jnp.where(box, state.units[:, :BOX_NUMBERS], 0),
        box_micros=jnp.where(box, state.micros[:, :BOX_NUMBERS], 0),
        box_negative=box & state.negative[:, :BOX_NUMBERS],
        target_image=jnp.where(crop, signed[:, _TARGET], 0),
        target_micros=jnp.where(crop, state.micros[:, _TARGET], 0),
        target_integer=crop & state.target_integer,
        frames=jnp.where(jnp.arange(MAX_FRAMES) < num_frames[:, None], signed[:, _FRAMES:], 0),
        num_frames=num_frames,
    )
