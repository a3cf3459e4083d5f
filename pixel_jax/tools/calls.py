"""What was read of the calls of R rows, as arrays, and the values of one tool's arguments among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixel_jax.tools.tool import Argument, Box, Choice, Integer, Integers, Number, Tool


class Values(NamedTuple):
    """The arguments of calls as numbers, whatever their tools; the fields are those of `Calls`."""

    units: jax.Array  # i32 [..., S]
    micros: jax.Array  # i32 [..., S]
    negative: jax.Array  # bool [..., S]
    integer: jax.Array  # bool [..., S]
    lengths: jax.Array  # i32 [..., L]


class Calls(NamedTuple):
    """What the rows' responses ask for; everything but `required` and `valid` is zero (tool: -1) unless valid.

    S, L and A are the most number slots, lists and arguments of any tool (at least 1 each); a tool's own begin at
    `tool.starts`. A number is (-1)^negative * (units + micros / 10^6); of a choice, `units` is its place.
    """

    required: jax.Array  # bool [R]     the response ends with the mark that closes a call
    valid: jax.Array  # bool [R]        and its call is in the grammar
    tool: jax.Array  # i32 [R]          index into the tuple of tools, -1: none
    given: jax.Array  # bool [R, A]     the call writes this argument; else it has its default
    units: jax.Array  # i32 [R, S]
    micros: jax.Array  # i32 [R, S]
    negative: jax.Array  # bool [R, S]
    integer: jax.Array  # bool [R, S]   written without a decimal point or an exponent
    lengths: jax.Array  # i32 [R, L]    how many integers a list has, also beyond those that are kept

    @property
    def values(self) -> Values:
        return Values(self.units, self.micros, self.negative, self.integer, self.lengths)


class Numbers(NamedTuple):
    """Decimal numbers: (-1)^negative * (units + micros / 10^6). Shape [R], of a box [R, 4]."""

    units: jax.Array  # i32
    micros: jax.Array  # i32
    negative: jax.Array  # bool
    integer: jax.Array  # bool, written without a decimal point or an exponent

    @property
    def signed_units(self) -> jax.Array:
        return jnp.where(self.negative, -self.units, self.units)


class Lists(NamedTuple):
    """Lists of integers, of R rows."""

    values: jax.Array  # i32 [R, most], zero beyond `length`
    length: jax.Array  # i32 [R], also where it is more than are kept


def no_values(lead: tuple[int, ...], tools: Sequence[Tool], xp=np) -> Values:
    """Zeros, [*lead, ...], with room for the arguments of any of the tools."""
    slots, lists = (max([1, *counts]) for counts in ([t.slots for t in tools], [len(t.lists) for t in tools]))
    numbers = [xp.zeros((*lead, slots), dtype) for dtype in (np.int32, np.int32, bool, bool)]
    return Values(*numbers, xp.zeros((*lead, lists), np.int32))


def read(tool: Tool, values: Values) -> dict[str, jax.Array | Numbers | Lists]:
    """The arguments [...] of calls [...] of `tool`, by name.

    Number: `Numbers` [...]; Box: `Numbers` [..., 4]; Integer: i32 [...]; Integers: `Lists`; Choice: i32 [...], its place among
    the options. A text is not among them.
    """
    found: dict[str, jax.Array | Numbers | Lists] = {}
    for argument in tool.arguments:
        at = tool.starts[argument.name]
        one = Numbers(*(x[..., at] for x in values[:4])) if argument.slots else None
        many = Numbers(*(x[..., at : at + argument.slots] for x in values[:4]))
        match argument:
            case Integer():
                found[argument.name] = one.signed_units
            case Number():
                found[argument.name] = one
            case Box():
                found[argument.name] = many
            case Integers():
                found[argument.name] = Lists(many.signed_units, values.lengths[..., tool.lists.index(argument.name)])
            case Choice():
                found[argument.name] = one.units
    return found


def python_values(tool: Tool, values: Values) -> dict[str, Any]:
    """The arguments of one call, as Python values: a box is four floats, a choice its text."""
    written = {argument.name: argument for argument in tool.arguments}
    return {name: _plain(written[name], value) for name, value in read(tool, values).items()}


def _plain(argument: Argument, value: Any) -> Any:
    match value:
        case Numbers(units, micros, negative):
            numbers = np.where(negative, -1, 1) * (np.asarray(units, np.int64) * 10**6 + micros) / 10**6
            return tuple(numbers.tolist()) if numbers.ndim else float(numbers)
        case Lists(items, length):
            return tuple(int(x) for x in items[: int(length)])
    return argument.options[int(value)] if isinstance(argument, Choice) else int(value)


def arguments(calls: Calls, tools: tuple[Tool, ...], tool: Tool) -> dict[str, jax.Array | Numbers | Lists]:
    """The arguments of the rows that call `tool`, by name; zeros in the other rows."""
    mine = calls.tool == tools.index(tool)
    return read(tool, jax.tree.map(lambda x: jnp.where(mine[:, None], x, jnp.zeros_like(x)), calls.values))
