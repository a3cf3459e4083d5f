"""`unlearn-jax COMMAND`."""

from pixel_jax.cli import Commands, run_program

COMMANDS: Commands = {
    "train": ("unlearn_jax.commands", "train an adapter on a fixed set of examples"),
    "erase": ("unlearn_jax.commands", "carry out requests: examples removed, answers and questions changed"),
    "eval": ("unlearn_jax.commands", "compare the edits with retraining and with first-order baselines"),
    "verify": ("unlearn_jax.requests.main", "check the log of requests and the files that it names"),
    "plan": ("unlearn_jax.planning.main", "predict memory and time of an edit on TPUs that are not present"),
    "bench": (
        "unlearn_jax.bench.main",
        "measure products and solves, compared with other libraries, and the cost of an edit",
    ),
}


def main() -> None:
    """Entry point of the console script."""
    run_program("unlearn-jax", COMMANDS)
