"""The ffmpeg program, which shows what a player shows (`pip install imageio-ffmpeg`)."""

import pathlib
import re
import subprocess

import imageio_ffmpeg
import numpy as np

PROGRAM = imageio_ffmpeg.get_ffmpeg_exe()


def ffmpeg(*arguments) -> str:
    """Runs it; returns what it says."""
    command = [PROGRAM, "-hide_banner", "-nostdin", "-y", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr
    return done.stderr


def frames_of(path: pathlib.Path, filters: str = "null") -> np.ndarray:
    """uint8 [t, h, w, 3]: every frame that it decodes, none repeated, turned as its metadata asks."""
    raw = path.with_suffix(".raw")
    raw_video = ("-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24")
    said = ffmpeg("-max_error_rate", 1, "-i", path, "-vf", filters, *raw_video, raw)
    width, height = map(int, re.findall(r"Video: rawvideo.*?, rgb24.*? (\d+)x(\d+)", said)[-1])
    return np.fromfile(raw, np.uint8).reshape(-1, height, width, 3)


def make(
    path: pathlib.Path, *arguments, count: int = 80, rate: int = 20, size: tuple[int, int] = (48, 64)
) -> pathlib.Path:
    """A clip of a moving test pattern, (height, width) `size`; `arguments` are the encoder's."""
    source = f"testsrc=size={size[1]}x{size[0]}:rate={rate}:duration={(count + 0.1) / rate}"
    ffmpeg("-f", "lavfi", "-i", source, "-frames:v", count, *(arguments or H264), path)
    return path


H264 = ("-c:v", "libx264", "-preset", "fast", "-g", "20", "-bf", "2", "-pix_fmt", "yuv420p")
