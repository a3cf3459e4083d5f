"""The visual search set as a TFDS builder, written as ArrayRecord files. TensorFlow is never imported.

    import pixel_jax.search_set.tfds_builder
    import tensorflow_datasets as tfds

    builder = tfds.builder("visual_search/1k", data_dir="OUT", photographs="/usr/share/wallpapers", file_format="array_record")
    builder.download_and_prepare()
    items = builder.as_data_source(split="test")  # also "train" and "val"

The configurations are the tiers; `miniature` needs no folder of photographs.
"""

import numpy as np

from pixel_jax.data.prepared import FEATURES, record_of, tfds  # tfds from where TensorFlow is kept out of it
from pixel_jax.search_set.items import TIERS
from pixel_jax.search_set.photographs import SHARES
from pixel_jax.search_set.writing import Photographs, SetConfig, example_of, items_of

TEXT, TEXTS = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
ITEM = {
    "category": TEXT,
    "options": TEXTS,
    "box": tfds.features.Tensor(shape=(None, 4), dtype=np.int64),
    **dict.fromkeys(("tier", "difficulty", "kind", "photograph"), TEXT),
}


class VisualSearch(tfds.core.GeneratorBasedBuilder):
    """Questions about small things in large photographs, made from a seed."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=tier.name, description=f"Pictures of {tier.size[0]} x {tier.size[1]} pixels.")
        for tier in TIERS.values()
    ]

    def __init__(self, *, photographs=None, seed=0, share=1.0, file_format=None, **options):
        """Makes a builder; `photographs`, `seed` and `share` are those of `SetConfig`."""
        self.made_of = {"photographs": photographs, "seed": seed, "share": share}
        super().__init__(file_format=file_format or "array_record", **options)  # TFDS's own default needs TensorFlow

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(FEATURES | ITEM),
            metadata=tfds.core.MetadataDict(self.made_of),
            disable_shuffling=True,  # items stay in their order
        )

    def _split_generators(self, dl_manager):
        photographs = Photographs.of(self._set_config)
        return {split: self._generate_examples(photographs, split) for split in SHARES}

    @property
    def _set_config(self) -> SetConfig:
        config = self.builder_config
        assert config is not None
        return SetConfig(**self.made_of, tiers=(config.name,))

    def _generate_examples(self, photographs: Photographs, split: str):
        (name,) = self._set_config.tiers
        tier = TIERS[name]
        for number, item in enumerate(items_of(photographs, tier, split, self._set_config)):
            example = example_of(item, tier, split, number)
            yield number, {**record_of(example), "category": example.category, **example.fields}
