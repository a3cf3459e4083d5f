"""`unlearn-jax COMMAND`."""

from pixel_jax.cli import Commands, run_program

COMMANDS: Commands = {
    "train": ("unlearn_jax.commands", "teach an adapter a fixed set of examples"),
    "erase": ("unlearn_jax.commands", "carry out requests: examples removed, answers and questions changed"),
    "eval": ("unlearn_jax.commands", "hold the edits against retraining, and against first-order baselines"),
    "verify": ("unlearn_jax.requests.main", "check the log of requests and the files that it names"),
    "plan": ("unlearn_jax.planning.main", "predict memory and time of an edit on TPUs that need not be there"),
    "bench": ("unlearn_jax.bench.main", "products and solves beside other libraries; what an edit costs"),
}


def main() -> None:
    """Entry point of the console script."""
    run_program("unlearn-jax", COMMANDS)
