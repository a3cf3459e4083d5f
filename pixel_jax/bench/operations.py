"""The cases of `pixel_jax.ops`: crop and resize, selection of frames, patches."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from pixel_jax.bench.network import HAS_TORCH, images
from pixel_jax.bench.timing import Aim, Case, Workload
from pixel_jax.ops import crop_resize, gather_frames, patchify, pixel_values
from pixel_jax.parallel import make_mesh, replicate


def same(outputs) -> None:
    """Checks that all outputs are equal to the last bit."""
    first, *others = (np.asarray(output) for output in outputs.values())
    for other in others:
        np.testing.assert_array_equal(first, other)


def within(levels: int):
    """A check that all outputs, uint8, differ by at most `levels`."""

    def check(outputs) -> None:
        first, *others = (np.asarray(output).astype(int) for output in outputs.values())
        for other in others:
            np.testing.assert_allclose(first, other, rtol=0, atol=levels)

    return check


def close(tolerance: float):
    """A check that all outputs agree within `tolerance` of the largest value."""

    def check(outputs) -> None:
        first, *others = (np.asarray(output) for output in outputs.values())
        for other in others:
            np.testing.assert_allclose(first, other, rtol=0, atol=tolerance * np.abs(other).max())

    return check


def build_crop(exact: bool, aim: float, cores: int | None, quick: bool) -> Workload:
    """Crops of one image, `exact` to the bit or within one level, on all cores or on `cores`."""
    side, out, count = (96, 28, 2) if quick else (1024, 336, 8)
    image = images(1, side, side)[0]
    random = np.random.default_rng(1)
    low = random.integers(0, side // 4, (count, 2))
    high = low + random.integers(side // 4, side * 3 // 4, (count, 2))
    boxes = np.concatenate([low, high], axis=1).astype(np.int32)

    def ours():
        def one(image, box):
            return crop_resize(image, box, jnp.array([out, out]), (out, out), exact=exact)

        crop, buffer = jax.vmap(one, (None, 0)), jnp.asarray(image)
        devices = math.gcd(jax.device_count(), count)
        if jax.default_backend() == "cpu" and devices > 1 and not cores:  # every core is a device and cuts its share
            mesh, rows = make_mesh({"data": devices}, jax.devices()[:devices]), PartitionSpec("data")
            crop = jax.shard_map(crop, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows)
            buffer = replicate(buffer, mesh)
        crop = jax.jit(crop)
        return lambda: crop(buffer, boxes)

    def pillow():
        from PIL import Image

        from pixel_jax.bench.pillow import crop

        picture = Image.fromarray(image)
        return lambda: np.stack([np.asarray(crop(picture, tuple(box.tolist()), (out, out))) for box in boxes])

    alternatives = {"pixel_jax": ours, "Pillow": pillow}
    if HAS_TORCH:
        import torch

        def interpolate():
            picture = torch.from_numpy(image).permute(2, 0, 1)[None]
            resize = functools.partial(torch.nn.functional.interpolate, size=(out, out), mode="bicubic", antialias=True)
            cut = [picture[:, :, y1:y2, x1:x2] for x1, y1, x2, y2 in boxes.tolist()]
            return lambda: torch.cat([resize(x) for x in cut]).permute(0, 2, 3, 1).numpy()

        alternatives["torch interpolate, uint8"] = interpolate

    def check(outputs) -> None:
        (same if exact else within(1))({name: outputs[name] for name in ("pixel_jax", "Pillow")})
        within(2)(outputs)  # torch rounds its weights to 16 bits

    return Workload(
        f"{count} boxes of an image of {side} x {side} pixels to {out} x {out}, "
        + ("bit for bit" if exact else "within one level")
        + (", on one core" if cores else ""),
        alternatives,
        check,
        bytes=3 * (count * out**2 + int(np.prod(high - low, axis=1).sum())),
        aims=(Aim("Pillow", aim),),
        cores=cores,
    )


def build_gather(quick: bool) -> Workload:
    """The selection of frames of a video."""
    video = images(4 if quick else 64, 28 if quick else 364, 28 if quick else 644)
    index = np.arange(8, dtype=np.int32) % len(video)

    def ours():
        gather = jax.jit(gather_frames)
        on_device = jnp.asarray(video)
        return lambda: gather(on_device, index)

    alternatives = {"pixel_jax": ours, "NumPy": lambda: lambda: video[index]}
    if HAS_TORCH:
        import torch

        alternatives["torch"] = lambda: lambda: torch.from_numpy(video)[torch.from_numpy(index).long()]
    count = 2 * 8 * video[0].nbytes
    return Workload(f"8 of {len(video)} frames of {video.shape[2]} x {video.shape[1]}", alternatives, same, bytes=count)


def build_patchify(quick: bool) -> Workload:
    """The patches of images."""
    count, side = (2, 56) if quick else (8, 336)
    pictures = images(count, side, side)
    patches = (side // 14) ** 2

    def ours():
        def one(image):
            frame = patchify(image, jnp.array([side, side]), max_patches=patches)
            return pixel_values(frame, frame)

        run = jax.jit(jax.vmap(one))
        on_device = jnp.asarray(pictures)
        return lambda: run(on_device).reshape(count * patches, -1)

    alternatives = {"pixel_jax": ours}
    if HAS_TORCH:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        processor = Qwen2VLImageProcessorPil(do_resize=False)
        alternatives["transformers (PIL processor)"] = lambda: (
            lambda: processor(list(pictures), return_tensors="np")["pixel_values"]
        )
    return Workload(f"{count} images of {side} x {side} pixels", alternatives, close(1e-6), bytes=9 * pictures.nbytes)


CASES = (
    Case("crop-resize", functools.partial(build_crop, True, 1.2, None)),
    Case("crop-resize-one-core", functools.partial(build_crop, True, 0.7, 1)),
    Case("crop-within-one", functools.partial(build_crop, False, 2.0, None)),
    Case("crop-within-one-one-core", functools.partial(build_crop, False, 1.2, 1)),
    Case("gather-frames", build_gather),
    Case("patchify", build_patchify),
)
