"""unlearn-jax verify LOG: checks that a log of requests, and the files that it names, are as they were written.

    unlearn-jax verify runs/unlearn/requests.log.jsonl
    unlearn-jax verify runs/unlearn/requests.log.jsonl --last=HASH

The chain cannot show that lines at its end are missing. Keep the hash of the last line, which every verification prints, and pass
it with --last.
"""

import pathlib

from absl import flags

FLAGS = flags.FLAGS


def define_flags(command: str) -> None:
    """Defines the flags of `unlearn-jax verify`."""
    flags.DEFINE_string("last", None, "Hash of a line that the log must still have.")


def main(command: str, arguments: list[str]) -> None:
    """Prints the entry of every request, and ends with an error if anything was changed."""
    from pixel_jax.cli import UserError
    from pixel_jax.terminal import Waiting, say
    from unlearn_jax.requests.log import last_hash, verify

    if len(arguments) != 1:
        raise UserError("give one log: unlearn-jax verify runs/unlearn/requests.log.jsonl")
    with Waiting("making digests of the files"):
        entries, faults = verify(pathlib.Path(arguments[0]), FLAGS.last)
    for entry in entries:
        say(f"{entry.number}  {entry.at}  {entry.kind} {', '.join(entry.ids)}: {entry.outcome}")
    if faults:
        raise UserError("\n".join([f"{len(faults)} faults:", *faults]))
    say(f"{len(entries)} requests; the chain and all files are as they were written.\nLast line: {last_hash(entries)}")
