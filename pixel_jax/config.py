"""Loads `ml_collections` configurations into frozen dataclasses, strictly: nothing is ignored and nothing is guessed."""

import dataclasses
import difflib
import math
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from absl import flags
from ml_collections.config_flags import config_flags

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that does not say what it should; the message names the key and its value."""


PACKAGE = pathlib.Path(__file__).parent
# The configs of the repository's top level: an installed package has a copy of its own, a checkout has them beside it.
SHIPPED = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"


def shipped_configs() -> dict[str, pathlib.Path]:
    """The configs that come with the package: name, as in `--config=pixel/quickstart`, to file."""
    files = sorted(SHIPPED.rglob("*.py"))
    return {path.relative_to(SHIPPED).with_suffix("").as_posix(): path for path in files}


def find_config(name: str) -> pathlib.Path:
    """The file `name`; where there is none, the config that comes with the package under that name, `.py` or not.

    Raises:
        ConfigError: the name is neither. It says where it was looked for and lists the names.
    """
    path, shipped = pathlib.Path(name), shipped_configs()
    if path.is_file():
        return path
    if config := shipped.get(name.removesuffix(".py")):
        return config
    raise ConfigError(
        f"there is no file {str(path.absolute())!r}, and no config in {str(SHIPPED)!r} is called {name!r}; "
        f"those there are {', '.join(shipped) or 'none'}"
    )


class ConfigFileParser(config_flags.ConfigFileFlagParser):
    """A parser of the flag's value: FILE, NAME, or either with `:WORD` after it, the argument of `get_config`."""

    def parse(self, path: str):
        """Reads the config that the flag's value names, by file or by name."""
        name, *word = path.split(":", 1)
        return super().parse(":".join([str(find_config(name)), *word]))


def define_flag(default: str | None, what: str) -> None:
    """Declares the flag `--config`: a file with `get_config()`, or the name of a config that comes with the package.

    `--config.KEY=VALUE` sets any key, also one that the file leaves at its default; `load` refuses what is no key at all.

    Args:
        default: the file or name; None: there is no default.
        what: the flag's help.
    """
    path = None if default is None else str(find_config(default))
    config_flags.DEFINE_config_file("config", path, what, lock_config=False, accept_new_attributes=True)
    flags.FLAGS["config"].parser = ConfigFileParser("config", lock_config=False)


def load(cls: type[T], values: Mapping[str, Any], where: str = "config", default: T | None = None) -> T:
    """An instance of the dataclass `cls`, nested dataclasses included, from a dict or `ml_collections.ConfigDict`.

    What a section does not name keeps the value that its parent declares for it, which may differ from the class's own:
    `SFTConfig.optimizer` has another schedule than `OptimizerConfig()`, with `values["optimizer"] = {}` too.
    An int is accepted where a float is declared, a list where a tuple is; nothing else is converted.

    Args:
        cls: the dataclass.
        values: the values of its fields, by name.
        where: the dotted path of `values`, for messages.
        default: the instance from which keys that are left out are taken; None: the class's defaults.

    Raises:
        ConfigError: an unknown key, a missing required key (a placeholder that nobody filled, too) or a value of another type,
            with the dotted path of the key.
    """
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        raise ConfigError(f"{where} must be a mapping with the keys of {cls.__name__}, not {values!r}")
    hints = typing.get_type_hints(cls)
    assert dataclasses.is_dataclass(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    if default is not None:
        inherited = {name: getattr(default, name) for name in fields}
    else:
        inherited = {name: _default(field) for name, field in fields.items()}
    required = [name for name, value in inherited.items() if value is dataclasses.MISSING]
    converted = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"unknown key {where}.{key}; {_nearest(str(key), list(fields), where)}")
        if value is not None or key not in required or types.NoneType in typing.get_args(hints[key]):
            converted[key] = convert(hints[key], value, f"{where}.{key}", inherited[key])
    missing = [name for name in required if name not in converted]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}, which {cls.__name__} requires")
    try:
        return cls(**(inherited | converted))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def positive(config: Any, *names: str) -> None:
    """Checks that these settings of a dataclass are positive or None.

    Raises:
        ValueError: a setting is zero or less.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive: {value}")


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _nearest(key: str, known: list[str], where: str) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"the nearest known one is {where}.{near[0]}" if near else f"{where} has {', '.join(known)}"


def convert(hint: Any, value: Any, where: str, default: Any = None) -> Any:
    """Checks `value` against the type of a field and returns it, converted.

    Args:
        hint: the field's type.
        value: as a config has it.
        where: the field's dotted path, for messages.
        default: for a section, the instance from which keys that are left out are taken.

    Raises:
        ConfigError: the value has another type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            try:
                return convert(option, value, where, default)
            except ConfigError:
                if dataclasses.is_dataclass(option) and hasattr(value, "items"):
                    raise  # the error names the setting inside the section
    elif origin is typing.Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        raise ConfigError(f"{where} must be one of {', '.join(map(repr, arguments))}, not {value!r}")
    elif origin is tuple:
        if isinstance(value, list | tuple):
            each = arguments[:1] * len(value) if arguments[1:] == (Ellipsis,) else arguments
            if len(each) == len(value):
                return tuple(
                    convert(kind, x, f"{where}[{i}]") for i, (kind, x) in enumerate(zip(each, value, strict=True))
                )
    elif origin in (dict, Mapping):
        if hasattr(value, "items"):
            return {convert(arguments[0], k, where): convert(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if (from_mapping := getattr(hint, "from_mapping", None)) is not None:  # a configuration with a form of its own
            try:
                return from_mapping(value, where)
            except ValueError as error:
                raise ConfigError(str(error)) from error
        return load(hint, value, where, default if isinstance(default, hint) else None)
    elif hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    elif hint in (int, bool, str, types.NoneType) and type(value) is hint:
        return value
    name = getattr(hint, "__name__", None) if origin is None else None
    raise ConfigError(f"{where} must be {name or hint}, not {value!r} ({type(value).__name__})")
