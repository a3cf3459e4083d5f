"""An adapter of the quickstart's model, and edits of it. Every value can be set on the command line:
`unlearn-jax train --config.model=DIR --config.traces.zoom=40`."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.task = "traces"
    config.seed = 0
    config.model = "runs/quickstart/seed-0/warm/model"  # `bash launch/quickstart.sh` makes it
    config.out = "runs/unlearn"

    config.traces = {"zoom": 16, "direct": 8, "video": 8}
    config.adapter = {"rank": 4, "alpha": 8.0, "targets": r"model\.layers\..*\.(q_proj|v_proj)"}
    config.forward = {"remat": True, "implementation": "dense"}
    config.training = {"tolerance": 1e-4, "max_steps": 500}

    # What is not set here is as in the preset "best". The first two also say what the adapter is trained on.
    config.erasure = {
        "reduction": "per_example",
        "weight_decay": 1e-3,
        "micro_batch": 16,
        "training_epochs": 500.0,  # a step of L-BFGS is one: the edit may cost a quarter of them
        "solver": {"name": "cg", "rtol": 0.1},  # of the Newton step; L-BFGS goes on from there
    }
    config.requests = {"allow": ("unconverged", "solver", "shortened", "negative_curvature", "finish", "budget")}
    config.evaluation = {"baselines": ("L-BFGS", "fine-tune", "NPO"), "learning_rates": (1e-3, 3e-3, 1e-2), "batch": 8}
    return config
