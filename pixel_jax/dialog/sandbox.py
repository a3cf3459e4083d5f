"""Renders chat templates, jinja programs that come with a model, in jinja's sandbox with limits on time and size.

The environment is that of transformers' `apply_chat_template` (trimmed blocks, `break` and `continue`, `{% generation %}`,
`tojson`, `raise_exception`), without `strftime_now`: prompts that change from day to day would make no run repeatable.
Jinja's sandbox bounds neither time nor memory. So every call, filter, operator and turn of a loop is counted here, and the
texts that they make are measured.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.filters import do_indent
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SOURCE = 1 << 18  # characters of a template; published ones have up to some 10,000
MAX_TEXT = 1 << 22  # characters and members of a value that a template makes, and characters that it writes
MAX_DEPTH = 32  # of values in values
MAX_INDENT = 16
MAX_STEPS = 1 << 20  # calls, filters, operators and turns of loops in one rendering
SECONDS = 2.0  # of one rendering

# Methods of texts whose result may be longer than their arguments by any amount.
WIDENING = frozenset({"center", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill"})
# Filters of the same kind, and those whose result is not repeatable.
NO_FILTERS = frozenset({"batch", "center", "format", "random", "slice", "urlize", "wordwrap", "xmlattr"})


class TemplateError(ValueError):
    """A chat template that cannot be used; the message says why."""


class _Generation(jinja2.ext.Extension):
    """The tag `{% generation %}`, which marks what an assistant wrote; its content is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012, as jinja declares it

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Steps(threading.local):
    """The steps and the time that are left to the rendering in this thread."""

    left = 0
    until = 0.0

    def start(self) -> None:
        self.left, self.until = MAX_STEPS, time.monotonic() + SECONDS

    def take(self) -> None:
        self.left -= 1
        if self.left < 0 or time.monotonic() > self.until:
            raise TemplateError(f"it takes more than {MAX_STEPS} steps or {SECONDS:g} seconds")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self):
        options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "finalize": _measured}
        super().__init__(extensions=[_Generation, jinja2.ext.loopcontrols], **options)
        self.steps = _Steps()
        allowed = {name: call for name, call in self.filters.items() if name not in NO_FILTERS}
        own = {"tojson": _to_json, "replace": _replace, "join": _join, "indent": _indent}
        self.filters: dict[str, Any] = {name: self._counted(call) for name, call in (allowed | own).items()}
        self.filters["turns of a loop"] = self._turns
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace", "cycler", "joiner")}
        self.globals["raise_exception"] = _raise

    def _counted(self, call):
        """Wraps a filter so that its calls are counted, and its arguments and results measured."""

        @functools.wraps(call)  # which also copies whether it wants the context
        def counted(*args, **kwargs):
            self.steps.take()
            _measured([x for x in (*args, *kwargs.values()) if isinstance(x, _SIZED)])
            return _measured(call(*args, **kwargs))

        return counted

    def _turns(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.steps.take()
            yield item

    def call(self, context, what, /, *args, **kwargs):
        """Carries out a call of a template, counted and measured."""
        self.steps.take()
        _measured([x for x in (*args, *kwargs.values()) if isinstance(x, _SIZED)])
        name, text = getattr(what, "__name__", ""), getattr(what, "__self__", None)
        if isinstance(text, str):
            if name in WIDENING:
                raise TemplateError(f"it calls {name!r}, which is not allowed: write the text out")
            if name == "replace":
                return _replace(text, *args, **kwargs)
            if name == "join" and len(args) == 1:
                return _join(args[0], text)
        return _measured(super().call(context, what, *args, **kwargs))

    def call_binop(self, context, operator, left, right):
        """Carries out an operator that can make a large value of small ones, counted and measured."""
        self.steps.take()
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" or (operator == "%" and not numbers):
            raise TemplateError(f"it uses the operator {operator!r} on {type(left).__name__}, which is not allowed")
        if operator == "*" and not numbers:
            repeated, times = (left, right) if isinstance(left, _SIZED) else (right, left)
            if isinstance(repeated, _SIZED) and isinstance(times, int):
                _allow(_size(repeated) * max(times, 0))
        return _measured(super().call_binop(context, operator, left, right))


_SIZED = str | list | tuple | dict


def _allow(size: int) -> None:
    if size > MAX_TEXT:
        raise TemplateError(f"it makes a text or list of more than {MAX_TEXT} characters")


def _size(value: Any, depth: int = 0) -> int:
    """Counts the characters and members of a value; a member that it contains twice counts twice."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, list | tuple | dict):
        return 1
    if depth == MAX_DEPTH:
        raise TemplateError(f"it nests values deeper than {MAX_DEPTH}")
    members = value if not isinstance(value, dict) else (*value, *value.values())
    size = len(value)
    for member in members:
        size += _size(member, depth + 1)
        _allow(size)
    return size


def _measured(value: Any) -> Any:
    if isinstance(value, _SIZED):
        _allow(_size(value))
    if isinstance(value, int) and value.bit_length() > 1 << 10:
        raise TemplateError("it computes with numbers of more than 1,024 bits")
    return value


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    text = str(text)
    _allow(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _join(items: Iterable[Any], between: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        items = (item[attribute] for item in items)
    texts = [str(_measured(item)) for item in items]
    _allow(sum(map(len, texts)) + len(texts) * len(between))
    return between.join(texts)


def _indent(text: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
    if not isinstance(width, int) or width > MAX_INDENT:
        raise TemplateError(f"it indents by {str(width)[:20]!r}, more than {MAX_INDENT} characters")
    _allow(len(text) + width * (text.count("\n") + 1))
    return do_indent(text, width, first, blank)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    if indent is not None and (not isinstance(indent, int) or indent > MAX_INDENT):
        raise TemplateError(f"it indents by {str(indent)[:20]!r}, more than {MAX_INDENT} characters")
    _allow(_size(value) * (1 + (indent or 0)))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message):
    raise jinja2.TemplateError(message)


_ENVIRONMENT = _Environment()


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
    if len(source) > MAX_SOURCE:
        raise TemplateError(f"it has {len(source)} characters, more than {MAX_SOURCE}")
    try:
        tree = _ENVIRONMENT.parse(source)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "turns of a loop", [], [], None, None, lineno=loop.lineno)
        for joined in tree.find_all(nodes.Concat):  # `~` is no operator that can be intercepted, a filter is
            joined.nodes = [nodes.Filter(nodes.List(joined.nodes), "join", [], [], None, None, lineno=joined.lineno)]
        return _ENVIRONMENT.from_string(tree)
    except (jinja2.TemplateError, RecursionError) as error:
        line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise TemplateError(f"it is no jinja template: {type(error).__name__}: {error}{line}") from None


def render_source(source: str, values: Mapping[str, Any]) -> str:
    """Renders a template.

    Args:
      source: the template.
      values: its variables: `messages`, `add_generation_prompt`, `bos_token`, ...

    Raises:
      TemplateError: the source is no template, raises an error, takes too long, or makes too large values.
    """
    template, written, size = _compiled(source), [], 0
    _ENVIRONMENT.steps.start()
    try:
        for piece in template.generate(**values):
            size += len(piece)
            if size > MAX_TEXT:
                raise TemplateError(f"it writes more than {MAX_TEXT} characters")
            written.append(piece)
    except TemplateError:
        raise
    except Exception as error:  # errors of any type: the template is a program, which may not expect these values
        raise TemplateError(f"{type(error).__name__}: {str(error)[:300]}") from None
    return "".join(written)
