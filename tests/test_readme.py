"""What the README shows runs as it stands there, and what it points to is there."""

import pathlib
import re

import jax
import pytest
from PIL import Image

import pixel_jax
from pixel_jax.models.io import save_pretrained
from pixel_jax.models.processor import Processor
from tests.rollouts import scripted_model

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LINKED = re.findall(r"\]\((?!https?:)([^)#]+)", README)


def test_it_is_one_page():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("link", sorted(set(LINKED)))
def test_what_it_points_to_is_there(link):
    assert (ROOT / link).exists()


def test_the_rollout_of_the_readme(tmp_path, monkeypatch, capsys):
    """As it stands there, on a small model, with the room that such a one needs."""
    (block,) = (
        block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "pixel_jax.rollout(" in block
    )
    assert len(block.splitlines()) <= 15 and block.count("import") == 2  # JAX, and one of ours
    processor = Processor(scripted_model.vocabulary().tokenizer, min_pixels=784, max_pixels=4 * 784)
    save_pretrained(scripted_model.model(), processor, tmp_path / "DIR")
    Image.fromarray(scripted_model.image(1, 120, 150)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    asked = {}

    def small(**given):
        asked.update(given)
        return scripted_model.CONFIG

    monkeypatch.setitem(vars(pixel_jax), "RolloutConfig", small)
    found = {}
    exec(compile(block.replace('"bfloat16"', "None"), "README.md", "exec"), found)
    assert set(asked) <= set(type(scripted_model.CONFIG).__dataclass_fields__)
    rows = found["trajectories"].tokens.shape[0]
    printed = capsys.readouterr().out
    assert rows == scripted_model.CONFIG.group_size and printed.strip()
    mask = jax.device_get(found["trajectories"].loss_mask)
    assert mask.any(axis=1).all()
