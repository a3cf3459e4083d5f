"""What a run is: its settings and what its data and model hold, noted in its directory, and held to at every start.

`run.json` has them by their dotted names, `history.jsonl` a line for every start: when and where, by which command, with which
versions and devices, from which step, and what had changed.
"""

import datetime
import enum
import fnmatch
import json
import os
import pathlib
import socket
from collections.abc import Mapping
from typing import Any

from pixel_jax.provenance import circumstances
from pixel_jax.state_files import LineLog, read_lines, read_note, write_json
from pixel_jax.terminal import warn

RUN, HISTORY = "run.json", "history.jsonl"
ABSENT = "not set"
MOST_SAID = 8  # changes that one message gives


class RunError(ValueError):
    """A run directory that does not hold what it should; the message names it and the values that clash."""


class Kind(enum.Enum):
    """What it means that a setting has changed since a run was begun."""

    FREE = "the run goes on: how or where it is carried out has changed, not what"
    CHANGES = "another experiment from here on: the run goes on if it is told to"
    FIXED = "what is saved cannot be gone on from"


# Patterns of names, in the order in which they are tried. What matches none of them changes the experiment.
KINDS: Mapping[str, Kind] = {
    # Places; what lies there is known by its content.
    **dict.fromkeys(("model", "adapter", "data", "out", "image_folders", "columns.*"), Kind.FREE),
    # Machines, memory and speed: the same numbers, but for rounding.
    **dict.fromkeys(("mesh.*", "rollout_mesh.*", "architecture", "read_threads", "read_ahead", "limits.*"), Kind.FREE),
    "host_tools.workers": Kind.FREE,
    **dict.fromkeys(("*forward.micro_batches", "*forward.remat", "*forward.logit_chunk"), Kind.FREE),
    **dict.fromkeys(("*forward.implementation", "*rollout.implementation"), Kind.FREE),
    **dict.fromkeys(("*rollout.in_flight", "*rollout.observe_chunk", "*rollout.tail_rows"), Kind.FREE),
    # What is saved, said and looked at. Rows that are left out show in the data, and so do those held out.
    **dict.fromkeys(("data_eval", "watch.*", "save_model_every", "keep_best"), Kind.FREE),
    **dict.fromkeys(("*.save_every", "*.keep", "*.writers", "*.time_operations", "bad_rows", "dtype"), Kind.FREE),
    # What a saved position in the data counts in, and what saved arrays belong to.
    **dict.fromkeys(("seed", "sft.batch_size", "rl.prompts", "rl.seed"), Kind.FIXED),
    "adapter_weights": Kind.FIXED,
    **dict.fromkeys(("weights", "lora.rank", "lora.targets", "*.trainable", "*.optimizer.kind"), Kind.FIXED),
}


def kind_of(name: str) -> Kind:
    """What a change of the setting `name` means."""
    return next((kind for pattern, kind in KINDS.items() if fnmatch.fnmatchcase(name, pattern)), Kind.CHANGES)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names, as JSON gives them back."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.loads(json.dumps(value))
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten` (but for sections without a setting, which leave no name)."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *sections, last = name.split(".")
        section = nested
        for part in sections:
            section = section.setdefault(part, {})
        section[last] = value
    return nested


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """name -> (old, new) of all settings that differ."""
    pairs = {name: (old.get(name, ABSENT), new.get(name, ABSENT)) for name in {**old, **new}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def describe(changed: Mapping[str, tuple[Any, Any]]) -> str:
    said = [f"{name} = {old!r}, now it is {new!r}" for name, (old, new) in changed.items()]
    return ", ".join(said[:MOST_SAID]) + (f", and {len(said) - MOST_SAID} more" if len(said) > MOST_SAID else "")


def settle(
    directory: str | os.PathLike,
    facts: Mapping[str, Any],
    *,
    done: int | None = None,
    of: int | None = None,
    resume_changed: bool | None = None,
) -> None:
    """Notes what a run is, or holds it to what it was begun as; a line of its history is written either way.

    Args:
        facts: settings, nested or not, and digests of content.
        done: how many of its steps are saved. None: nothing is, so the run begins anew and may be another one.
        of: how many steps it has; None: that is not known.
        resume_changed: whether the experiment may change from here on, which the history then says. None: it may not, and
            there is nothing that would allow it.

    Raises:
        RunError: it may not go on. Every name is given with its old and its new value.
    """
    directory = pathlib.Path(directory)
    new, old = flatten(facts), read_note(directory / RUN)
    changed = {} if old is None else changes(flatten(old), new)
    if done is not None:
        _check(directory, changed, resume_changed)
    if old is None:
        what = "begun" if done is None else "what it was begun as is not known"
    elif done is None:
        what = "begun anew"
    else:
        what = "already finished" if done == of else "went on"
    if old is None and done is not None:
        warn(f"{directory / RUN} does not say what {directory} was begun as; the present settings are taken for it")
    _write_history(directory, {"what": what, "done": done, "of": of, "changed": changed})
    if changed and done is not None:
        warn(f"{directory} was begun with {describe(changed)}: it goes on, and {HISTORY} says so")
    if changed or old is None:
        write_json(directory / RUN, new)


def _check(directory: pathlib.Path, changed: Mapping[str, tuple[Any, Any]], resume_changed: bool | None) -> None:
    of = lambda *kinds: {name: pair for name, pair in changed.items() if kind_of(name) in kinds}
    if fixed := of(Kind.FIXED) if resume_changed is not None else of(Kind.FIXED, Kind.CHANGES):
        raise RunError(f"{directory} was begun with {describe(fixed)}: choose another directory")
    if (another := of(Kind.CHANGES)) and not resume_changed:
        raise RunError(
            f"{directory} was begun with {describe(another)}: choose another directory, or go on with another experiment "
            "by --resume_changed"
        )


def _write_history(directory: pathlib.Path, facts: Mapping[str, Any]) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with LineLog(directory / HISTORY) as log:
        log.append([{"time": now, "host": socket.gethostname(), **facts, **circumstances()}])


def read_history(directory: str | os.PathLike) -> list[dict[str, Any]]:
    """The starts of a run, in order: "time", "host", "what", "done", "of", "changed", and those of `circumstances`."""
    return read_lines(pathlib.Path(directory) / HISTORY, time=str, host=str, what=str, changed=dict)


def read_settings(directory: str | os.PathLike) -> dict[str, Any]:
    """What a run was begun as, by dotted names.

    Raises:
        RunError: there is no note of it, or it is damaged.
    """
    settings = read_note(pathlib.Path(directory) / RUN)
    if settings is None:
        raise RunError(f"{directory} is no run: it has no {RUN} that can be read")
    return flatten(settings)
