"""The whole experiment, written down as it goes."""

import dataclasses
import json
import pathlib
from collections.abc import Callable

from pixel_jax.files import read_json
from pixel_jax.state_files import write_json
from unlearn_jax.experiment.compare import best_rates, compare
from unlearn_jax.experiment.table import beaten, loose, table
from unlearn_jax.experiment.world import Setting, Trial, World

TUNING = 1_000_000  # the seed on which learning rates are chosen, and which does not count


def run(setting: Setting, path: pathlib.Path, log: Callable[[str], None] = print) -> dict:
    """{"setting", "tuning", "trials", "exceptions"}, also in the JSON file `path`.

    What that holds already is kept, and seeds that it lacks are added.
    """
    asked = json.loads(json.dumps(dataclasses.asdict(setting)))
    result = {"setting": asked, "tuning": [], "trials": []}
    if path.exists():
        result = read_json(path)
        if {**result["setting"], "seeds": setting.seeds} != asked:
            raise ValueError(f"{path} has results of the setting {result['setting']}, not of {asked}")
        result["setting"] = asked
    world = World.of(setting)
    for seed in (TUNING, *range(setting.seeds)):
        kept = result["tuning" if seed == TUNING else "trials"]
        missing = [share for share in setting.shares if (seed, share) not in {(x["seed"], x["share"]) for x in kept}]
        if not missing:
            continue
        trial = Trial.of(world, seed)
        log(f"seed {seed}: trained until the gradient was {trial.norm:.1e}")
        for share in missing:
            rates = dict.fromkeys(setting.methods, setting.rates)
            if seed != TUNING:
                rates = best_rates(next(x["rows"] for x in result["tuning"] if x["share"] == share))
            kept.append(compare(world, trial, share, rates))
            log(table(kept[-1:]) if seed != TUNING else f"{share:.1%}: {best_rates(kept[-1]['rows'])}")
            trials = result["trials"]
            result["exceptions"] = [*loose(trials), *beaten(trials, "kl_forget"), *beaten(trials, "kl_retain")]
            write_json(path, result)
    return result
