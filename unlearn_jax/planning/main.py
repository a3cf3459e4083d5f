"""`unlearn-jax plan`: predicts memory and time of an edit's curvature product on a machine that need not be present.

An edit spends most of its time in products of the Gauss-Newton matrix of an adapter with a vector. One is compiled for TPUs that
are described but not present, as `pixel-jax plan` compiles the steps of training:

    unlearn-jax plan --config=pixel/qwen2_5_vl_7b_sft:lora --topology=v5p:4x4x4,v5e:16x16 --json=plan.json

With `--examples=20000` a product is over so many examples, which are kept in the memory of the hosts.
"""

import functools

from absl import flags

from pixel_jax.planning import main as planning

FLAGS = flags.FLAGS

SETTINGS = planning.SETTINGS


def define_flags(command: str) -> None:
    """Defines the flags of `pixel-jax plan`, and the number of examples."""
    planning.define_flags(command)
    flags.DEFINE_integer(
        "examples", None, "Examples of the edit, in the hosts' memory. Default: one batch, on the devices."
    )


def main(command: str, arguments: list[str]) -> None:
    """Plans the edit of an adapter that the config's SFT trains."""
    from unlearn_jax.planning.recipe import EditRecipe

    planning.main(command, arguments, functools.partial(EditRecipe.of, examples=FLAGS.examples))
