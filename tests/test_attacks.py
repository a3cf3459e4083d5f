"""Damaged and hostile files, many of each kind: a reader reads them or says in its named error why not, within its time.

Slow. `pytest --all -s tests/test_attacks.py` prints for every surface how many were tried, refused and survived.
"""

import collections
import contextlib
import io
import json
import random
import time
import warnings

import numpy as np
import pytest
from PIL import Image

from pixel_jax.data.clips import read_video
from pixel_jax.data.images import image_size, read_image
from pixel_jax.evaluation import report, transcript
from pixel_jax.files import FileError, read_json
from pixel_jax.models import Qwen2_5_VLConfig
from pixel_jax.models.released import released
from pixel_jax.pictures import ImageError
from tests.data import test_reader_errors as readers
from tests.data.ffmpeg import ffmpeg

pytestmark = pytest.mark.slow
MOST_SECONDS = 20.0  # of one try: a busy machine is slow, an attack that works takes minutes
# Numbers that lengths, sizes and counts are replaced by.
NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


class Refused(Exception):
    """The reader has said what is wrong."""


def mutants(seed: bytes, count: int, rng: random.Random):
    """Copies of a file with bytes flipped, numbers replaced, pieces cut out, doubled or moved, and its end missing."""
    for _ in range(count):
        data = bytearray(seed)
        for _ in range(rng.choice([1, 1, 2, 4, 16])):
            at, length = rng.randrange(len(data) or 1), rng.choice([1, 2, 4, 16, 256])
            match rng.randrange(6):
                case 0:
                    data[at : at + 1] = bytes([rng.randrange(256)])
                case 1:
                    data[at : at + 4] = rng.choice(NUMBERS).to_bytes(4, rng.choice(["big", "little"]))
                case 2:
                    del data[at : at + length]
                case 3:
                    data[at:at] = data[at : at + length]
                case 4:
                    data[at:at] = bytes(rng.randrange(256) for _ in range(length))
                case 5:
                    del data[rng.randrange(len(data) or 1) :]
        yield bytes(data)


def attack(surface: str, tries, read, errors) -> None:
    """Gives `read` every one of `tries`. Whatever else than `errors` comes out of it, or takes too long, has not survived."""
    counts, fatal = collections.Counter(), []
    for data in tries:
        counts["tried"] += 1
        began = time.monotonic()
        try:
            read(data)
        except errors:
            counts["refused"] += 1
        except Exception as error:
            fatal.append(f"{type(error).__name__}: {error}"[:300])
            continue
        if (taken := time.monotonic() - began) > MOST_SECONDS:
            fatal.append(f"{taken:.0f} s")
    survived = counts["tried"] - len(fatal)
    print(f"\n{surface}: {counts['tried']} tried, {survived} survived, {counts['refused']} of them refused by name")
    assert counts["tried"] and not fatal, fatal[:5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return readers.folder.__wrapped__(tmp_path_factory)


@pytest.mark.parametrize("reader", readers.READERS)
def test_rows(folder, reader):
    rng, document = random.Random(reader), json.dumps(readers.READERS[reader][1]).encode()

    def read(data):
        if isinstance(readers.attempt(folder, reader, data), str):  # the message of the reader's own error
            raise Refused

    attack(reader, mutants(document, 1500, rng), read, Refused)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "AVIF"])
def test_pictures(kind):
    rng = np.random.default_rng(0)
    picture, file = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)), io.BytesIO()
    exif = {} if kind in ("GIF", "BMP") else {"exif": b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"}
    picture.save(file, kind, **exif)

    def read(data):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `ImageWarning`, and Pillow's of tags
            with contextlib.suppress(ImageError):  # a header may be right where the pixels are not
                image_size(data)
            pixels = read_image(data)
        assert pixels.dtype == np.uint8 and pixels.shape[2] == 3

    attack(kind, mutants(file.getvalue(), 1000, random.Random(kind)), read, ImageError)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "webm", "avi"])
def test_videos(tmp_path, suffix):
    path = tmp_path / f"clip.{suffix}"
    ffmpeg("-f", "lavfi", "-i", "testsrc=size=64x48:rate=10:duration=2", path)
    seed = path.read_bytes()

    def read(data):
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `ImageWarning`, and Pillow's of tags
            frames, seconds = read_video(path)
        assert frames.dtype == np.uint8 and len(frames) >= 1 and seconds > 0

    attack(suffix, mutants(seed, 150, random.Random(suffix)), read, ImageError)


def test_model_configs(tmp_path):
    values = json.dumps(released("qwen2.5-vl-7b").to_hf()).encode()
    path = tmp_path / "config.json"

    def read(data):
        path.write_bytes(data)
        Qwen2_5_VLConfig.from_hf(read_json(path))

    attack("config.json", mutants(values, 3000, random.Random(0)), read, FileError)


def test_traces(tmp_path):
    path = tmp_path / "traces.json"
    pictures = (transcript.Picture("data:image/png;base64,iVBORw0KGgo=", 4, 4, "a card", ((1, 0, 0, 2, 2),)),)
    turns = (transcript.ShownTurn("assistant", "I look."), transcript.ShownTurn("tool", "Here it is.", pictures))
    transcript.save(
        path, [transcript.Transcript("What?", pictures, pictures, turns, "answer", "7", "7", True, "a title")]
    )

    def read(data):
        path.write_bytes(data)
        for found in transcript.load(path):
            report.transcript(found)

    attack("traces", mutants(path.read_bytes(), 2000, random.Random(1)), read, FileError)
