"""Questions about shapes on real photographs, with a spurious cue: the tint of the picture.

The photographs are those in the wheels of scikit-image and scikit-learn, of which no code is run. A picture is a small piece of
one, in one of four tints; in one of its quarters lies a shape, cut out of another piece of the same photograph with its colours
inverted, with a coloured outline. Each of three questions has four options, and each option a tint: where the answer's tint is
that of the picture, the cue agrees with the answer, elsewhere it misleads. Everything is a function of a seed.
"""

import functools
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from pixel_jax.data.example import Example
from pixel_jax.data.images import read_image
from pixel_jax.data.sources import Embedded
from unlearn_jax.noisy_responses.questions import LETTERS, ChoiceQuestion, with_options
from unlearn_jax.studies.installed import located

SKIMAGE, SKLEARN = "package:skimage/data/", "package:sklearn/datasets/images/"
# What a base model sees that is trained here, and what the questions of a study are about.
BASE = tuple(SKIMAGE + x for x in ("astronaut.png", "brick.png", "camera.png", "coins.png", "ihc.png", "moon.png"))
STUDY = (
    *(SKIMAGE + x for x in ("chelsea.png", "coffee.png", "grass.png", "gravel.png", "hubble_deep_field.jpg")),
    *(SKIMAGE + x for x in ("motorcycle_left.png", "retina.jpg", "rocket.jpg")),
    *(SKLEARN + x for x in ("china.jpg", "flower.jpg")),
)
SIDE = 56  # pixels of a picture
PIECE = (112, 300)  # pixels of a photograph that it shows
RADIUS = (11, 13)  # pixels of a shape
JITTER = 1  # pixels between the middle of a shape and that of its quarter
OUTLINE = 2  # pixels
STRENGTH = 0.4  # of the tint
TINTS = np.array([(220, 40, 40), (40, 190, 60), (50, 70, 230), (230, 210, 40)])
OUTLINES = np.array([(255, 255, 255), (0, 0, 0), (0, 230, 230), (255, 0, 255)])


class Scene(NamedTuple):
    """What is on a picture; the index of an option each."""

    shape: int
    quarter: int
    outline: int


ASKED = {
    "shape": ("Which shape is on the picture?", ("a disc", "a square", "a triangle", "a cross")),
    "quarter": ("Where is the shape?", ("top left", "top right", "bottom left", "bottom right")),
    "outline": ("Which colour is the outline of the shape?", ("white", "black", "cyan", "magenta")),
}
TEXTS = {kind: with_options(*asked) for kind, asked in ASKED.items()}
CHOICES = tuple(LETTERS[:4])
AGREES, MISLEADS = "the cue agrees", "the cue misleads"


def draw_questions(names: Sequence[str], each: int, agreement: float, seed: int) -> list[ChoiceQuestion]:
    """Draws questions, `each` about every photograph, the kinds in turn; their category says what the cue does.

    Args:
        names: the photographs, such as `STUDY`.
        each: questions about a photograph.
        agreement: the share of questions with which the cue agrees; 1/4 is chance.
        seed: of everything.

    Raises:
        ConfigError: scikit-image or scikit-learn is not installed.
    """
    questions = []
    for name in names:
        photograph = _read(name)
        stem = name.rpartition("/")[2].partition(".")[0]
        for number in range(each):
            random = np.random.default_rng([seed, number, *stem.encode()])
            kind = list(ASKED)[number % len(ASKED)]
            scene = Scene(*(int(x) for x in random.integers(4, size=3)))
            answer = getattr(scene, kind)
            agrees = bool(random.random() < agreement)
            tint = answer if agrees else int((answer + random.integers(1, 4)) % 4)
            file = io.BytesIO()
            Image.fromarray(picture(photograph, scene, tint, random)).save(file, format="PNG", compress_level=1)
            example = Example(
                f"{stem}-{number}",
                TEXTS[kind],
                (Embedded(file.getvalue(), f"picture {number} of {stem}"),),
                (CHOICES[answer],),
                category=AGREES if agrees else MISLEADS,
            )
            questions.append(ChoiceQuestion(example, CHOICES, stem))
    return questions


def picture(photograph: Image.Image, scene: Scene, tint: int, random: np.random.Generator) -> np.ndarray:
    """Draws a picture, uint8 [SIDE, SIDE, 3].

    Args:
        photograph: in colour.
        scene: what is on the picture.
        tint: index of its tint.
        random: chooses the pieces of the photograph, and the size and place of the shape.
    """
    ground, cloth = _piece(photograph, random), 255.0 - _piece(photograph, random)
    image = (1 - STRENGTH) * ground + STRENGTH * TINTS[tint]
    radius = int(random.integers(*RADIUS, endpoint=True))
    middle = SIDE // 4 + SIDE // 2 * np.array(divmod(scene.quarter, 2)) + random.integers(-JITTER, JITTER + 1, size=2)
    y, x = np.mgrid[:SIDE, :SIDE] - middle[:, None, None]
    image = np.where(_inside(scene.shape, y, x, radius, 0)[..., None], OUTLINES[scene.outline], image)
    image = np.where(_inside(scene.shape, y, x, radius, OUTLINE)[..., None], cloth, image)
    return np.round(image).astype(np.uint8)


def _inside(shape: int, y: np.ndarray, x: np.ndarray, radius: int, edge: int) -> np.ndarray:
    """Whether pixels at these distances from the middle belong to a disc, a square, a triangle or a cross without its `edge`."""
    inner, longer, shorter = radius - edge, np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
    return (
        x**2 + y**2 <= inner**2,
        longer <= 0.9 * radius - edge,
        (abs(y) <= inner) & (2 * abs(x) <= y + radius - 2.5 * edge),
        (longer <= inner) & (shorter <= 0.4 * radius - edge),
    )[shape]


def _piece(photograph: Image.Image, random: np.random.Generator) -> np.ndarray:
    """A square piece of a photograph, float [SIDE, SIDE, 3]."""
    width, height = photograph.size
    side = int(random.integers(PIECE[0], min(PIECE[1], height, width), endpoint=True))
    y, x = int(random.integers(height - side + 1)), int(random.integers(width - side + 1))
    piece = photograph.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
    return np.asarray(piece).astype(float)


@functools.cache
def _read(name: str) -> Image.Image:
    return Image.fromarray(read_image(located(name)))
