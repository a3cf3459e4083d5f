"""Limits hold for all threads of a process together."""

import io
import pathlib
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from pixel_jax.config import ConfigError, load
from pixel_jax.data.images import ImageError, read_image
from pixel_jax.data.limits import PICTURE_BYTES, Budget, Limits, reserve_decoding
from pixel_jax.data.sources import Member, frame_sizes, read_bytes
from tests.data.ffmpeg import ffmpeg

THREADS = 8
slow = pytest.mark.slow


def test_a_budget_is_never_overdrawn():
    budget, inside, most, lock = Budget(10), 0, 0, threading.Lock()

    def work(size):
        nonlocal inside, most
        with budget.reserve(size, "it"):
            with lock:
                inside += size
                most = max(most, inside)
            time.sleep(0.002)
            with lock:
                inside -= size

    sizes = np.random.default_rng(0).integers(0, 11, 60).tolist()
    threads = [threading.Thread(target=work, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert inside == 0 and 5 < most <= 10


def test_room_is_given_back_when_reading_fails():
    budget = Budget(10)
    for _ in range(3):
        with pytest.raises(KeyError), budget.reserve(10, "it"):
            raise KeyError
    with pytest.raises(ImageError, match=r"it takes 11 bytes to read, more than the 10 there are \(limits.memory\)"):
        with budget.reserve(11, "it"):
            pass


def test_limits_are_positive():
    with pytest.raises(ValueError, match="pixels must be positive, not 0"):
        Limits(pixels=0)
    assert load(Limits, {"side": 9}) == Limits(side=9)
    with pytest.raises(ConfigError, match="nearest known one is config.memory"):
        load(Limits, {"memories": 9})


def test_what_never_has_room_is_refused_by_name(own_limits):
    file = io.BytesIO()
    Image.new("RGB", (100, 100)).save(file, "PNG")
    own_limits(Limits(memory=100 * 100 * PICTURE_BYTES))
    with pytest.raises(ImageError, match="here takes 240,000 bytes to read, more than the 180,000 there are"):
        read_image(file.getvalue(), name="here")


def test_avifs_take_turns(own_limits):
    """What their headers say is not relied on: one at a time where there is little room."""
    file = io.BytesIO()
    Image.new("RGB", (40, 40)).save(file, "AVIF")
    own_limits(Limits(memory=4 << 20))
    begun = threading.Event()

    def read():
        begun.set()
        read_image(file.getvalue())

    with reserve_decoding(1, "something"):
        thread = threading.Thread(target=read)
        thread.start()
        assert begun.wait(60)
        thread.join(0.3)
        assert thread.is_alive()
    thread.join(60)
    assert not thread.is_alive()


def test_a_member_is_not_unpacked_beyond_its_room(own_limits, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(10_000_000))
    own_limits(Limits(memory=36_000_000))
    with pytest.raises(
        ImageError, match="a.zip:a.png takes 10,000,000 bytes to read, more than the 9,000,000 there are"
    ):
        read_bytes(Member(tmp_path / "a.zip", "a.png"))
    with pytest.raises(ImageError, match="a.zip:a.png takes 10,000,000 bytes to read"):
        frame_sizes([Member(tmp_path / "a.zip", "a.png")], video=False)
    own_limits(Limits(memory=40_000_000))
    assert read_bytes(Member(tmp_path / "a.zip", "a.png")) == bytes(10_000_000)


PEAK = f"""
import pathlib, sys, threading
from pixel_jax.data.clips import read_video
from pixel_jax.data.images import read_image
from pixel_jax.data.limits import Limits, use_limits
from pixel_jax.data.sources import Member, read_bytes

path, memory = pathlib.Path(sys.argv[1]), int(sys.argv[2])
use_limits(Limits(memory=memory))
small = path.with_name("small" + path.suffix)
read = {{".zip": lambda path: len(read_bytes(Member(path, "a"))), ".mp4": read_video}}.get(path.suffix, read_image)
peak = lambda: int(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
read(small)  # what is loaded once
before = peak()
threads = [threading.Thread(target=read, args=(path,)) for _ in range({THREADS})]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(peak() - before)
"""


def peak(path, memory: int) -> int:
    """Bytes that as many threads take at most, in a process of their own, when all read `path` at once."""
    done = subprocess.run([sys.executable, "-c", PEAK, path, str(memory)], capture_output=True, text=True, check=True)
    assert not done.stderr
    return int(done.stdout)


def write(path, size: int) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a", bytes(size**2 * 8))
    elif path.suffix == ".mp4":
        source = f"color=gray:size={size}x{size}:rate=10:duration=2"
        ffmpeg("-f", "lavfi", "-i", source, "-c:v", "libx264", "-preset", "ultrafast", "-refs", "16", path)
    else:
        exif = Image.Exif()
        exif[0x0112] = 6
        options = {"lossless": True, "method": 0} if path.suffix == ".webp" else {}
        Image.new("RGBA", (size, size), "#12345678").save(path, exif=exif, **options)


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")
@pytest.mark.parametrize(
    "suffix, memory",
    [(".webp", 250), (".zip", 200), pytest.param(".png", 250, marks=slow), pytest.param(".mp4", 700, marks=slow)],
)
def test_threads_wait_for_room(suffix, memory, tmp_path):
    """Each reads what takes 25 MB or more; without a bound they take several times as much."""
    path = tmp_path / f"large{suffix}"
    write(path, 1536 if suffix == ".mp4" else 1792)
    write(tmp_path / f"small{suffix}", 32)
    bounded, free = peak(path, memory << 20), peak(path, 16 << 30)
    assert bounded < memory << 20 and free > 1.3 * bounded, (bounded >> 20, free >> 20)
