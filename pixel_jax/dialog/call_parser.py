"""The parser of tool calls on the device: it reads the tokens that a policy writes with the automaton of `automaton.py`.

parser = call_parser(language)
state = parser.init(rows)
state = parser.step(table, state, tokens)   # tokens int32 [R]; ids outside the vocabulary, such as -1, change nothing
calls = parser.finish(state)                # may be called at any time
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
    """The state and the registers of R rows; N numbers, D of them with decimals, L lists (`RegisterLayout`)."""

    state: jax.Array  # int32 [R], of the automaton
    saved: jax.Array  # int32 [R], the state to go back to if the "<" just read begins <|im_end|>
    tool: jax.Array  # int32 [R], index of the tool whose name was read, -1: none
    keys: jax.Array  # int32 [R], bits of the keys that were read
    units: jax.Array  # int32 [R, N]
    micros: jax.Array  # int32 [R, D]
    exponent: jax.Array  # int32 [R, D]
    negative: jax.Array  # bool [R, N]
    integer: jax.Array  # bool [R, D]
    lengths: jax.Array  # int32 [R, L], integers read of each list


class TokenTable(NamedTuple):
    """The bytes of every token on the device: token v is `data[start[v] : start[v] + length[v]]`."""

    data: AnyArray  # uint8 [N]
    start: AnyArray  # int32 [V]
    length: AnyArray  # int32 [V]
    quiet: AnyArray  # int32 [V], bytes before the first "<", which change nothing in the state NOTHING

    @classmethod
    def of(cls, tokens: Sequence[bytes]) -> TokenTable:
        """Makes the table, on the host."""
        quiet = np.array([len(token.partition(b"<")[0]) for token in tokens], np.int32)
        return cls(*TokenBytes.of(tokens), quiet)


def token_table(vocabulary: Vocabulary) -> TokenTable:
    """Makes the table of a vocabulary, on the device."""
    tokens = [vocabulary.to_bytes([index]) for index in range(len(vocabulary.table.start))]
    return jax.tree.map(jnp.asarray, TokenTable.of(tokens))


class ArgumentTables(NamedTuple, Generic[Array]):
    """Tables by which the slots of `ParsedCalls` are filled from the registers, for T tools; S slots, A arguments, L lists.

    Indexed by the tools that rows have called, on the device, [T, ...] becomes [R, ...].
    """

    needs: Array  # int32 [T], bits of the keys that a call must have
    keys: Array  # int32 [T, A], bit of an argument's key, 0: none
    slot_keys: Array  # int32 [T, S], bit of the key of a slot's argument
    source: Array  # int32 [T, S], register of a slot
    add: Array  # int32 [T, S], summand of the number
    default: Array  # int32 [T, S, 4], units, micros, negative, integer
    member: Array  # int32 [T, S], index of a slot in its list; -1: of no list, UNUSED: the tool has no such slot
    slot_list: Array  # int32 [T, S], index of a slot's list among the tool's
    lists: Array  # int32 [T, L], index of a list among the parser state's, -1: none
    list_keys: Array  # int32 [T, L], bit of the key of a list
    default_length: Array  # int32 [T, L]
    low: Array  # int32 [T, S, 2], lower bound, signed units and millionths
    high: Array  # int32 [T, S, 2], upper bound
    bounded: bool  # whether any number has bounds

    @classmethod
    def of(cls, language: Language, layout: RegisterLayout) -> ArgumentTables[np.ndarray]:
        """Makes the tables of a language."""
        tools = language.tools
        slots = max(1, *(tool.slots for tool in tools)) if tools else 1
        most, lists = (
            max([1, *(len(x) for x in xs)]) for xs in ([t.arguments for t in tools], [t.lists for t in tools])
        )

        def table(*shape: int, fill: int = 0) -> np.ndarray:
            return np.full((max(1, len(tools)), *shape), fill, np.int32)

        tables = ArgumentTables(
            needs=table(),
            keys=table(most),
            slot_keys=table(slots),
            source=table(slots),
            add=table(slots),
            default=table(slots, 4),
            member=table(slots, fill=UNUSED),
            slot_list=table(slots),
            lists=table(lists, fill=-1),
            list_keys=table(lists),
            default_length=table(lists),
            low=table(slots, 2, fill=-(10**9) - 1),
            high=table(slots, 2, fill=10**9 + 1),
            bounded=any(
                isinstance(argument, kinds.Number) and (np.isfinite(argument.low) or np.isfinite(argument.high))
                for tool in tools
                for argument in tool.arguments
            ),
        )
        for t, (tool, sources) in enumerate(zip(tools, language.sources, strict=True)):
            for a, source in enumerate(sources):
                _fill(tables, t, a, tool, source, layout)
        return tables


def _fill(
    tables: ArgumentTables[np.ndarray], t: int, a: int, tool: Tool, source: ArgumentSource, layout: RegisterLayout
) -> None:
    """Fills in argument `a` of tool `t`."""
    argument = source.argument
    register = None if source.key is None else layout.registers.get(source.key)
    bit = register.bit if register else 0
    start = tool.starts[argument.name]
    mine = slice(start, start + argument.slots)
    tables.keys[t, a] = tables.slot_keys[t, mine] = bit
    tables.needs[t] |= bit if source.default is None else 0
    tables.add[t, mine], tables.member[t, mine] = source.add, -1
    if register and argument.slots:
        # The list of another tool may be longer than the registers of this one's.
        tables.source[t, mine] = register.start + np.minimum(np.arange(argument.slots), register.size - 1)
    numbers = [] if source.default is None else _numbers(argument, source.default)
    if numbers:
        tables.default[t, start : start + len(numbers)] = numbers
    if isinstance(argument, kinds.Integers):
        index = tool.lists.index(argument.name)
        tables.member[t, mine], tables.slot_list[t, mine] = np.arange(argument.slots), index
        tables.lists[t, index], tables.list_keys[t, index] = register.list if register else -1, bit
        tables.default_length[t, index] = len(numbers)
    if isinstance(argument, kinds.Number):
        for bounds, value in ((tables.low, argument.low), (tables.high, argument.high)):
            if np.isfinite(value):
                bounds[t, start] = DecimalNumber.of(value).signed()


def _numbers(argument: Argument, value: Value) -> list[DecimalNumber]:
    """Converts a default to the numbers of its slots."""
    match value:
        case str():
            index = argument.options.index(value) if isinstance(argument, kinds.Choice) else None
            return [] if index is None else [_whole(index)]
        case DecimalNumber():
            return [value]
        case int():
            return [_whole(value)]
    return [x if isinstance(x, DecimalNumber) else _whole(x) for x in value]


def _whole(integer: int) -> DecimalNumber:
    return DecimalNumber(abs(integer), 0, integer < 0, True)


@dataclasses.dataclass(frozen=True, eq=False)
class CallParser:
    """Reads the calls of a language on the device. Static: `call_parser` returns the same one for the same language."""

    language: Language
    layout: RegisterLayout
    automaton: Automaton
    arguments: ArgumentTables[np.ndarray]

    def init(self, rows: int) -> ParserState:
        """Returns the state of `rows` empty responses."""
        numbers, decimals, lists = self.layout.numbers, self.layout.decimals, len(self.layout.lists)
        return ParserState(
            state=jnp.full(rows, NOTHING, jnp.int32),
            saved=jnp.full(rows, NOTHING, jnp.int32),
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
        """Reads one token of every row, int32 [R]. An id outside the table changes nothing; -1 stands for no token."""
        known = (tokens >= 0) & (tokens < table.length.shape[0])
        index = jnp.where(known, tokens, 0)
        quiet = jnp.where(state.state == NOTHING, table.quiet[index], 0)
        length = jnp.where(known, table.length[index] - quiet, 0)
        start = table.start[index] + quiet
        # The loop turns as often as the longest token of any row has bytes, equally often on all devices. Outside of calls and
        # marks tokens have no bytes to read.
        longest = jnp.max(length)

        def read(carry):
            i, state = carry
            byte = jnp.asarray(table.data)[jnp.minimum(start + i, table.data.shape[0] - 1)]
            return i + 1, self._read_byte(state, byte.astype(jnp.int32), i < length)

        with jax.named_scope("bytes"):
            return jax.lax.while_loop(lambda carry: carry[0] < longest, read, (jnp.int32(0), state))[1]

    def _read_byte(self, state: ParserState, byte: jax.Array, active: jax.Array) -> ParserState:
        """Reads one byte (int32 [R]) of the rows `active` (bool [R])."""
        tables, layout = self.automaton, self.layout
        following = jnp.asarray(tables.next)[state.state * tables.num_classes + jnp.asarray(tables.byte_class)[byte]]
        following = jnp.where(active, following, NOTHING)
        action: Action[jax.Array] = Action._make(jnp.moveaxis(jnp.asarray(tables.action)[following], -1, 0))

        slot, lengths = action.slot, state.lengths
        if layout.lists:
            listed = action.list[:, None] == jnp.arange(1, 1 + len(layout.lists))  # [R, L]
            lengths = jnp.where(listed & (action.clear == 1)[:, None], 0, lengths) + (
                listed & (action.begin == 1)[:, None]
            )
            member = jnp.sum(jnp.where(listed, lengths - 1, 0), axis=1)
            slot = slot + member
            if len(layout.lists) > 1:  # integers beyond the registers of the last list are beyond all registers
                slot = jnp.where(jnp.any(listed & (lengths > jnp.asarray(layout.lists)), axis=1), NO_SLOT, slot)
        at_slot = slot[:, None] == jnp.arange(layout.numbers)
        decimal = at_slot[:, : layout.decimals]
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
            units=jnp.where(at_slot, units, state.units),
            micros=jnp.where(decimal, micros, state.micros),
            exponent=jnp.where(decimal, jnp.clip(exponent, -MAX_SHIFT, MAX_SHIFT), state.exponent),
            negative=jnp.where(at_slot & begin, byte[:, None] == ord("-"), state.negative),
            integer=jnp.where(decimal, begin | (state.integer & (action.real[:, None] == 0)), state.integer),
            lengths=lengths,
        )
        # The wide registers are already untouched where inactive: no action belongs to NOTHING.
        return new._replace(
            state=jnp.where(active, new.state, state.state), saved=jnp.where(active, new.saved, state.saved)
        )

    def finish(self, state: ParserState) -> ParsedCalls:
        """Returns the calls of the texts read so far, taken as whole responses."""
        layout, tables = self.layout, self.automaton
        tool = jnp.maximum(state.tool, 0)
        own: ArgumentTables[jax.Array] = ArgumentTables._make(
            x if isinstance(x, bool) else jnp.asarray(x)[tool] for x in self.arguments
        )
        whole = layout.numbers - layout.decimals
        units, micros = state.units, state.micros
        if layout.decimals:
            places = np.zeros(layout.decimals, np.int32)
            for register in layout.registers.values():
                if isinstance(register.argument, kinds.Box):
                    places[register.start : register.start + register.size] = self.language.format.places
            moved, micros = _shift(
                units[:, : layout.decimals],
                micros,
                state.exponent + places,
                MAX_SHIFT + abs(self.language.format.places),
            )
            units = units.at[:, : layout.decimals].set(moved)
        # One more register, which is zero, serves the slots without a register where a language has none at all.
        registers = (
            jnp.pad(units, ((0, 0), (0, 1))),
            jnp.pad(micros, ((0, 0), (0, whole + 1))),
            jnp.pad(state.negative, ((0, 0), (0, 1))),
            jnp.pad(state.integer, ((0, 0), (0, whole + 1)), constant_values=True),
        )
        units, micros, negative, integer = (jnp.take_along_axis(x, own.source, axis=1) for x in registers)
        if np.any(self.arguments.add):
            signed = jnp.where(negative, -units, units) + own.add
            units, negative = (
                jnp.where(own.add == 0, x, y) for x, y in ((units, jnp.abs(signed)), (negative, signed < 0))
            )
        given = (state.keys[:, None] & own.keys) != 0
        known = (state.keys[:, None] & own.slot_keys) != 0
        standard = own.default[..., 0], own.default[..., 1], own.default[..., 2] == 1, own.default[..., 3] == 1
        units, micros, negative, integer = (
            jnp.where(known, x, other) for x, other in zip((units, micros, negative, integer), standard, strict=True)
        )
        lengths = jnp.pad(state.lengths, ((0, 0), (0, 1)))
        lengths = jnp.where(
            (state.keys[:, None] & own.list_keys) != 0,
            jnp.take_along_axis(lengths, own.lists, axis=1),
            own.default_length,
        )
        stored = own.member < jnp.take_along_axis(lengths, own.slot_list, axis=1)
        valid = jnp.asarray(tables.complete)[state.state] & (state.tool >= 0) & (state.keys & own.needs == own.needs)
        if self.arguments.bounded:
            sign = jnp.where(negative, -1, 1)
            valid &= jnp.all(_at_least(sign * units, sign * micros, own.low), axis=1)
            valid &= jnp.all(_at_least(-sign * units, -sign * micros, -own.high), axis=1)
        keep = lambda x: jnp.where(valid.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros_like(x))
        slots = [jnp.where(stored, x, jnp.zeros_like(x)) for x in (units, micros, negative, integer)]
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
    """Returns the parser of a language, always the same one, because compiled programs are cached by it."""
    layout = RegisterLayout.of(language)
    return CallParser(language, layout, build(language), ArgumentTables.of(language, layout))


def _at_least(units: jax.Array, micros: jax.Array, bound: jax.Array) -> jax.Array:
    """Whether signed units and millionths are at least those of `bound` [..., 2]."""
    return (units > bound[..., 0]) | ((units == bound[..., 0]) & (micros >= bound[..., 1]))


def _shift(units: jax.Array, micros: jax.Array, places: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
    """Multiplies numbers by ten to the power of `places`, from -steps to steps, with the rounding of the grammar."""

    def by_one(i, number):
        units, micros = number
        more = jnp.where(units > MAX_UNITS // 10, MAX_UNITS, units * 10 + micros // 100_000), micros % 100_000 * 10
        less = units // 10, (units % 10 * 10**6 + micros) // 10
        return tuple(
            jnp.select([places > i, places < -i], [up, down], same)
            for up, down, same in zip(more, less, number, strict=True)
        )

    return jax.lax.fori_loop(0, steps, by_one, (units, micros))
