"""The settings of an evaluation. Defaults are those of the released evaluation (Pixel Reasoner's README)."""

import dataclasses
from typing import Literal

from pixel_jax.config import positive
from pixel_jax.data.limits import Limits
from pixel_jax.rollouts.config import TOKEN_PIXELS, RolloutConfig
from pixel_jax.tools.host import HostToolsConfig
from pixel_jax.tools.named import DEFAULT
from pixel_jax.training.scorers import ScorerConfig

ModeName = Literal["operations", "none", "blank", "blind", "evidence"]  # keys of `pixel_jax.evaluation.modes.MODES`
Bucket = tuple[int, int, int, int]  # images, height and width of the largest, tokens of the prompt

# Greedy, one answer, through the same loop as in training, whose limits of calls, images and tokens are hard-coded
# there. Pixels are those that reach the model: MIN_PIXELS and MAX_PIXELS of the README apply to every image after its own
# limits. Frames are selected from those the video was resized to, 512 patches each.
RELEASED = RolloutConfig(
    group_size=1,
    temperature=0.0,
    top_p=1.0,
    top_k=0,
    max_response=8192,
    min_pixels=512 * TOKEN_PIXELS,
    max_pixels=5120 * TOKEN_PIXELS,
    crop_min_pixels=512 * TOKEN_PIXELS,
    crop_max_pixels=5120 * TOKEN_PIXELS,
    select_max_pixels=512 * TOKEN_PIXELS,
)


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """The settings of a benchmark: its files, its scorer, and the batch shapes of its questions.

    A question runs in the first bucket that holds it; images that fit no bucket are shrunk, which is counted. Without buckets
    shapes are worked out from the sizes of the images and the lengths of the questions.
    """

    # `pixel_jax.evaluation.benchmarks`
    format: Literal["vstar", "tallyqa", "infovqa", "mvbench", "hrbench", "visualprobe", "videomme", "prepared", "jsonl"]
    data: str | None = None  # file or folder; None leaves the benchmark out
    # Folder of the images (prepared: or of their images.zip), if they do not lie beside the data.
    images: str | None = None
    image_folders: tuple[str, ...] = ()  # other folders in which images may lie: ("/",) allows all that the data names
    # What data of one's own ("jsonl", which may be Parquet, too) calls our fields: {"question": "prompt"}.
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    split: Literal["val", "test"] | None = None  # where the files do not say; checkpoints are chosen on "val" only
    sample: int | None = None  # number of questions to draw at random; None: all
    scorer: ScorerConfig = ScorerConfig()
    # (images, height and width of the largest, tokens of the prompt) of each. None: worked out from the questions.
    buckets: tuple[Bucket, ...] | None = None
    max_side: int = 3584  # `RolloutConfig.max_side`: pictures much longer than wide need more

    def __post_init__(self):
        positive(self, "sample", "max_side")
        if self.buckets is not None and not (self.buckets and all(min(bucket) > 0 for bucket in self.buckets)):
            raise ValueError(f"buckets are (images, height, width, tokens), all positive: {self.buckets}")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The settings of an evaluation. A file under `configs/` makes one; any field can be set as `--config.FIELD=VALUE`."""

    model: str  # directory
    out: str  # run directory; what is in it already is not done again
    benchmarks: dict[str, BenchmarkConfig]  # by any names, in the order in which they are asked
    modes: tuple[ModeName, ...] = ("operations",)  # the others are compared with the first
    rollout: RolloutConfig = RELEASED  # `group_size` is the k of Avg@k
    # What the model may call: names of shipped tools, or module:name (`pixel_jax.tools.named`).
    tools: tuple[str, ...] = DEFAULT
    host_tools: HostToolsConfig = HostToolsConfig()  # settings of the tools that run on the host
    batch: int = 64  # questions a step and process; a multiple of data x fsdp of the mesh
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)  # of each process's own devices; none: one device
    limits: Limits = Limits()  # of the size of a picture, and of the memory that reading takes in a process
    traces: int = 16  # questions of each benchmark and mode that are drawn in the report
    seed: int = 0  # of samples of questions and of sampled answers
    # What answers in modes without tools begin with, below the prompt of training, for a model that knows no other prompt.
    # "": below the released prompt without tools.
    assistant_prefix: str = ""
    adapter: str | None = None  # directory of an adapter (PEFT's format) to put on the model

    def __post_init__(self):
        if self.rollout.temperature == 0 and self.rollout.group_size > 1:
            raise ValueError(
                f"{self.rollout.group_size} greedy answers are all alike: set rollout.temperature above 0 for Avg@k"
            )
        if not self.modes or len(set(self.modes)) < len(self.modes):
            raise ValueError(f"modes must be different and at least one: {self.modes}")
        if self.batch < 1 or self.traces < 0:
            raise ValueError(f"batch must be positive and traces not negative: {self.batch}, {self.traces}")
        if not any(benchmark.data is not None for benchmark in self.benchmarks.values()):
            raise ValueError("no benchmark has data: set benchmarks.NAME.data of at least one")
        for name in self.benchmarks:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"a benchmark's name becomes a folder's: letters, digits, - and _ only, not {name!r}")
