"""Parsed calls of R rows as arrays, and the values of one tool's arguments among them."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.arrays import AnyArray
from pixel_jax.tools.tool import Argument, Box, Choice, Integer, Integers, Number, Tool


class Values(NamedTuple):
    """The arguments of calls of any tools, as numbers; `ParsedCalls` explains the fields."""

    units: AnyArray  # int32 [..., S]
    micros: AnyArray  # int32 [..., S]
    negative: AnyArray  # bool [..., S]
    integer: AnyArray  # bool [..., S]
    lengths: AnyArray  # int32 [..., L]

    def numbers(self, slots: int | slice) -> Numbers:
        """Returns the numbers in some of the S slots."""
        return Numbers(
            self.units[..., slots], self.micros[..., slots], self.negative[..., slots], self.integer[..., slots]
        )


class ParsedCalls(NamedTuple):
    """The calls in the responses of R rows; everything but `required` and `valid` is zero (tool: -1) unless valid.

    S, L and A are the most number slots, lists and arguments of any tool (at least 1 each); the slots of a tool's arguments begin
    at `tool.starts`. A number is (-1)^negative * (units + micros / 10^6); of a choice, `units` is its index among the options.
    """

    required: jax.Array  # bool [R], the response ends with the mark that closes a call
    valid: jax.Array  # bool [R], and its call is in the grammar
    tool: jax.Array  # int32 [R], index into the tuple of tools, -1: none
    given: jax.Array  # bool [R, A], the call writes this argument; else it has its default
    units: jax.Array  # int32 [R, S]
    micros: jax.Array  # int32 [R, S]
    negative: jax.Array  # bool [R, S]
    integer: jax.Array  # bool [R, S], written without a decimal point or an exponent
    lengths: jax.Array  # int32 [R, L], length of a list as written, which may be more than is stored

    @property
    def values(self) -> Values:
        """The arguments alone."""
        return Values(self.units, self.micros, self.negative, self.integer, self.lengths)


class Numbers(NamedTuple):
    """Decimal numbers (-1)^negative * (units + micros / 10^6): [...], of a box [..., 4]."""

    units: AnyArray  # int32
    micros: AnyArray  # int32
    negative: AnyArray  # bool
    integer: AnyArray  # bool, written without a decimal point or an exponent

    @property
    def signed_units(self) -> jax.Array:
        """Numbers without their decimals: int32."""
        return jnp.where(self.negative, -self.units, self.units)


class Lists(NamedTuple):
    """Lists of integers."""

    values: AnyArray  # int32 [..., most], zero beyond `length`
    length: AnyArray  # int32 [...], as written; may be more than `most`


ArgumentArrays: TypeAlias = AnyArray | Numbers | Lists  # what `execute` and `draw` of a device tool get


def no_values(lead: tuple[int, ...], tools: Sequence[Tool], xp: ModuleType = np) -> Values:
    """Returns zeros [*lead, ...] for the arguments of any of the tools; `xp` is NumPy or `jax.numpy`."""
    slots, lists = (max([1, *counts]) for counts in ([t.slots for t in tools], [len(t.lists) for t in tools]))
    numbers = [xp.zeros((*lead, slots), dtype) for dtype in (np.int32, np.int32, bool, bool)]
    return Values._make([*numbers, xp.zeros((*lead, lists), np.int32)])


def read(tool: Tool, values: Values) -> dict[str, ArgumentArrays]:
    """Returns the arguments of calls [...] of `tool`, by name.

    Number: `Numbers` [...]; Box: `Numbers` [..., 4]; Integer: int32 [...]; Integers: `Lists`; Choice: int32 [...], the index of
    its option. Texts are left out.
    """
    arguments: dict[str, ArgumentArrays] = {}
    for argument in tool.arguments:
        start = tool.starts[argument.name]
        slots = slice(start, start + argument.slots)
        match argument:
            case Integer():
                arguments[argument.name] = values.numbers(start).signed_units
            case Number():
                arguments[argument.name] = values.numbers(start)
            case Box():
                arguments[argument.name] = values.numbers(slots)
            case Integers():
                length = values.lengths[..., tool.lists.index(argument.name)]
                arguments[argument.name] = Lists(values.numbers(slots).signed_units, length)
            case Choice():
                arguments[argument.name] = values.units[..., start]
    return arguments


def python_values(tool: Tool, values: Values) -> dict[str, Any]:
    """Returns the arguments of one call as Python values: a box is four floats, a choice its text."""
    by_name = {argument.name: argument for argument in tool.arguments}
    return {name: _python_value(by_name[name], value) for name, value in read(tool, values).items()}


def _python_value(argument: Argument, value: Any) -> Any:
    match value:
        case Numbers(units, micros, negative):
            numbers = np.where(negative, -1, 1) * (np.asarray(units, np.int64) * 10**6 + micros) / 10**6
            return tuple(numbers.tolist()) if numbers.ndim else float(numbers)
        case Lists(items, length):
            return tuple(int(x) for x in items[: int(length)])
    return argument.options[int(value)] if isinstance(argument, Choice) else int(value)


def arguments(calls: ParsedCalls, tools: tuple[Tool, ...], tool: Tool) -> dict[str, ArgumentArrays]:
    """Returns the arguments of the rows that call `tool`, by name (`read`); zeros in the other rows."""
    mine = calls.tool == tools.index(tool)
    return read(tool, jax.tree.map(lambda x: jnp.where(mine[:, None], x, jnp.zeros_like(x)), calls.values))
