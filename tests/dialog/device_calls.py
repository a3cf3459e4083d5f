"""What the host parser reads, in the arrays of the device."""

import numpy as np

from pixel_jax.dialog.grammar import DecimalNumber, Language, ParsedTurn
from pixel_jax.tools.calls import ParsedCalls
from pixel_jax.tools.tool import Choice


def as_numbers(argument, value) -> list[DecimalNumber]:
    if isinstance(value, DecimalNumber):
        return [value]
    if isinstance(argument, Choice):
        value = argument.options.index(value)
    if isinstance(value, str):
        return []
    if isinstance(value, int):
        return [DecimalNumber(abs(value), 0, value < 0, True)]
    return [number for item in value for number in as_numbers(None, item)][: argument.slots]


def device_calls(turns: list[ParsedTurn], language: Language) -> ParsedCalls:
    rows, tools = len(turns), language.tools
    slots, given, lists = (
        max(counts)
        for counts in zip(
            (1, 1, 1), *[(tool.slots, len(tool.arguments), len(tool.lists)) for tool in tools], strict=True
        )
    )
    calls = ParsedCalls(
        required=np.array([turn.required for turn in turns], bool),
        valid=np.array([turn.call is not None for turn in turns], bool),
        tool=np.array([turn.call.tool if turn.call else -1 for turn in turns]),
        given=np.zeros((rows, given), bool),
        units=np.zeros((rows, slots), int),
        micros=np.zeros((rows, slots), int),
        negative=np.zeros((rows, slots), bool),
        integer=np.zeros((rows, slots), bool),
        lengths=np.zeros((rows, lists), int),
    )
    for row, turn in enumerate(turns):
        if turn.call is None:
            continue
        tool = tools[turn.call.tool]
        for argument in tool.arguments:
            value = turn.call.arguments[argument.name]
            if argument.name in tool.lists:
                calls.lengths[row, tool.lists.index(argument.name)] = len(value)
            for slot, number in enumerate(as_numbers(argument, value), tool.starts[argument.name]):
                calls.units[row, slot], calls.micros[row, slot] = number.units, number.micros
                calls.negative[row, slot], calls.integer[row, slot] = number.negative, number.integer
    return calls


def same_calls(host: ParsedCalls, device: ParsedCalls) -> tuple[str, int] | None:
    """The first field and row that differ (but for the sign of a zero); None where all are the same."""
    rows = len(host.required)
    zero = lambda calls: (np.asarray(calls.units) == 0) & (np.asarray(calls.micros) == 0)
    for field in ParsedCalls._fields:
        if field == "given":
            continue
        ours, theirs = (np.asarray(getattr(calls, field))[:rows] for calls in (host, device))
        if field == "negative":
            ours, theirs = (x & ~zero(calls)[:rows] for x, calls in ((ours, host), (theirs, device)))
        assert ours.shape == theirs.shape, (field, ours.shape, theirs.shape)
        if np.any(different := (ours != theirs).reshape(rows, -1).any(1)):
            return field, int(np.flatnonzero(different)[0])
    return None
