"""The identity of a run: its settings and digests of its data and model, recorded in its directory and checked at every start.

`run.json` has them by their dotted names. `history.jsonl` has a line for every start: when and where, by which command, with
which versions and devices, from which step, and what had changed.
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
from pixel_jax.state_files import LineLog, read_json_lines, read_note, write_json
from pixel_jax.terminal import warn

RUN, HISTORY = "run.json", "history.jsonl"
ABSENT = "not set"
MOST_SAID = 8  # changes that one message names


class RunError(ValueError):
    """A run directory with unexpected content; the message names it and the values that clash."""


class ChangeKind(enum.Enum):
    """The consequence of a setting that has changed since a run was begun."""

    FREE = "the run goes on: only how or where it runs has changed"
    CHANGES = "another experiment from here on: the run goes on only with --resume_changed"
    FIXED = "the run cannot go on from its checkpoints"


# Patterns of names, in the order in which they are tried. A name that matches none of them is `CHANGES`.
KINDS: Mapping[str, ChangeKind] = {
    # Paths: their content is known by digests.
    **dict.fromkeys(("model", "adapter", "data", "out", "image_folders", "columns.*"), ChangeKind.FREE),
    # Machines, memory and speed: results are the same, but for rounding.
    **dict.fromkeys(
        ("mesh.*", "rollout_mesh.*", "architecture", "read_threads", "read_ahead", "limits.*"), ChangeKind.FREE
    ),
    "host_tools.workers": ChangeKind.FREE,
    **dict.fromkeys(("*.judge.key", "*.judge.requests_per_second", "*.judge.retries"), ChangeKind.FREE),
    **dict.fromkeys(("*.judge.timeout", "*.judge.workers", "*.judge.cache"), ChangeKind.FREE),
    **dict.fromkeys(("*forward.micro_batches", "*forward.remat", "*forward.logit_chunk"), ChangeKind.FREE),
    **dict.fromkeys(("*forward.implementation", "*rollout.implementation"), ChangeKind.FREE),
    **dict.fromkeys(("*rollout.in_flight", "*rollout.observe_chunk", "*rollout.tail_rows"), ChangeKind.FREE),
    # Output and evaluation during the run. Rows that are dropped or held out show in the digests of the data.
    **dict.fromkeys(("data_eval", "watch.*", "save_model_every", "keep_best"), ChangeKind.FREE),
    **dict.fromkeys(
        ("*.save_every", "*.keep", "*.replayable", "*.writers", "*.time_operations", "bad_rows", "dtype"),
        ChangeKind.FREE,
    ),
    # The unit of a saved position in the data, and the arrays that are saved.
    **dict.fromkeys(("seed", "sft.batch_size", "rl.prompts", "rl.seed"), ChangeKind.FIXED),
    "rl.staleness": ChangeKind.FIXED,
    "adapter_weights": ChangeKind.FIXED,
    **dict.fromkeys(("weights", "lora.rank", "lora.targets", "*.trainable", "*.optimizer.kind"), ChangeKind.FIXED),
}

# Settings that came after others, with the values that mean what runs did before there were these settings, to the bit. A run
# whose record lacks one goes on with that value. A new setting whose default changes results has no place here.
CAME_LATER: Mapping[str, Any] = {
    "rl.staleness": 0,
    **dict.fromkeys(("rl.rollout_budget.tokens", "rl.rollout_budget.share")),
    **{f"{part}rollout.{name}": None for part in ("", "rl.") for name in ("weights", "caches", "square")},
    **{f"{part}rollout.split_videos": False for part in ("", "rl.")},
}


def kind_of(name: str) -> ChangeKind:
    """The consequence of a change of the setting `name`."""
    return next((kind for pattern, kind in KINDS.items() if fnmatch.fnmatchcase(name, pattern)), ChangeKind.CHANGES)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested settings to dotted names, with values as JSON reads them back."""
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
    """The settings that differ: name -> (old, new)."""
    pairs = {name: (old.get(name, ABSENT), new.get(name, ABSENT)) for name in {**old, **new}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def describe(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Writes the changes in words, at most `MOST_SAID` of them."""
    parts = [f"{name} = {old!r}, now it is {new!r}" for name, (old, new) in changed.items()]
    return ", ".join(parts[:MOST_SAID]) + (f", and {len(parts) - MOST_SAID} more" if len(parts) > MOST_SAID else "")


def settle(
    directory: str | os.PathLike,
    settings: Mapping[str, Any],
    *,
    done: int | None = None,
    of: int | None = None,
    resume_changed: bool | None = None,
) -> None:
    """Records the settings of a new run, or checks those of a run that goes on, and adds a line to its history.

    Args:
        directory: the directory of the run.
        settings: nested or not, with digests of content.
        done: the number of steps that are saved. None: none are, so the run begins anew and may have other settings.
        of: the number of steps of the run; None: it is not known.
        resume_changed: whether the experiment may change from here on, which the history then says. None: it may not, and
            no flag would allow it.

    Raises:
        RunError: the run may not go on. Every setting is named with its old and its new value.
    """
    directory = pathlib.Path(directory)
    new, old = flatten(settings), read_note(directory / RUN)
    changed = {} if old is None else changes(flatten(old), new)
    later = {
        name: now
        for name, (before, now) in changed.items()
        if before == ABSENT and name in CAME_LATER and now == CAME_LATER[name]
    }
    if done is not None:
        _check(directory, {name: x for name, x in changed.items() if name not in later}, resume_changed)
    if old is None:
        what = "begun" if done is None else "what it was begun as is not known"
    elif done is None:
        what = "begun anew"
    else:
        what = "already finished" if done == of else "went on"
    if old is None and done is not None:
        warn(f"{directory / RUN} does not say what {directory} was begun as; the present settings are taken for it")
    _write_history(directory, {"what": what, "done": done, "of": of, "changed": changed})
    if later and done is not None:
        those = ", ".join(f"{name} = {now!r}" for name, now in later.items())
        warn(f"{directory} was begun before there was a setting for what it did anyway: it goes on with {those}")
    if changed.keys() - later and done is not None:
        changed = {name: x for name, x in changed.items() if name not in later}
        warn(f"{directory} was begun with {describe(changed)}: it goes on, and {HISTORY} says so")
    if changed or later or old is None:
        write_json(directory / RUN, new)


def _check(directory: pathlib.Path, changed: Mapping[str, tuple[Any, Any]], resume_changed: bool | None) -> None:
    def of(*kinds: ChangeKind) -> dict[str, tuple[Any, Any]]:
        return {name: pair for name, pair in changed.items() if kind_of(name) in kinds}

    if fixed := of(ChangeKind.FIXED) if resume_changed is not None else of(ChangeKind.FIXED, ChangeKind.CHANGES):
        raise RunError(f"{directory} was begun with {describe(fixed)}: choose another directory")
    if (another := of(ChangeKind.CHANGES)) and not resume_changed:
        raise RunError(
            f"{directory} was begun with {describe(another)}: choose another directory, or go on with another experiment "
            "by --resume_changed"
        )


def _write_history(directory: pathlib.Path, start: Mapping[str, Any]) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with LineLog(directory / HISTORY) as log:
        log.append([{"time": now, "host": socket.gethostname(), **start, **circumstances()}])


def read_history(directory: str | os.PathLike) -> list[dict[str, Any]]:
    """The starts of a run in order: "time", "host", "what", "done", "of", "changed", and the keys of `circumstances`."""
    return read_json_lines(pathlib.Path(directory) / HISTORY, time=str, host=str, what=str, changed=dict)


def read_settings(directory: str | os.PathLike) -> dict[str, Any]:
    """The settings with which a run was begun, by dotted names.

    Raises:
        RunError: the directory has no record of them, or a damaged one.
    """
    settings = read_note(pathlib.Path(directory) / RUN)
    if settings is None:
        raise RunError(f"{directory} is no run: it has no {RUN} that can be read")
    return flatten(settings)
