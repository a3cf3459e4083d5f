"""The configuration of edits of a run; `configs/unlearn/run.py` sets it."""

import dataclasses
import pathlib
from typing import Literal

from pixel_jax.export import PHASES
from pixel_jax.run_record import FILE
from unlearn_jax.config import ErasureConfig
from unlearn_jax.requests.request import EditRequestError
from unlearn_jax.requests.task import RequestsConfig

FOLDER = "edits"  # in a run's directory


@dataclasses.dataclass(frozen=True)
class RunEditConfig:
    """Edits of the adapter of a finished run."""

    run: str  # directory of the run, its config's `out`
    model: str | None = None  # directory of the run's base model, if it has been moved
    data: str | None = None  # path of the data, if it has been moved
    # How an edit is computed. `reduction` and `training_epochs` are replaced by those of the run.
    erasure: ErasureConfig = ErasureConfig(micro_batch=8)
    requests: RequestsConfig = RequestsConfig()
    task: Literal["run"] = "run"  # what is edited, see `unlearn_jax.commands`

    @property
    def out(self) -> str:
        """The directory of the log, the adapters and the pages."""
        return str(pathlib.Path(self.run) / FOLDER)

    @property
    def phase(self) -> pathlib.Path:
        """The directory with the run's record.

        Raises:
            EditRequestError: it has none, or there is no such run.
        """
        run = pathlib.Path(self.run)
        phases = [run / name for name in PHASES if (run / name / FILE).is_file()]
        if phases:
            return phases[0]
        if not run.is_dir():
            raise EditRequestError(f"there is no run {self.run!r}: give the config.out of a `pixel-jax sft`")
        raise EditRequestError(
            f"{self.run} has no record of what its adapter was trained on (sft/{FILE}). `pixel-jax sft` writes it when it "
            f"ends, if an adapter is all that it trains (as with own_data.py:lora): start its command again, which trains "
            f"no step twice"
        )
