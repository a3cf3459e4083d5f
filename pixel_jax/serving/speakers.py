"""Makes models that answer (`Speaker`) from directories and flags."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from absl import flags

from pixel_jax.cli import UserError
from pixel_jax.terminal import Waiting

if TYPE_CHECKING:
    from pixel_jax.serving.conversation import Speaker
    from pixel_jax.tools.host import HostTools, HostToolsConfig


def define_speaker_flags() -> None:
    """Declares the flags that `pixel-jax chat` and `pixel-jax serve` share."""
    flags.DEFINE_list("tools", None, "What the model may call: shipped tools, or module:name. By default the paper's.")
    flags.DEFINE_string(
        "call_format", None, "How calls are written, or module:name. By default what the model was trained in."
    )
    flags.DEFINE_integer("tool_workers", 4, "Processes for tools that run on the host.", lower_bound=1)
    flags.DEFINE_float("tool_seconds", 30.0, "Seconds that a call of such a tool may take.", lower_bound=1e-3)


def load_speaker(
    directory: str | os.PathLike,
    *,
    tools: Sequence[str] | None,
    call_format: str | None,
    adapter: str | os.PathLike | None = None,
    temperature: float = 1.0,
) -> "Speaker":
    """Loads the model in a directory as a `Speaker`, with the limits of the file beside it.

    Args:
      directory: the directory of a model, as `save_pretrained` or Hugging Face write it.
      tools: names of the tools that it may call; None: the paper's.
      call_format: name of the call format; None: the one that it was trained with.
      adapter: directory of an adapter in PEFT's format to put on it; None: none.
      temperature: the temperature of its answers, where a request sets none.

    Raises:
      UserError: the model has no tokenizer.
      FileError, ConfigError, ToolError: a file is damaged, or a name unknown.
    """
    from pixel_jax import from_pretrained
    from pixel_jax.dialog import formats
    from pixel_jax.dialog.tokenizer import Vocabulary
    from pixel_jax.rollouts.config import RolloutConfig
    from pixel_jax.rollouts.limits import read_limits, single_answer
    from pixel_jax.rollouts.prompts import tables
    from pixel_jax.serving.conversation import Speaker
    from pixel_jax.tools.named import DEFAULT, find_format, find_tools

    allowed = find_tools(tools or DEFAULT)
    with Waiting(f"reading {os.fspath(directory)}"):
        model, processor = from_pretrained(pathlib.Path(directory), adapter=adapter)
    if processor is None:
        raise UserError(
            f"{directory} has no tokenizer: copy tokenizer.json and tokenizer_config.json of the model into it"
        )
    config = single_answer(read_limits(directory) or RolloutConfig(), temperature).for_model(model.config)
    if call_format:
        # It may be imported, because the command line names it; what a model's files name is not imported.
        find_format(call_format)
        config = dataclasses.replace(config, call_format=call_format)
    vocabulary = Vocabulary.of(processor.tokenizer)
    known = tables(vocabulary, allowed, formats.call_format(config.call_format))
    return Speaker(model, vocabulary, known, config, sampling=processor.sampling)


@contextlib.contextmanager
def host_tools(speaker: "Speaker", names: Sequence[str], config: "HostToolsConfig") -> Iterator["HostTools | None"]:
    """Starts the workers of those of the named tools that run on the host; yields None if none does."""
    from pixel_jax.tools.host import HostTools

    if not any(tool.host for tool in speaker.tables.tools):
        yield None
        return
    with HostTools(names, config) as host:
        yield host
