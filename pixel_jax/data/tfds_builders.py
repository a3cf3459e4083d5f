"""TFDS builders of the released data: prepared once as ArrayRecord files of encoded images, which `prepared.py` reads at random.

TensorFlow is never imported. To prepare, put `release.json` or `release.parquet` and its archives into a directory:

    import pixel_jax.data.tfds_builders
    import tensorflow_datasets as tfds

    config = tfds.download.DownloadConfig(manual_dir="DIRECTORY")
    source = tfds.data_source("pixel_reasoner_traces", split="train", data_dir="OUT",
                              download_and_prepare_kwargs={"download_config": config})

Afterwards `--config.data=OUT/pixel_reasoner_traces/strict/1.1.0` trains on it. Every image is decoded while preparing; the
configuration `strict` stops at the first bad row, `readable` leaves bad rows out and keeps their names in the metadata.
"""

import pathlib

from pixel_jax.data.prepared import FEATURES, record_of, tfds  # tfds from where TensorFlow is kept out of it
from pixel_jax.data.read import read_examples


class _Released(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A builder of the rows of one released file, which lies in `manual_dir`."""

    VERSION = tfds.core.Version("1.1.0")
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="strict", description="A bad row is an error."),
        tfds.core.BuilderConfig(name="readable", description="Bad rows are left out and named in the metadata."),
    ]
    FILE: str
    TURNS: bool

    def __init__(self, *, file_format=None, **options):
        super().__init__(file_format=file_format or "array_record", **options)  # TFDS's own default needs TensorFlow

    @property
    def MANUAL_DOWNLOAD_INSTRUCTIONS(self) -> str:  # noqa: N802 (TFDS's name)
        return f"Put {self.FILE}, images.zip and videos.zip into manual_dir."

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(FEATURES),
            homepage="https://tiger-ai-lab.github.io/Pixel-Reasoner/",
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,  # rows stay in the order of the release
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(pathlib.Path(dl_manager.manual_dir) / self.FILE)}

    def _generate_examples(self, path: pathlib.Path):
        config, metadata = self.builder_config, self.info.metadata
        assert config is not None and metadata is not None
        examples, report = read_examples(path, turns=self.TURNS, drop=config.name == "readable")
        metadata.update(dropped=report.dropped, mended=dict(report.mended))
        for i, example in enumerate(examples):
            example.query()
            yield i, record_of(example)


class PixelReasonerTraces(_Released):
    """Pixel Reasoner's instruction-tuning traces (TIGER-Lab/PixelReasoner-SFT-Data)."""

    FILE, TURNS = "release.json", True


class PixelReasonerQuestions(_Released):
    """Pixel Reasoner's questions for reinforcement learning (TIGER-Lab/PixelReasoner-RL-Data)."""

    FILE, TURNS = "release.parquet", False
