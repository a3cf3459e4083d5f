"""The parser of tool calls on the device: it reads the tokens that a policy writes with the automaton of `automaton.py`.

    parser = call_parser(language)
    state = parser.init(rows)
    state = parser.step(table, state, tokens)   # tokens int32 [R]; ids outside the vocabulary, such as -1, change nothing
    calls = parser.finish(state)                # may be asked at any time
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.arrays import AnyArray
from pixel_jax.dialog.automaton import NO_SLOT, NOTHING, Action, Automaton, RegisterLayout, build
from pixel_jax.dialog.grammar import (
    MAX_SHIFT,
    MAX_UNITS,
    RELEASED_LANGUAGE,
    ArgumentSource,
    DecimalNumber,
    Language,
    Value,
)
from pixel_jax.dialog.tokenizer import TokenBytes, Vocabulary
from pixel_jax.tools import tool as kinds
from pixel_jax.tools.calls import ParsedCalls
from pixel_jax.tools.tool import Argument, Tool

UNUSED = 2**30  # member of slots that a tool does not have: larger than the length of any list
Array = TypeVar("Array", np.ndarray, jax.Array)


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

    def finish(self, state: ParserState) -> ParsedCalls:
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
        return ParsedCalls(
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
