"""Machines by name, and the published peak rates of their chips."""

import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax

from pixel_jax.models.flops import PEAK_FLOPS
from pixel_jax.planning.gpus import GPUS, MEMORY_FRACTION, devices_of, first_line


class Chip(NamedTuple):
    """Published peaks of one chip."""

    memory: float  # bytes that XLA allows the programs of a chip
    bandwidth: float  # of its memory, bytes a second
    links: float  # to its neighbours, all ports together, one direction, bytes a second
    dims: int  # the number of dimensions of a slice's torus; of GPUs 2: nodes, and GPUs of a node
    source: str
    flops: float | None = None  # bfloat16 FLOP a second; None: that of `models.flops.PEAK_FLOPS`
    # To chips of other nodes, one direction, bytes a second; None: all chips are connected by links.
    network: float | None = None


GIB = 2**30
DOCS = "docs.cloud.google.com/tpu/docs/"
# Newer pages give the rate of links in both directions, twice these numbers. Memory is less than on the pages: it is what libtpu
# 0.0.52 allows a program ("exceeds available HBM (15.75G)"), of one device, of which a TPU7x has two.
CHIPS = {
    "v4": Chip(30.75 * GIB, 1228e9, 2400e9 / 8, 3, DOCS + "v4"),
    "v5e": Chip(15.75 * GIB, 819e9, 1600e9 / 8, 2, DOCS + "v5e"),
    "v5p": Chip(95.73 * GIB, 2765e9, 4800e9 / 8, 3, DOCS + "v5p"),
    "v6e": Chip(31.24 * GIB, 1600e9, 3200e9 / 8, 2, DOCS + "v6e"),
    "tpu7x": Chip(2 * 94.74 * GIB, 7380e9, 4800e9 / 8, 3, DOCS + "tpu7x"),
    "cpu": Chip(4 * GIB, 20e9, 5e9, 1, "invented, to try the planner on virtual devices", 50e9),
    **{
        name: Chip(MEMORY_FRACTION * gpu.memory, gpu.bandwidth, gpu.nvlink, 2, gpu.source, network=gpu.network)
        for name, gpu in GPUS.items()
    },
}
SLICES = {2: {8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}}
SLICES[3] = {8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
SLICES[3][1024] = "8x8x16"
NODE = 8  # GPUs of a node
NODES = 1024  # the most of them, so that a mistyped number is a message and not a long wait


class Machine(NamedTuple):
    """A slice of TPU chips, or nodes of GPUs. A chip may be several JAX devices."""

    name: str  # as in v5p:4x4x4, or h100:2x8 (nodes x GPUs)
    chip: Chip
    chips: int
    devices: list
    flops: float  # a second, of one chip
    # Chips of a node; nodes are connected by the network. None: all chips are connected by links.
    node: int | None = None

    @property
    def per_chip(self) -> float:
        """The number of devices of a chip."""
        return len(self.devices) / self.chips

    def nodes(self, devices: Sequence[jax.Device]) -> list[int] | None:  # pyright: ignore[reportInvalidTypeForm], an alias without a stub
        """The node of each device; None if all chips are connected by links."""
        return None if self.node is None else [self.devices.index(device) // self.node for device in devices]


def machine(name: str) -> Machine:
    """Finds a machine by its name.

    It is `KIND:AxB[xC]`, a TPU slice that libtpu compiles for; `KIND:[NODESx]GPUS`, for which JAX's CUDA plugin compiles; or
    `cpu:N`, virtual devices of this host.

    Raises:
        ValueError: there is no such machine, or a package that describes it is missing.
    """
    parsed = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not parsed or parsed[1] not in CHIPS:
        raise ValueError(
            f"topology {name!r} is neither of the form KIND:AxB, as v5e:4x4, nor, of GPUs, KIND:NODESxGPUS, as h100:2x8; "
            f"KIND is one of {', '.join(CHIPS)}"
        )
    kind, chip, chips = parsed[1], CHIPS[parsed[1]], math.prod(map(int, parsed[2].split("x")))
    if kind == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < chips:
            raise ValueError(f"{name} needs {chips} devices, there are {len(devices)}: set XLA_FLAGS")
        assert chip.flops is not None  # it is invented
        return Machine(name, chip, chips, devices[:chips], chip.flops)
    if kind in GPUS:
        *nodes, each = map(int, parsed[2].split("x"))
        if len(nodes) > 1 or not 0 < chips <= each * NODES or each > NODE:
            raise ValueError(
                f"{name} is not NODESxGPUS with 1 to {NODE} GPUs a node and at most {NODES} nodes, as {kind}:2x{NODE}"
            )
        devices = devices_of(GPUS[kind], chips // each, each)
        return Machine(name, chip, chips, devices, PEAK_FLOPS[GPUS[kind].kind], node=each)
    dims = parsed[2].count("x") + 1
    if dims != chip.dims:
        raise ValueError(f"{name} has {dims} dimensions, a {kind} slice has {chip.dims}")
    devices = _tpu_devices(name)
    flops = PEAK_FLOPS[devices[0].device_kind]
    return Machine(name, chip, chips, devices, flops * (len(devices) / chips))


def _tpu_devices(name: str) -> list:
    """Makes the devices of a TPU slice that is not present. Only one process at a time can use libtpu."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # otherwise libtpu looks for a metadata server
    from jax.experimental import topologies

    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}  # its two cores as one device
    try:
        return topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices
    except Exception as error:  # of several types, depending on what is missing
        raise ValueError(
            f"nothing can be compiled for {name} here: `pip install libtpu` installs the compiler ({first_line(error)})"
        ) from error


def slices(kind: str) -> dict[int, str]:
    """Returns {number of chips: name} of slices of a kind, or nodes of GPUs, from 8 chips to 1024 or the largest slice.

    Raises:
        ValueError: there are no slices of this kind.
    """
    if kind not in CHIPS or kind == "cpu":
        raise ValueError(f"there are no slices of {kind!r}; there are of {', '.join(x for x in CHIPS if x != 'cpu')}")
    if kind in GPUS:
        return {NODE << i: f"{kind}:{1 << i}x{NODE}" for i in range(8)}
    return {chips: f"{kind}:{shape}" for chips, shape in SLICES[CHIPS[kind].dims].items()}
