"""`pixel-jax check DIR [--data=FILE]`: checks whether a model, the data and this machine go together.

With a model (a directory, or a GGUF file): devices and versions, the model's files, what answering and training take of the
memory, the rows of the data and their faults, whether the model sees (else it stops), one rollout and one update at small
shapes. Settings of training are those of `sft` and `rl`: --config=pixel/own_data:lora checks the tuning of adapters.

Without one: whether an accelerator computes correctly, and how close it comes to its peak rates. It compares attention kernels
with dense attention and crops with Pillow bit for bit, and measures the memory rate of decoding and, for updates at the shapes
of a 3B and a 7B with random weights and few layers, utilisation and planned against real memory. Every part has its own process
and time limit; a part that fails or takes too long is reported, and the others go on. On a CPU shapes are tiny and the figures
have no meaning.

Either way the record is one JSON file.
"""

import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from absl import flags

from pixel_jax.config import define_flag
from pixel_jax.terminal import Waiting, say

FLAGS = flags.FLAGS
# The shares of the time of the parts (`check_parts.PARTS`); most of it is spent on compilation.
SHARES = {"machine": 1, "kernels": 3, "crops": 2, "decode": 3, "update-3b": 3, "update-7b": 3}
MAX_ERROR = 2000  # characters of a failed part's last output


def define_flags(command: str) -> None:
    """Declares the flags of `check`."""
    define_flag("pixel/own_data", "With a model: the experiment, as for `sft` and `rl`.")
    flags.DEFINE_string("data", None, "With a model: what it is to be trained on, in the place of config.data.")
    flags.DEFINE_string("adapter", None, "With a model: directory of an adapter (PEFT's format) to put on it.")
    flags.DEFINE_bool("quick", False, "Tiny shapes also where there is an accelerator: whether it works, not how fast.")
    flags.DEFINE_integer("seconds", 480, "The most that all parts may take together.", lower_bound=1)
    flags.DEFINE_list("only", [], "The parts to run, separated by commas; all if empty.")
    flags.DEFINE_string("out", "runs/check.json", "Where the record is written.")


def main(command: str, arguments: list[str]) -> None:
    """Checks the model of the command line or, without one, the accelerator; what does not pass is an error at the end."""
    from pixel_jax.cli import UserError, check_output

    if len(arguments) > 1:
        raise UserError(f"unexpected argument {arguments[1]!r}: give one model, a directory or a GGUF file")
    model = arguments[0] if arguments else FLAGS.config.get("model")
    if model is not None:
        check_directory(model)
        return
    if FLAGS.data is not None or FLAGS.adapter is not None:
        raise UserError("--data and --adapter are checked with a model: pixel-jax check DIR --data=FILE")
    if unknown := sorted(set(FLAGS.only) - set(SHARES)):
        raise UserError(f"there is no part {', '.join(unknown)}; the parts are {', '.join(SHARES)}")
    shares = {name: SHARES[name] for name in FLAGS.only or SHARES}
    out = pathlib.Path(FLAGS.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    check_output("--out", out)
    record = check({name: part_command(name, FLAGS.quick) for name in shares}, shares, FLAGS.seconds, out)
    failed = [name for name, part in record["parts"].items() if part["status"] != "passed"]
    if failed:
        raise UserError(f"{', '.join(failed)} of {len(record['parts'])} parts did not pass; {out} says why")
    say(f"All parts passed on {record['device']}; their figures are in {out}.")


def check_directory(model: str) -> None:
    """Checks a model, and the data if there is some. UserError: something is wrong."""
    import dataclasses

    from pixel_jax.bench.check_model import check_model
    from pixel_jax.cli import UserError, check_output
    from pixel_jax.config import load
    from pixel_jax.train_config import TrainConfig

    out, data = pathlib.Path(FLAGS.out), FLAGS.data or FLAGS.config.get("data")
    values = {**FLAGS.config, "model": model, "data": data or "", "out": FLAGS.config.get("out") or str(out.parent)}
    config = load(TrainConfig, values)
    if FLAGS.adapter is not None:
        config = dataclasses.replace(config, adapter=FLAGS.adapter, lora=None)
    out.parent.mkdir(parents=True, exist_ok=True)
    check_output("--out", out)
    if wrong := check_model(config, data=data is not None, out=out):
        raise UserError(f"wrong: {', '.join(wrong)}. {out} has the record")
    say(f"All is well; the record is in {out}.")


def part_command(name: str, quick: bool) -> list[str]:
    """The command line of a part."""
    return [sys.executable, "-m", "pixel_jax.bench.check_parts", name, *["--quick"] * quick]


def check(
    commands: Mapping[str, list[str]], shares: Mapping[str, float], seconds: float, out: pathlib.Path
) -> dict[str, Any]:
    """Runs the parts one after the other and returns the record.

    Args:
        commands: part -> the command that prints its figures.
        shares: part -> its share of the time that is left when it starts.
        seconds: the time limit of all parts together.
        out: the file of the record, written after every part.
    """
    began = time.monotonic()
    record: dict[str, Any] = {"device": None, "quick": None, "seconds": 0.0, "parts": {}}
    for name, command in commands.items():
        left = seconds - (time.monotonic() - began)
        ahead = sum(share for other, share in shares.items() if other not in record["parts"])
        most = max(left, 0) * shares[name] / ahead
        with Waiting(f"checking {name}, at most {most:.0f} s"):
            record["parts"][name] = part = run_part(command, most)
        record |= {key: part.pop(key) for key in ("device", "quick") if key in part}
        record["seconds"] = time.monotonic() - began
        out.write_text(json.dumps(record, indent=1) + "\n")
        say("\n  ".join([f"{name}: {part['status']} in {part['seconds']:.0f} s", *part["wrong"]]))
    return record


def run_part(command: list[str], seconds: float) -> dict[str, Any]:
    """Runs a part and returns its figures, with its status: "passed", "failed" or "out of time"."""
    began = time.monotonic()

    def ended(status: str, wrong: list[str], **record: Any) -> dict[str, Any]:
        return {"status": status, "seconds": time.monotonic() - began, "wrong": wrong, **record}

    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds)
    except subprocess.TimeoutExpired:
        return ended("out of time", [f"not done after {seconds:.0f} s"])
    try:
        record = json.loads(done.stdout.splitlines()[-1])
        wrong = record.pop("wrong")
    except (IndexError, KeyError, ValueError):
        return ended("failed", [f"it ended with {done.returncode}: {done.stderr[-MAX_ERROR:]}"])
    return ended("failed" if wrong or done.returncode else "passed", wrong, **record)
