"""The settings of a command, for its help: names, values, defaults, and descriptions from the comments in the code."""

import dataclasses
import inspect
import io
import tokenize
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """A setting of a config."""

    key: str  # dotted, as on the command line
    value: Any  # in this config
    default: Any  # `dataclasses.MISSING`: it has to be given
    about: str  # a sentence


def settings(
    cls: type, values: Mapping[str, Any] | None = None, prefix: str = "config", default: Any = None
) -> Iterator[Setting]:
    """Iterates over the settings of the dataclass `cls`, nested ones included, in the order of the code.

    Args:
        cls: the dataclass of the config.
        values: the values of a config, as `load` takes them; None: the defaults, optional sections included.
        prefix: the prefix of the keys.
        default: what the parent declares for this section; None: the class's own defaults.
    """
    hints, about = typing.get_type_hints(cls), comments(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        key = f"{prefix}.{field.name}"
        usual = _default(field) if default is None else getattr(default, field.name)
        value = usual if values is None else values.get(field.name, usual)
        section, many = _section(hints[field.name])
        if section is not None and isinstance(usual, section):
            section = type(usual)  # which may have more fields than the declared one
        unset = values is not None and value is None
        if section is None or unset or (many and not (hasattr(value, "items") and value)):
            yield Setting(key, value, usual, about.get(field.name, ""))
        elif many:
            assert value is not None
            for name, inner in value.items():
                yield from settings(section, inner, f"{key}.{name}")
        else:
            section_values = value if hasattr(value, "get") else None if values is None else {}
            yield from settings(section, section_values, key, usual if isinstance(usual, section) else None)


def listing(cls: type, values: Mapping[str, Any] | None) -> str:
    """Writes `settings` as text: a line with the value, and the default where it differs, and a line of description."""
    lines = []
    for setting in settings(cls, values):
        usual = "must be given" if setting.default is dataclasses.MISSING else f"default: {setting.default!r}"
        unset = setting.value is dataclasses.MISSING
        value = "" if unset else f"={setting.value!r}"
        lines.append(
            f"  --{setting.key}{value}" + (f"  ({usual})" if unset or setting.value != setting.default else "")
        )
        lines += [f"      {setting.about}"] if setting.about else []
    return "\n".join(lines)


def comments(cls: type) -> dict[str, str]:
    """Reads the comments of a dataclass's fields: field -> the comment behind it, or the one above it, in the source."""
    names = {field.name for field in dataclasses.fields(cls)}
    descriptions = dict(comments(cls.__base__)) if dataclasses.is_dataclass(cls.__base__) else {}
    above: list[str] = []  # the lines of comment since the last line of code
    current = ""  # the field whose declaration is being read
    starts = True  # whether the next token begins a line of code
    for token in tokenize.generate_tokens(io.StringIO(inspect.cleandoc("\n" + inspect.getsource(cls))).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ")
            if starts:
                above.append(text)
            elif current and current not in descriptions:
                descriptions[current] = text
        elif token.type == tokenize.NL:
            if starts and not token.line.strip():
                above = []
        elif token.type == tokenize.NEWLINE:
            starts, current, above = True, current, []
        elif token.type not in (tokenize.INDENT, tokenize.DEDENT):
            if starts:
                current = token.string if token.type == tokenize.NAME and token.string in names else ""
                if current and above:
                    descriptions[current] = " ".join(above)
            starts = False
    return descriptions


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _section(hint: Any) -> tuple[type | None, bool]:
    """The dataclass that a field of this type holds, and whether it holds a dictionary of them."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (dict, Mapping):
        return _section(arguments[1])[0], True
    options = arguments if origin in (types.UnionType, typing.Union) else (hint,)
    sections = [option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)]
    return next(iter(sections), None), False
