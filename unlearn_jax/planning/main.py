"""`unlearn-jax plan`: memory and time of what an edit spends its time in, on a machine that need not be there.

That is the Gauss-Newton matrix of a tuned adapter times a vector, compiled for imagined TPUs as `pixel-jax plan` compiles the
steps of training:

    unlearn-jax plan --config=pixel/qwen2_5_vl_7b_sft:lora --topology=v5p:4x4x4,v5e:16x16 --json=plan.json
"""

from pixel_jax.planning import main as planning

SETTINGS = planning.SETTINGS


def define_flags(command: str) -> None:
    """Those of `pixel-jax plan`."""
    planning.define_flags(command)


def main(command: str, arguments: list[str]) -> None:
    """Plans the edit of an adapter that the config's warm start has tuned."""
    from unlearn_jax.planning.recipe import EditRecipe

    planning.main(command, arguments, EditRecipe.of)
