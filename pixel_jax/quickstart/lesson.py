"""The subject of a quickstart: scenes that cannot be read at first sight, the tool that helps, and the two arms compared."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pixel_jax.data.traces import Trace
from pixel_jax.quickstart.config import QuickstartConfig
from pixel_jax.quickstart.miniature import Scene, SceneConfig
from pixel_jax.rollouts.prompts import Query
from pixel_jax.rollouts.trajectory import Trajectories
from pixel_jax.tools import Tool
from pixel_jax.training.rl import RLConfig


def scene_query(scene: Scene) -> Query:
    """The question about a scene."""
    return Query(scene.question, [scene.image])


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of the two runs of reinforcement learning that begin with the same warm start."""

    label: str  # as in "with curiosity"
    change: Callable[[RLConfig], RLConfig]  # what it changes in the configuration


@dataclasses.dataclass(frozen=True)
class Lesson:
    """A quickstart as a value. Its phases, its evaluation and its report follow from this value and from the configuration."""

    title: str  # of the report
    introduction: str  # its first paragraph, without the number of scenes and the seeds
    tools: tuple[Tool, ...]
    questions: tuple[str, ...]
    # Phrases of its dialogs that are one token each: the beginnings and ends of calls, and sentences.
    pieces: tuple[str, ...]
    scene: Callable[..., Scene]  # (rng, split, scenes, hard=None); None draws hard scenes with the configured share
    is_hard: Callable[[Scene], bool]  # whether a scene needs the tool
    look_row: Callable[[np.random.Generator, SceneConfig], Trace]  # phase 1: uses the tool and reads
    read_row: Callable[[np.random.Generator, SceneConfig], Trace]  # phase 1: reads what can be read at a glance
    warm_start: Callable[[np.random.Generator, QuickstartConfig], Trace]  # a trace of phase 2
    most_calls: int  # of a trace
    most_images: int  # that a trace shows
    hard: str  # name of hard scenes in metrics, as in `accuracy_small`
    easy: str
    look: str  # name of the use of the tool in metrics, as in `zoom_small`
    opening: str  # the beginning of a turn that uses the tool
    # Metrics of hard scenes in which the tool had to be used.
    measure: Callable[[Trajectories, Sequence[Scene]], dict[str, float]]
    arms: Mapping[str, Arm]  # two; the first is expected to win
    rows: Mapping[str, str]  # the rows of the report's table: metric -> words
    arrangement: Callable[[QuickstartConfig], list[str]]  # the settings that differ from the paper's, in words

    def arm_config(self, config: QuickstartConfig, arm: str) -> QuickstartConfig:
        """The configuration of an arm."""
        return dataclasses.replace(config, rl=self.arms[arm].change(config.rl))
