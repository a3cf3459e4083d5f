"""What was read of the calls of R rows, as arrays, and the values of one tool's arguments among them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pixel_jax.tools.tool import Box, Choice, Integer, Integers, Number, Tool


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


def arguments(calls: Calls, tools: tuple[Tool, ...], tool: Tool) -> dict[str, jax.Array | Numbers | Lists]:
    """The arguments of the rows that call `tool`, by name; zeros in the other rows.

    Number: `Numbers` [R]; Box: `Numbers` [R, 4]; Integer: i32 [R]; Integers: `Lists`; Choice: i32 [R], its place among the
    options. A text is not among them.
    """
    mine = calls.tool == tools.index(tool)
    masked = Calls(*(jnp.where(mine.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros_like(x)) for x in calls))
    found: dict[str, jax.Array | Numbers | Lists] = {}
    for argument in tool.arguments:
        at = tool.starts[argument.name]
        every = Numbers(masked.units, masked.micros, masked.negative, masked.integer)
        one = Numbers(*(x[:, at] for x in every)) if argument.slots else None
        many = Numbers(*(x[:, at : at + argument.slots] for x in every))
        match argument:
            case Integer():
                found[argument.name] = one.signed_units
            case Number():
                found[argument.name] = one
            case Box():
                found[argument.name] = many
            case Integers():
                found[argument.name] = Lists(many.signed_units, masked.lengths[:, tool.lists.index(argument.name)])
            case Choice():
                found[argument.name] = one.units
    return found
