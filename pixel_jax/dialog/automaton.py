"""The automaton behind the device parser of tool calls (`call_parser.py`), built from the language of `grammar.py`.

It is a finite automaton over the bytes of the tokens that a policy writes, with some five hundred states for the released tools.
The final state says whether a text is a call. The name, the keys and the numbers of the call are stored in integer registers, by
the action of each state that is entered.

All marks, and the tags of a call, begin with "<" and contain no other "<", so one state tells how much of a mark has been read.
The opening mark starts a call anew, wherever it appears; the closing mark ends one. `<|im_end|>` is removed from the text, so the
automaton goes back to the state before its "<", which is all that has to be remembered.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

import jax
import numpy as np

from pixel_jax.dialog.formats import Body
from pixel_jax.dialog.grammar import END, RELEASED_LANGUAGE, WHITE_SPACE, Language
from pixel_jax.tools import tool as kinds
from pixel_jax.tools.tool import BOX_NUMBERS, Argument, ToolError

MAX_STATES = 20_000
NO_SLOT = -1
NOTHING = 0  # the state outside of any mark or call

DIGITS = b"0123456789"
# Bytes of strings without escapes: all but the quotation mark, the backslash, control characters, and the beginning of a mark.
_PLAIN = bytes(byte for byte in range(32, 256) if byte not in b'"\\<')
_NO_MARK = bytes(byte for byte in range(256) if byte != ord("<"))


class Register(NamedTuple):
    """The registers of the value of a key."""

    argument: Argument
    bit: int  # of `ParserState.keys`
    start: int  # index of the first number register
    size: int  # number registers
    list: int  # index among the lists, or -1


class RegisterLayout(NamedTuple):
    """The registers of a language; numbers that may have decimals come first."""

    registers: dict[str, Register]  # by key
    numbers: int
    decimals: int  # numbers that may have decimals
    lists: tuple[int, ...]  # number registers of each list

    @classmethod
    def of(cls, language: Language) -> RegisterLayout:
        """Lays out the registers of a language."""
        decimal = lambda argument: argument.kind in ("number", "box")
        order = sorted(
            language.keys.values(), key=lambda argument: (not decimal(argument), argument.kind == "integers")
        )
        registers, start, lists = {}, 0, []
        for bit, argument in enumerate(order):
            index = -1
            if isinstance(argument, kinds.Integers):
                index = len(lists)
                lists.append(argument.most)
            registers[argument.name] = Register(argument, 1 << bit, start, argument.slots, index)
            start += argument.slots
        return cls(registers, start, sum(x.size for x in registers.values() if decimal(x.argument)), tuple(lists))


Entry = TypeVar("Entry", int, jax.Array)  # of one state; or of the states of R rows, int32 [R]


class Action(NamedTuple, Generic[Entry]):
    """The changes of the registers when a state is entered by a byte. Flags are 0 or 1."""

    slot: Entry  # index of the number that the byte belongs to (of a list, its first), or NO_SLOT
    begin: Entry  # flag: the byte is the number's first character
    digit: Entry  # flag: the byte is a digit before the point
    micros: Entry  # the value of a digit behind the point, in millionths
    power: Entry  # 1: the byte is a digit of an exponent; -1: of a negative one
    real: Entry  # flag: the byte makes the number no integer
    list: Entry  # the number, or the bracket, belongs to list `list` - 1; 0: to none
    clear: Entry  # flag: the byte opens that list
    option: Entry  # the byte ends the option `option` - 1, which becomes the number; 0: none
    call: Entry  # flag: the byte opens a call, of which nothing has been read
    arguments: Entry  # flag: the byte opens the arguments, of which no key has been read
    key: Entry  # the byte begins the value of the key of this bit; 0: of none
    name: Entry  # the byte ends the name of tool `name` - 1; 0: of none


NO_ACTION = Action(NO_SLOT, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


class Automaton(NamedTuple):
    """The tables of S states and C classes of bytes: the next state is `next[state * num_classes + byte_class[byte]]`."""

    next: np.ndarray  # int32 [S * C]
    byte_class: np.ndarray  # int32 [256]
    num_classes: int  # C
    action: np.ndarray  # int32 [S, 13], fields of `Action`
    save: np.ndarray  # int32 [S], the state to go back to after <|im_end|>
    restore: int  # the state that stands for the saved one
    required: np.ndarray  # bool [S], the text read so far ends with the mark that closes a call
    complete: np.ndarray  # bool [S], required, and an object of the grammar stands between the marks


class _Builder:
    """Builds the automaton.

    `edges[state]` is a dict from byte to state. A byte without an entry leads to `NOTHING`, and "<" to the beginning of a mark.
    """

    def __init__(self, language: Language, layout: RegisterLayout):
        self.language, self.layout = language, layout
        self.opening, self.closing = language.format.opening.encode(), language.format.closing.encode()
        self.edges: list[dict[int, int]] = []
        self.actions: list[Action[int]] = []
        assert self.state() == NOTHING
        self.restore = self.state()
        self.required: list[int] = []
        self.complete: list[int] = []
        self.saves: dict[int, int] = {}
        start, accepted = self.spaced(), self.spaced()
        self.less = self.marks(start, [])
        self.edges[accepted][ord("<")] = self.marks(start, self.complete)
        if language.format.body == Body.TAGS:
            self.tagged(start, accepted)
        else:
            (self.call if language.named else self.nameless)(start, accepted)

    def state(self, action: Action[int] = NO_ACTION) -> int:
        """Adds a state."""
        self.edges.append({})
        self.actions.append(action)
        return len(self.edges) - 1

    def spaced(self, action: Action[int] = NO_ACTION) -> int:
        """Adds a state that white space does not leave."""
        state = self.state(action)
        self.edges[state] |= dict.fromkeys(WHITE_SPACE, state)
        return state

    def spell(self, start: int, texts: Mapping[bytes, int]) -> dict[bytes, int]:
        """Adds edges from `start` that spell each of `texts` and lead to its state; texts with a common prefix share states.

        Returns:
          The states by the prefix that has been read.
        """
        between = {b"": start}
        for text, target in texts.items():
            for i, byte in enumerate(text[:-1]):
                if text[: i + 1] not in between:
                    between[text[: i + 1]] = self.edges[between[text[:i]]][byte] = self.state()
            self.edges[between[text[:-1]]][text[-1]] = target
        return between

    def marks(self, start: int, ends: list[int], tags: Mapping[bytes, int] | None = None) -> int:
        """Adds and returns a state after a "<"; the state to which a closing mark leads from there is appended to `ends`.

        Each of the `tags`, without its "<", leads to its state.
        """
        required = self.spaced()
        self.required.append(required)
        ends.append(required)
        less, barred = self.state(), self.state()
        for state in (less, barred):
            self.spell(state, {self.opening[1:]: start, self.closing[1:]: required, **(tags or {})})
        self.spell(less, {END[1:]: self.restore})
        # <|im_end|> is removed in one pass: one that only appears after another was removed stays. So after going back to a
        # "<", in the state `barred`, no <|im_end|> may begin there.
        self.saves[less] = barred
        return less

    def call(self, start: int, accepted: int) -> None:
        """Adds a call with a name, from `start` to `accepted`."""
        after = self.spaced()
        name, arguments = self.spaced(), self.spaced()
        self.edges[start][ord("{")] = self.object(
            after, accepted, {b"name": name, b"arguments": arguments}, NO_ACTION._replace(call=1)
        )
        ends = [self.like(after, NO_ACTION._replace(name=1 + tool)) for tool in range(len(self.language.tools))]
        names = [b'"%s"' % spelling.name.encode() for spelling in self.language.spellings if spelling.name is not None]
        self.spell(name, dict(zip(names, ends, strict=True)))
        self.edges[arguments][ord("{")] = self.arguments(after, NO_ACTION._replace(arguments=1))

    def nameless(self, start: int, accepted: int) -> None:
        """Adds a call that is its arguments alone, from `start` to `accepted`."""
        self.edges[start][ord("{")] = self.arguments(accepted, NO_ACTION._replace(arguments=1, name=1))

    def tagged(self, start: int, accepted: int) -> None:
        """Adds a call between tags, from `start` to `accepted`."""
        members, name, key, ended, ignored = self.spaced(), self.state(), self.state(), self.spaced(), self.state()
        tag = lambda tags: self.marks(start, [], tags)
        self.edges[start][ord("<")] = tag({b"function=": name})
        self.edges[members][ord("<")] = tag({b"parameter=": key, b"/function>": accepted})
        self.edges[ended][ord("<")] = tag({b"/parameter>": members})
        spellings = enumerate(self.language.spellings, 1)
        names = {x.name: self.like(members, NO_ACTION._replace(arguments=1, name=i)) for i, x in spellings if x.name}
        self.spell(name, {b"%s>" % text.encode(): state for text, state in names.items()})

        self.edges[ignored] |= dict.fromkeys(_NO_MARK, ignored) | {ord("<"): self.edges[ended][ord("<")]}
        other = self.state()
        self.edges[other] |= dict.fromkeys(_PLAIN, other) | {ord(">"): ignored}
        starts = {register: self.state() for register in self.layout.registers}
        spelled = self.spell(key, {b"%s>" % text.encode(): state for text, state in starts.items()})
        for state in spelled.values():
            self.edges[state] = self.edges[other] | self.edges[state]
        for begin, register in zip(starts.values(), self.layout.registers.values(), strict=True):
            match register.argument:
                case kinds.Choice():
                    self.edges[begin][ord("\n")] = line = self.state()
                    self.spell(line, {x + b"\n": end for x, end in self.options(register, ended).items()})
                case kinds.Text():
                    self.edges[begin][ord("\n")] = line = self.state()
                    feed = self.state()
                    for state in (line, feed):
                        self.edges[state] |= dict.fromkeys(_NO_MARK, line) | {ord("\n"): feed}
                    behind = self.like(members, NO_ACTION._replace(key=register.bit))
                    self.edges[feed][ord("<")] = tag({b"/parameter>": behind})
                case _:
                    self.edges[begin] |= dict.fromkeys(WHITE_SPACE, begin)
                    self.value(begin, ended, register)

    def options(self, register: Register, after: int) -> dict[bytes, int]:
        """Adds a state for each option of a choice, like `after`."""
        action = NO_ACTION._replace(slot=register.start, key=register.bit)
        options = enumerate(register.argument.options, 1) if isinstance(register.argument, kinds.Choice) else ()
        return {option.encode(): self.like(after, action._replace(option=i)) for i, option in options}

    def arguments(self, closed: int, action: Action[int]) -> int:
        """Adds the object of the arguments, which ends in `closed`; returns the state behind its "{"."""
        after = self.spaced()
        starts = {key.encode(): self.spaced() for key in self.layout.registers}
        behind = self.object(after, closed, starts, action)
        for start, register in zip(starts.values(), self.layout.registers.values(), strict=True):
            self.value(start, after, register)
        return behind

    def value(self, start: int, after: int, register: Register) -> None:
        """Adds the JSON value of an argument, from `start` to `after`."""
        match register.argument:
            case kinds.Box() | kinds.Integers():
                mark = {"list": 1 + register.list, "clear": 1} if register.list >= 0 else {}
                self.edges[start][ord("[")] = opened = self.spaced(NO_ACTION._replace(key=register.bit, **mark))
                if register.list < 0:
                    self.box(opened, after, register)
                else:
                    self.edges[opened][ord("]")] = after
                    self.numbers(opened, after, register)
            case kinds.Choice():
                self.spell(start, {b'"%s"' % x: end for x, end in self.options(register, after).items()})
            case kinds.Text():
                self.string(start, self.like(after, NO_ACTION._replace(key=register.bit)))
            case _:
                self.number(start, after, register, key=register.bit)

    def like(self, state: int, action: Action[int]) -> int:
        """Adds a state with the edges of `state`."""
        new = self.state(action)
        self.edges[new] |= self.edges[state]
        return new

    def object(self, after: int, closed: int, values: Mapping[bytes, int], action: Action[int]) -> int:
        """Adds an object that ends in `closed`; returns the state behind its "{".

        A member ends in `after`. The value of each known key begins in the state that `values` has for it.
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

    def scalar(self, start: int, after: int) -> None:
        """Adds a value that is not stored: a number, a string, true, false or null."""
        self.number(start, after)
        self.spell(start, dict.fromkeys((b"true", b"false", b"null"), after))
        self.string(start, after)

    def string(self, start: int, after: int) -> None:
        """Adds a string that is not stored."""
        string, escape = self.state(), self.state()
        self.edges[start][ord('"')] = string
        self.edges[string] |= dict.fromkeys(_PLAIN, string) | {ord("\\"): escape, ord('"'): after}
        self.edges[escape] |= dict.fromkeys(b'"\\/bfnrt', string)
        digits = [self.state() for _ in range(4)]
        self.edges[escape][ord("u")] = digits[0]
        for digit, following in zip(digits, [*digits[1:], string], strict=True):
            self.edges[digit] |= dict.fromkeys(DIGITS + b"abcdefABCDEF", following)

    def box(self, start: int, after: int, register: Register) -> None:
        """Adds four numbers, more that are not stored, and the "]" behind them."""
        for side in range(BOX_NUMBERS):
            ended, following = self.spaced(), self.spaced()
            self.edges[ended][ord(",")] = following
            if side == BOX_NUMBERS - 1:
                self.edges[ended][ord("]")] = after
            self.number(start, ended, register._replace(start=register.start + side))
            start = following
        self.numbers(start, after)

    def numbers(self, start: int, after: int, register: Register | None = None) -> None:
        """Adds one or more numbers and the "]" behind them."""
        ended, following = self.spaced(), self.spaced()
        self.edges[ended] |= {ord("]"): after, ord(","): following}
        self.number(start, ended, register)
        # The numbers behind a comma are the same states as the first.
        self.edges[following] |= {byte: self.edges[start][byte] for byte in b"-" + DIGITS}

    def number(self, start: int, ended: int, register: Register | None = None, key: int = 0) -> None:
        """Adds a number from `start`, stored in `register` if there is one; its last states have the edges of `ended`."""
        inside = NO_ACTION if register is None else NO_ACTION._replace(slot=register.start, list=1 + register.list)
        first = inside._replace(begin=1, key=key)
        minus = self.state(first)
        first_zero, first_digit = (self.like(ended, first._replace(digit=1)) for _ in range(2))
        zero, digit = (self.like(ended, inside._replace(digit=1)) for _ in range(2))
        self.edges[start] |= {ord("-"): minus, ord("0"): first_zero} | dict.fromkeys(DIGITS[1:], first_digit)
        self.edges[minus] |= {ord("0"): zero} | dict.fromkeys(DIGITS[1:], digit)
        for state in (first_digit, digit):
            self.edges[state] |= dict.fromkeys(DIGITS, digit)
        if register is not None and isinstance(register.argument, kinds.Integer | kinds.Integers):
            return
        point, exponent = (self.state(inside._replace(real=1)) for _ in range(2))
        decimals = [self.like(ended, inside._replace(micros=10**power)) for power in range(5, -1, -1)]
        decimals.append(self.like(ended, inside))  # further decimals are cut off
        for state, following in zip([point, *decimals], [*decimals, decimals[-1]], strict=True):
            self.edges[state] |= dict.fromkeys(DIGITS, following)
        for state in (first_zero, first_digit, zero, digit):
            self.edges[state][ord(".")] = point
        for state in (first_zero, first_digit, zero, digit, *decimals):
            self.edges[state] |= dict.fromkeys(b"eE", exponent)
        for sign, power in ((b"+", 1), (b"-", -1)):
            signed, last = self.state(inside), self.like(ended, inside._replace(power=power))
            self.edges[exponent][sign[0]] = signed
            for state in (signed, last, *([exponent] if power == 1 else [])):
                self.edges[state] |= dict.fromkeys(DIGITS, last)


@functools.cache
def build(language: Language = RELEASED_LANGUAGE) -> Automaton:
    """Builds the automaton of a language.

    Raises:
      ToolError: the automaton has too many states.
    """
    builder = _Builder(language, RegisterLayout.of(language))
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
