"""The settings of `pixel-jax sft` and `pixel-jax rl`, and what a run records of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pixel_jax.config import load, positive
from pixel_jax.data.digests import Digests, digest_adapter, digest_model, digest_rows
from pixel_jax.data.limits import Limits
from pixel_jax.data.shapes import bucket_shapes
from pixel_jax.identity import nest
from pixel_jax.named import digest, is_name
from pixel_jax.rollouts.config import RolloutConfig
from pixel_jax.rollouts.shapes import BatchShape, prompt_shape
from pixel_jax.tools.host import HostToolsConfig
from pixel_jax.tools.named import DEFAULT
from pixel_jax.training.rl import RLConfig
from pixel_jax.training.sft import SFTConfig
from pixel_jax.training.watch import Criterion, WatchConfig

if TYPE_CHECKING:
    from pixel_jax.models.config import ModelConfig

# In a run's directory: all its settings (config.json is what a model has), and what was read.
CONFIG, DATA = "settings.json", "data.json"
# Settings of shapes by hand that must be given together: for all rows, and for rows about videos.
BY_HAND = {
    "sft": (("trace_tokens", "trace_frames", "trace_patches"), ("video_frames", "video_patches")),
    "rl": (("image_buffer", "prompt_width"), ("video_buffer", "video_prompt_width")),
}


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Adapters (`pixel_jax.models.lora.add_lora`); a phase trains them alone if its `trainable` is ".*lora_"."""

    rank: int  # of the two factors
    alpha: float  # they are scaled by alpha / rank
    targets: str  # regular expression, the linear layers that get one

    def __post_init__(self):
        positive(self, "rank", "alpha")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The settings of an experiment. A file under `configs/` makes one; any field can be set as `--config.FIELD=VALUE`."""

    model: str  # directory to start from
    data: str  # a file of one's own, a released one, or a prepared directory (`pixel_jax.data.read`)
    out: str  # run directory: checkpoints, metrics, conversations, the page of the run, and at the end the model
    # Examples on which the run is evaluated, in the format of `data`; None: `watch.share` of those in `data`.
    data_eval: str | None = None
    image_folders: tuple[str, ...] = ()  # other folders than the data's in which images may lie: ("/",) allows all
    # What data of one's own calls our fields, as in {"question": "prompt", "images": "image"} (`pixel_jax.data.own`).
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    sft: SFTConfig | None = None
    rl: RLConfig | None = None
    architecture: str | None = None  # name of a released network (`pixel_jax.models.released`), for planning without it
    lora: LoRAConfig | None = None
    # Directory of an adapter (PEFT's format) to go on with; it takes the place of a new one by `lora`.
    adapter: str | None = None
    # What a model may call: names of shipped tools, or module:name (`pixel_jax.tools.named`).
    tools: tuple[str, ...] = DEFAULT
    host_tools: HostToolsConfig = HostToolsConfig()  # settings of the tools that run on the host
    corrections: bool = True  # tune on traces that show a mistake, too
    rollout: RolloutConfig = RolloutConfig()  # limits and pixel budgets of traces; `rl.rollout` has those of rollouts
    # Axis sizes of data, fsdp, sequence, tensor; -1 takes the devices that are left. None: one device.
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    # The same for rollouts, which may lie otherwise on the same devices; none: as above.
    rollout_mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    # "drop" leaves out what cannot be read or fits no batch shape, and counts it.
    bad_rows: Literal["error", "drop"] = "error"
    limits: Limits = Limits()  # of the size of a picture, and of the memory that reading takes in a process
    read_threads: int = 16  # threads that read and decode files
    read_ahead: int = 32  # rows (of prompts or packed traces) whose pixels wait in memory
    # Shapes of batches. None: worked out from the data. By hand, for tuning: the size of a row of one or more traces.
    trace_tokens: int | None = None
    trace_frames: int | None = None  # the most pictures of a row: images, frames and crops
    trace_patches: int | None = None  # of one frame
    buckets: tuple[int, ...] = ()  # shorter rows for shorter traces, in tokens: a compilation and less padding for each
    # The most frames of a row of traces that need more than `trace_frames`; None: there are no such rows.
    video_frames: int | None = None
    video_patches: int | None = None  # of one frame of such a row
    # By hand, for reinforcement learning: images of a prompt, and the largest one's height and width.
    image_buffer: tuple[int, int, int] | None = None
    prompt_width: int | None = None  # tokens of a prompt
    # Of questions about videos, if they have shapes of their own: frames, and their height and width. None: as above.
    video_buffer: tuple[int, int, int] | None = None
    video_prompt_width: int | None = None  # tokens of a prompt with a video
    seed: int = 0  # of the order of the examples and of new adapters
    watch: WatchConfig = WatchConfig()  # evaluation while the run goes on
    # Steps (rl: iterations) between models saved in `out`/models/STEP; 0: only the last one, in `out`/model.
    save_model_every: int = 0
    # Keeps the model of the best evaluation in `out`/best: the highest accuracy or the lowest loss on held-out examples.
    keep_best: Criterion | None = None
    # Of the weights of the model that is saved. None: that of the model it began with, as its files have it.
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def __post_init__(self):
        """Refuses sizes that are not positive, half of a shape by hand, and addresses where files are meant."""
        positive(self, "read_threads", "read_ahead", *BY_HAND["sft"][0], *BY_HAND["sft"][1], "prompt_width")
        positive(self, "video_prompt_width")
        if self.save_model_every < 0:
            raise ValueError(f"save_model_every must not be negative: {self.save_model_every}")
        for name in ("image_buffer", "video_buffer"):
            if (shape := getattr(self, name)) is not None and min(shape) < 1:
                raise ValueError(f"{name} is (pictures, height, width), all positive: {shape}")
        for together, more in BY_HAND.values():
            for names in (together, more):
                present = [name for name in names if getattr(self, name) is not None]
                if present and len(present) < len(names):
                    raise ValueError(
                        f"{', '.join(names)} come together, or none of them: only {', '.join(present)} is given"
                    )
                if present and names is more and getattr(self, together[0]) is None:
                    raise ValueError(f"{present[0]} needs {', '.join(together)}, too")
        if self.buckets and self.trace_tokens is None:
            raise ValueError(
                f"buckets {self.buckets} need {', '.join(BY_HAND['sft'][0])}, too: shapes are by hand, or worked out"
            )
        if self.adapter is not None and self.lora is not None:
            raise ValueError(f"adapter {self.adapter!r} is gone on with, lora makes a new one: set one of the two")
        for name in ("model", "data", "out"):
            if "://" in getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)!r}: files are local; mount what is elsewhere")

    def for_model(self, network: "ModelConfig") -> "TrainConfig":
        """Returns the same config with the patch sizes of a model's vision tower (`RolloutConfig.for_model`)."""
        rl = self.rl and dataclasses.replace(self.rl, rollout=self.rl.rollout.for_model(network))
        return dataclasses.replace(self, rollout=self.rollout.for_model(network), rl=rl)

    @property
    def adapts(self) -> bool:
        """Whether the model has an adapter, new or not."""
        return self.lora is not None or self.adapter is not None

    @property
    def tuning(self) -> SFTConfig:
        """The section `sft` of a config that has one."""
        assert self.sft is not None
        return self.sft

    @property
    def learning(self) -> RLConfig:
        """The section `rl` of a config that has one."""
        assert self.rl is not None
        return self.rl

    @property
    def trace_shapes(self) -> tuple[BatchShape, ...] | None:
        """Shapes of rows to tune on. None: they are worked out from the data."""
        if self.trace_tokens is None:
            return None
        assert self.trace_frames is not None and self.trace_patches is not None  # the three come together
        shapes = bucket_shapes(
            self.buckets, BatchShape(self.trace_tokens, self.trace_frames, self.trace_frames, self.trace_patches)
        )
        if self.video_frames is None:
            return shapes
        assert self.video_patches is not None
        return (*shapes, BatchShape(self.trace_tokens, self.video_frames, self.video_frames, self.video_patches))

    @property
    def prompt_shapes(self) -> tuple[BatchShape, ...] | None:
        """Shapes of prompts for `rl`. None: they are worked out from the data."""
        if self.image_buffer is None:
            return None
        assert self.prompt_width is not None  # the two come together
        limits, video_buffer = self.learning.rollout, self.video_buffer or self.image_buffer
        return (
            prompt_shape(*self.image_buffer, self.prompt_width, limits, video=False),
            prompt_shape(*video_buffer, self.video_prompt_width or self.prompt_width, limits, video=True),
        )


def run_settings(command: str, config: TrainConfig, examples: Sequence, digests: Digests) -> dict[str, Any]:
    """Returns what identifies a run: its settings, and digests of its data, its model and the user's own code.

    The settings in the phase's own section are left out: the phase adds them.
    """
    settings = {name: x for name, x in dataclasses.asdict(config).items() if name not in ("sft", "rl")}
    rows = {f"data.{name}": x for name, x in digest_rows(examples, digests).items()}
    limits, terms = config.rollout, []
    if command == "rl":
        limits, terms = config.learning.rollout, [name for name, _ in config.learning.reward.terms]
    # A change of the user's own code makes another experiment.
    code = {name: digest(name) for name in (*config.tools, limits.call_format, *terms) if is_name(name)}
    model = {**digest_model(config.model, digests), **digest_adapter(config.adapter, digests)}
    return {"command": command, **settings, **model, **rows, "code": code}


def recorded(settings: Mapping[str, Any]) -> tuple[str, TrainConfig]:
    """Restores the command and the config of a run from its record (`run_settings`, by dotted names).

    Raises:
        ValueError: the run is of another command.
    """
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    own = {name: x for name, x in settings.items() if name in names or name.split(".")[0] in names - {"data"}}
    if settings.get("command") not in ("sft", "rl"):
        raise ValueError("the run was not begun by `pixel-jax sft` or `pixel-jax rl`")
    return settings["command"], load(TrainConfig, nest(own))
