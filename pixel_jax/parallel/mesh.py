"""One mesh for everything: rows over `data` and `fsdp`, positions over `sequence`, weights over all but `data`."""

import math
import os
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "sequence", "tensor")


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:  # pyright: ignore[reportInvalidTypeForm], an alias without a stub
    """Makes a mesh with the four axes of `AXES`, in that order.

    `data` replicates the weights and comes first (the slowest links), `tensor` comes last (neighbouring chips). All axes
    are `Auto`: the compiler shards the activations, guided by a few constraints. (JAX's own default is `Explicit`.)

    Args:
      shape: axis -> size; an axis left out has size 1, and one axis may be -1, which takes all remaining devices. None: all
        devices are on `fsdp`.
      devices: None: all of them.

    Raises:
      ValueError: an unknown axis, sizes that do not fit the devices, or TPUs of several slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = {"fsdp": -1} if shape is None else dict(shape)
    unknown = set(shape) - set(AXES)
    if unknown:
        raise ValueError(f"unknown mesh axis {sorted(unknown)[0]!r}; the axes are {', '.join(AXES)}")
    sizes = [shape.get(axis, 1) for axis in AXES]
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"mesh axes are positive, one of them may be -1: {shape}")
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        if len(devices) % known:
            raise ValueError(f"mesh {shape} does not divide {len(devices)} devices")
        sizes[sizes.index(-1)] = len(devices) // known
    wanted = math.prod(sizes)
    if wanted > len(devices):
        raise ValueError(f"mesh {shape} needs {wanted} devices, there are {len(devices)}")
    devices = devices[:wanted]
    # JAX also counts the nodes of GPUs as slices. GPUs are listed node by node, so that the last axes are inside a node.
    slices = {getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}
    if len(slices) > 1:
        raise ValueError(f"the devices lie on {len(slices)} slices; a mesh here is one slice")
    # As `jax.make_mesh`, which refuses an axis of 4 on a torus of 16 x 16 (except on v5e).
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def use_cores(count: int) -> None:
    """Makes the CPU look like `count` devices. Call it before JAX starts; an accelerator's devices stay as they are.

    One operation of a small network does not keep two cores busy, and a loop never does; halves of a batch, or of the heads, on
    two devices do.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}"  # the last one counts
