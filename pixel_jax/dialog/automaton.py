"""The language of `grammar.py` on the device: an automaton over the bytes of the tokens that a policy writes.

Whether a text is a call is the state of a finite automaton that it ends in (some five hundred states for the released
tools, built here from the language). Which tool and keys it had, and what its numbers are worth, is kept beside it in integer
registers, by an action that hangs on the state entered.

Three marks begin with "<" and contain no other "<", so one state tells how much of a mark has been read: the opening mark
starts a call anew, wherever it appears; the closing mark ends one; `<|im_end|>` is taken out of the text, so the automaton
goes back to where it was before the mark's "<", which is all that has to be remembered.

    parser = call_parser(language)
    state = parser.init(rows)
    state = parser.step(table, state, tokens)   # tokens i32 [R]; ids outside the vocabulary, as -1, are nothing
    calls = parser.finish(state)                # may be asked at any time
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.dialog.grammar import (
    END,
    MAX_SHIFT,
    MAX_UNITS,
    RELEASED_LANGUAGE,
    WHITE_SPACE,
    DecimalNumber,
    Language,
    Value,
)
from pixel_jax.dialog.tokenizer import TokenBytes, Vocabulary
from pixel_jax.tools import tool as kinds
from pixel_jax.tools.calls import Calls
from pixel_jax.tools.tool import BOX_NUMBERS, Argument, ToolError

MAX_STATES = 20_000
_NO_SLOT, _UNUSED = -1, 2**30

DIGITS = b"0123456789"
# What a string of a further key may hold as it is: no quotation mark, backslash, control character, or beginning of a mark.
_PLAIN = bytes(byte for byte in range(32, 256) if byte not in b'"\\<')


class Register(NamedTuple):
    """Where the value of a key is kept."""

    argument: Argument
    bit: int  # of `State.keys`
    start: int  # its first number
    count: int
    list: int  # its place among the lists, or -1


class Layout(NamedTuple):
    """The registers of a language: numbers with decimals first."""

    registers: dict[str, Register]  # by key
    numbers: int
    decimals: int  # numbers that may have decimals
    lists: tuple[int, ...]  # how many numbers of each are kept

    @classmethod
    def of(cls, language: Language) -> Layout:
        decimal = lambda argument: argument.kind in ("number", "box")
        order = sorted(
            language.keys.values(), key=lambda argument: (not decimal(argument), argument.kind == "integers")
        )
        registers, at, lists = {}, 0, []
        for bit, argument in enumerate(order):
            place = len(lists) if isinstance(argument, kinds.Integers) else -1
            lists += [argument.most] if place >= 0 else []
            registers[argument.name] = Register(argument, 1 << bit, at, argument.slots, place)
            at += argument.slots
        return cls(registers, at, sum(x.count for x in registers.values() if decimal(x.argument)), tuple(lists))


class ParserState(NamedTuple):
    """Automaton and registers of R rows; N numbers, D of them with decimals, L lists (`Layout`)."""

    state: jax.Array  # i32 [R]
    saved: jax.Array  # i32 [R]          the state to go back to if the "<" just read begins <|im_end|>
    tool: jax.Array  # i32 [R]           the name that was read, -1: none
    keys: jax.Array  # i32 [R]           the keys of the arguments that were read
    units: jax.Array  # i32 [R, N]
    micros: jax.Array  # i32 [R, D]
    exponent: jax.Array  # i32 [R, D]
    negative: jax.Array  # bool [R, N]
    integer: jax.Array  # bool [R, D]
    lengths: jax.Array  # i32 [R, L]     integers of each list


class _Action(NamedTuple):
    """What entering a state does to the registers."""

    slot: int = _NO_SLOT  # which number the byte belongs to; of a list, the first
    begin: int = 0  # the byte is its first character
    digit: int = 0  # the byte is a digit before the point
    micros: int = 0  # what a digit behind the point is worth
    power: int = 0  # the byte is a digit of an exponent: 1, or -1 behind a minus
    real: int = 0  # the byte makes it no integer
    list: int = 0  # the number, or the bracket, is of list `list` - 1
    clear: int = 0  # the byte opens that list
    option: int = 0  # the byte ends the option `option` - 1, which the number becomes
    call: int = 0  # the byte opens a call: nothing of it was read
    arguments: int = 0  # the byte opens the arguments: none of their keys was read
    key: int = 0  # the byte begins the value of this key of theirs, a bit
    name: int = 0  # the byte ends the name of tool `name` - 1


class Automaton(NamedTuple):
    """The tables: `next[state * num_classes + byte_class[byte]]`. Two states carry no meaning of their own: 0, where
    nothing is under way, and `restore`, which stands for the saved one.
    """

    next: np.ndarray  # i32 [S * C]
    byte_class: np.ndarray  # i32 [256]
    num_classes: int
    action: np.ndarray  # i32 [S, 13]    columns of _Action
    save: np.ndarray  # i32 [S]          what to go back to after <|im_end|>
    restore: int
    required: np.ndarray  # bool [S]
    complete: np.ndarray  # bool [S]     required, and an object of the grammar stands between the marks


class _Builder:
    """Builds the automaton. A state is a dict from byte to state; a byte without an entry leads to `NOTHING`, and "<"
    to the beginning of a mark.
    """

    NOTHING = 0

    def __init__(self, language: Language, layout: Layout):
        self.language, self.layout = language, layout
        self.opening, self.closing = language.format.opening.encode(), language.format.closing.encode()
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
        (self.call if language.named else self.nameless)(start, accepted)

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
            self.spell(state, {self.opening[1:]: start, self.closing[1:]: required})
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
        ends = [self.like(after, _Action(name=1 + tool)) for tool in range(len(self.language.tools))]
        names = [b'"%s"' % spelling.name.encode() for spelling in self.language.spellings]
        self.spell(name, dict(zip(names, ends, strict=True)))
        self.edges[arguments][ord("{")] = self.arguments(after, _Action(arguments=1))

    def nameless(self, start: int, accepted: int):
        self.edges[start][ord("{")] = self.arguments(accepted, _Action(arguments=1, name=1))

    def arguments(self, closed: int, action: _Action) -> int:
        """The state behind the "{" of the object of the arguments, which ends in `closed`."""
        after = self.spaced()
        starts = {key.encode(): self.spaced() for key in self.layout.registers}
        behind = self.object(after, closed, starts, action)
        for start, register in zip(starts.values(), self.layout.registers.values(), strict=True):
            match register.argument:
                case kinds.Box() | kinds.Integers():
                    mark = {"list": 1 + register.list, "clear": 1} if register.list >= 0 else {}
                    self.edges[start][ord("[")] = opened = self.spaced(_Action(key=register.bit, **mark))
                    if register.list < 0:
                        self.box(opened, after, register)
                    else:
                        self.edges[opened][ord("]")] = after
                        self.numbers(opened, after, register)
                case kinds.Choice():
                    options = enumerate(register.argument.options, 1)
                    ends = {
                        option: self.like(after, _Action(register.start, key=register.bit, option=i))
                        for i, option in options
                    }
                    self.spell(start, {b'"%s"' % option.encode(): end for option, end in ends.items()})
                case kinds.Text():
                    self.string(start, self.like(after, _Action(key=register.bit)))
                case _:
                    self.number(start, after, register, key=register.bit)
        return behind

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
        self.number(start, after)
        self.spell(start, dict.fromkeys((b"true", b"false", b"null"), after))
        self.string(start, after)

    def string(self, start: int, after: int):
        string, escape = self.state(), self.state()
        self.edges[start][ord('"')] = string
        self.edges[string] |= dict.fromkeys(_PLAIN, string) | {ord("\\"): escape, ord('"'): after}
        self.edges[escape] |= dict.fromkeys(b'"\\/bfnrt', string)
        digits = [self.state() for _ in range(4)]
        self.edges[escape][ord("u")] = digits[0]
        for digit, following in zip(digits, [*digits[1:], string], strict=True):
            self.edges[digit] |= dict.fromkeys(DIGITS + b"abcdefABCDEF", following)

    def box(self, start: int, after: int, register: Register):
        for side in range(BOX_NUMBERS):
            ended, following = self.spaced(), self.spaced()
            self.edges[ended][ord(",")] = following
            if side == BOX_NUMBERS - 1:
                self.edges[ended][ord("]")] = after
            self.number(start, ended, register._replace(start=register.start + side))
            start = following
        self.numbers(start, after)

    def numbers(self, start: int, after: int, register: Register | None = None):
        """One or more numbers and the "]" behind them."""
        ended, following = self.spaced(), self.spaced()
        self.edges[ended] |= {ord("]"): after, ord(","): following}
        self.number(start, ended, register)
        # The numbers behind a comma are the same states as the first.
        self.edges[following] |= {byte: self.edges[start][byte] for byte in b"-" + DIGITS}

    def number(self, start: int, ended: int, register: Register | None = None, key: int = 0):
        """A number from `start`, which nothing is kept of without a register; what may follow it may follow in `ended`."""
        slot, place = (_NO_SLOT, -1) if register is None else (register.start, register.list)
        of = functools.partial(_Action, slot, list=1 + place)
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
        if register is not None and isinstance(register.argument, kinds.Integer | kinds.Integers):
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
def build(language: Language = RELEASED_LANGUAGE) -> Automaton:
    """The automaton of a language."""
    builder = _Builder(language, Layout.of(language))
    count = len(builder.edges)
    if count > MAX_STATES:
        names = [tool.name for tool in language.tools]
        raise ToolError(f"the calls of {names} take {count} states, more than {MAX_STATES}: shorten names and options")
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


class Reading(NamedTuple):
    """Where `Calls` come from, of every tool: T tools, S slots, A arguments, L lists."""

    needs: np.ndarray  # i32 [T]        bits of the keys that it must be given
    keys: np.ndarray  # i32 [T, A]      the bit of an argument's key, 0: none
    slot_keys: np.ndarray  # i32 [T, S]  the same, of the argument that a slot is of
    source: np.ndarray  # i32 [T, S]    the register of a slot
    add: np.ndarray  # i32 [T, S]
    default: np.ndarray  # i32 [T, S, 4]  units, micros, negative, integer
    member: np.ndarray  # i32 [T, S]    which of its list's numbers a slot is; -1: of no list, and _UNUSED: of nothing
    slot_list: np.ndarray  # i32 [T, S]  which of the tool's lists
    lists: np.ndarray  # i32 [T, L]     which of the state's lists, -1: none
    list_keys: np.ndarray  # i32 [T, L]
    default_length: np.ndarray  # i32 [T, L]
    low: np.ndarray  # i32 [T, S, 2]    bounds, signed units and millionths
    high: np.ndarray  # i32 [T, S, 2]
    bounded: bool  # whether any number has some

    @classmethod
    def of(cls, language: Language, layout: Layout) -> Reading:
        tools = language.tools
        slots = max(1, *(tool.slots for tool in tools)) if tools else 1
        most, lists = (
            max([1, *(len(x) for x in xs)]) for xs in ([t.arguments for t in tools], [t.lists for t in tools])
        )
        table = lambda *shape, fill=0: np.full((max(1, len(tools)), *shape), fill, np.int32)
        reading = cls(
            table(), table(most), *(table(slots) for _ in range(3)), table(slots, 4), table(slots, fill=_UNUSED), table(slots),
            table(lists, fill=-1), table(lists), table(lists), table(slots, 2, fill=-(10**9) - 1),
            table(slots, 2, fill=10**9 + 1), False,
        )  # fmt: skip
        for t, (tool, reads) in enumerate(zip(tools, language.reads, strict=True)):
            for a, read in enumerate(reads):
                reading = reading._read(t, a, tool, read, layout)
        return reading

    def _read(self, t: int, a: int, tool, read, layout: Layout) -> Reading:
        """The same tables, with argument `a` of tool `t` in them."""
        argument = read.argument
        register = layout.registers.get(read.key)
        bit = register.bit if register else 0
        at = tool.starts[argument.name]
        mine = slice(at, at + argument.slots)
        self.keys[t, a] = self.slot_keys[t, mine] = bit
        self.needs[t] |= bit if read.default is None else 0
        self.add[t, mine], self.member[t, mine] = read.add, -1
        if register and argument.slots:
            # A list of another tool may be longer.
            self.source[t, mine] = register.start + np.minimum(np.arange(argument.slots), register.count - 1)
        if read.default is not None:
            numbers = _numbers(argument, read.default)
            self.default[t, at : at + len(numbers)] = numbers
        if isinstance(argument, kinds.Integers):
            place = tool.lists.index(argument.name)
            self.member[t, mine], self.slot_list[t, mine] = np.arange(argument.slots), place
            self.lists[t, place], self.list_keys[t, place] = register.list if register else -1, bit
            self.default_length[t, place] = 0 if read.default is None else len(read.default)
        bounded = self.bounded
        if isinstance(argument, kinds.Number):
            for bounds, value in ((self.low, argument.low), (self.high, argument.high)):
                if np.isfinite(value):
                    bounds[t, at], bounded = DecimalNumber.of(value).signed(), True
        return self._replace(bounded=bounded)


def _numbers(argument: Argument, value: Value) -> list[DecimalNumber]:
    """A default in number slots."""
    whole = lambda integer: DecimalNumber(abs(integer), 0, integer < 0, True)
    match argument:
        case kinds.Text():
            return []
        case kinds.Choice():
            return [whole(argument.options.index(value))]
        case kinds.Integers():
            return [whole(integer) for integer in value]
        case kinds.Integer():
            return [whole(value)]
        case kinds.Box():
            return list(value)
    return [value]


@dataclasses.dataclass(frozen=True, eq=False)
class CallParser:
    """Reads the calls of a language on the device. Static; `call_parser` has one for each language."""

    language: Language
    layout: Layout
    tables: Automaton
    reading: Reading

    def init(self, rows: int) -> ParserState:
        """The state of `rows` responses of which nothing has been written."""
        numbers, decimals, lists = self.layout.numbers, self.layout.decimals, len(self.layout.lists)
        return ParserState(
            state=jnp.full(rows, _Builder.NOTHING, jnp.int32),
            saved=jnp.full(rows, _Builder.NOTHING, jnp.int32),
            tool=jnp.full(rows, -1, jnp.int32),
            keys=jnp.zeros(rows, jnp.int32),
            units=jnp.zeros((rows, numbers), jnp.int32),
            micros=jnp.zeros((rows, decimals), jnp.int32),
            exponent=jnp.zeros((rows, decimals), jnp.int32),
            negative=jnp.zeros((rows, numbers), bool),
            integer=jnp.zeros((rows, decimals), bool),
            lengths=jnp.zeros((rows, lists), jnp.int32),
        )

    def step(self, table: TokenTable, state: ParserState, tokens: jax.Array) -> ParserState:
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
            return i + 1, self._read_byte(state, byte.astype(jnp.int32), i < length)

        with jax.named_scope("bytes"):
            return jax.lax.while_loop(lambda carry: carry[0] < longest, read, (jnp.int32(0), state))[1]

    def _read_byte(self, state: ParserState, byte: jax.Array, active: jax.Array) -> ParserState:
        """byte i32 [R], active bool [R]."""
        tables, layout = self.tables, self.layout
        following = jnp.asarray(tables.next)[state.state * tables.num_classes + jnp.asarray(tables.byte_class)[byte]]
        following = jnp.where(active, following, _Builder.NOTHING)
        action = _Action(*jnp.moveaxis(jnp.asarray(tables.action)[following], -1, 0))

        slot, lengths = action.slot, state.lengths
        if layout.lists:
            of = action.list[:, None] == jnp.arange(1, 1 + len(layout.lists))  # [R, L]
            lengths = jnp.where(of & (action.clear == 1)[:, None], 0, lengths) + (of & (action.begin == 1)[:, None])
            member = jnp.sum(jnp.where(of, lengths - 1, 0), axis=1)
            slot = slot + member
            if len(layout.lists) > 1:  # what is too long for the last list is beyond all registers
                slot = jnp.where(jnp.any(of & (lengths > jnp.asarray(layout.lists)), axis=1), _NO_SLOT, slot)
        here = slot[:, None] == jnp.arange(layout.numbers)
        decimal = here[:, : layout.decimals]
        begin = action.begin[:, None] == 1
        digit = (byte - ord("0"))[:, None]
        units = jnp.where(begin, 0, state.units)
        shifted = jnp.where(units > MAX_UNITS // 10, MAX_UNITS, units * 10 + digit)
        units = jnp.where(action.digit[:, None] == 1, shifted, units)
        if any(isinstance(register.argument, kinds.Choice) for register in layout.registers.values()):
            units = jnp.where(action.option[:, None] > 0, action.option[:, None] - 1, units)
        micros = jnp.where(begin, 0, state.micros) + action.micros[:, None] * digit
        power = action.power[:, None]
        exponent = jnp.where(begin, 0, jnp.where(power == 0, state.exponent, state.exponent * 10 + power * digit))
        opens = (action.call | action.arguments) == 1
        new = ParserState(
            state=jnp.where(following == tables.restore, state.saved, following),
            saved=jnp.where(byte == ord("<"), jnp.asarray(tables.save)[state.state], state.saved),
            tool=jnp.where(action.call == 1, -1, jnp.where(action.name > 0, action.name - 1, state.tool)),
            keys=jnp.where(opens, 0, state.keys | action.key),
            units=jnp.where(here, units, state.units),
            micros=jnp.where(decimal, micros, state.micros),
            exponent=jnp.where(decimal, jnp.clip(exponent, -MAX_SHIFT, MAX_SHIFT), state.exponent),
            negative=jnp.where(here & begin, byte[:, None] == ord("-"), state.negative),
            integer=jnp.where(decimal, begin | (state.integer & (action.real[:, None] == 0)), state.integer),
            lengths=lengths,
        )
        # The wide registers are already untouched where inactive: no action belongs to NOTHING.
        return new._replace(
            state=jnp.where(active, new.state, state.state), saved=jnp.where(active, new.saved, state.saved)
        )

    def finish(self, state: ParserState) -> Calls:
        """What the text read so far asks for, if it is the whole response."""
        layout, tables = self.layout, self.tables
        tool = jnp.maximum(state.tool, 0)
        of = Reading(*(x if isinstance(x, bool) else jnp.asarray(x)[tool] for x in self.reading))
        whole = layout.numbers - layout.decimals
        units, micros = state.units, state.micros
        if layout.decimals:
            places = np.zeros(layout.decimals, np.int32)
            for register in layout.registers.values():
                if isinstance(register.argument, kinds.Box):
                    places[register.start : register.start + register.count] = self.language.format.places
            moved, micros = _shift(
                units[:, : layout.decimals],
                micros,
                state.exponent + places,
                MAX_SHIFT + abs(self.language.format.places),
            )
            units = units.at[:, : layout.decimals].set(moved)
        # One register more, which is zero: that of the slots that have none, where there are no registers at all.
        registers = (
            jnp.pad(units, ((0, 0), (0, 1))),
            jnp.pad(micros, ((0, 0), (0, whole + 1))),
            jnp.pad(state.negative, ((0, 0), (0, 1))),
            jnp.pad(state.integer, ((0, 0), (0, whole + 1)), constant_values=True),
        )
        units, micros, negative, integer = (jnp.take_along_axis(x, of.source, axis=1) for x in registers)
        if np.any(self.reading.add):
            signed = jnp.where(negative, -units, units) + of.add
            units, negative = (
                jnp.where(of.add == 0, x, y) for x, y in ((units, jnp.abs(signed)), (negative, signed < 0))
            )
        given = (state.keys[:, None] & of.keys) != 0
        known = (state.keys[:, None] & of.slot_keys) != 0
        standard = of.default[..., 0], of.default[..., 1], of.default[..., 2] == 1, of.default[..., 3] == 1
        units, micros, negative, integer = (
            jnp.where(known, x, other) for x, other in zip((units, micros, negative, integer), standard, strict=True)
        )
        lengths = jnp.pad(state.lengths, ((0, 0), (0, 1)))
        lengths = jnp.where(
            (state.keys[:, None] & of.list_keys) != 0, jnp.take_along_axis(lengths, of.lists, axis=1), of.default_length
        )
        there = of.member < jnp.take_along_axis(lengths, of.slot_list, axis=1)
        valid = jnp.asarray(tables.complete)[state.state] & (state.tool >= 0) & (state.keys & of.needs == of.needs)
        if self.reading.bounded:
            sign = jnp.where(negative, -1, 1)
            valid &= jnp.all(_at_least(sign * units, sign * micros, of.low), axis=1)
            valid &= jnp.all(_at_least(-sign * units, -sign * micros, -of.high), axis=1)
        keep = lambda x: jnp.where(valid.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros_like(x))
        slots = [jnp.where(there, x, jnp.zeros_like(x)) for x in (units, micros, negative, integer)]
        return Calls(
            required=jnp.asarray(tables.required)[state.state],
            valid=valid,
            tool=jnp.where(valid, state.tool, -1),
            given=keep(given),
            units=keep(slots[0]),
            micros=keep(slots[1]),
            negative=keep(slots[2]),
            integer=keep(slots[3]),
            lengths=keep(lengths),
        )


@functools.cache
def call_parser(language: Language = RELEASED_LANGUAGE) -> CallParser:
    """The parser of a language. One for each: it is part of what compiled programs are known by."""
    layout = Layout.of(language)
    return CallParser(language, layout, build(language), Reading.of(language, layout))


def _at_least(units: jax.Array, micros: jax.Array, bound: jax.Array) -> jax.Array:
    """Whether signed units and millionths are at least those of `bound` [..., 2]."""
    return (units > bound[..., 0]) | ((units == bound[..., 0]) & (micros >= bound[..., 1]))


def _shift(units: jax.Array, micros: jax.Array, places: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
    """Numbers times ten to the power of `places`, -steps to steps: read as the grammar says."""

    def by_one(i, number):
        units, micros = number
        more = jnp.where(units > MAX_UNITS // 10, MAX_UNITS, units * 10 + micros // 100_000), micros % 100_000 * 10
        less = units // 10, (units % 10 * 10**6 + micros) // 10
        return tuple(
            jnp.select([places > i, places < -i], [up, down], same)
            for up, down, same in zip(more, less, number, strict=True)
        )

    return jax.lax.fori_loop(0, steps, by_one, (units, micros))
