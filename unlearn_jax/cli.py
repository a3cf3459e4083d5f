"""`unlearn-jax COMMAND`."""

from pixel_jax.cli import Commands, run_program

COMMANDS: Commands = {
    "train": ("unlearn_jax.quickstart.commands", "teach an adapter of the quickstart's model a fixed set of traces"),
    "erase": ("unlearn_jax.quickstart.commands", "edit it: traces removed, answers corrected, questions changed"),
    "eval": ("unlearn_jax.quickstart.commands", "hold the edit against retraining, and against first-order baselines"),
    "plan": ("unlearn_jax.planning.main", "predict memory and time of an edit on TPUs that need not be there"),
    "bench": ("unlearn_jax.bench.main", "products and solves beside other libraries; what an edit costs"),
}


def main() -> None:
    """Entry point of the console script."""
    run_program("unlearn-jax", COMMANDS)
