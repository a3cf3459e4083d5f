"""GPUs that are not present: the descriptions from which XLA compiles for them, and nodes of them as JAX devices."""

import functools
import os
from typing import NamedTuple

MEMORY_FRACTION = 0.92  # of a GPU's memory: what launch/gpu_check.sh sets XLA_PYTHON_CLIENT_MEM_FRACTION to
VERSIONS = {"dnn_version_info": (9, 10, 0), "runtime_version": (12, 8, 0)}  # of cuDNN and CUDA


class GPU(NamedTuple):
    """A GPU as XLA's `GpuTargetConfigProto` describes it, and the published rates of its links."""

    kind: str  # the driver's name of it, JAX's `device_kind`
    capability: int  # major version; the minor one is 0
    cores: int  # streaming multiprocessors
    fpus: int  # float32 units of a core
    clock: float  # GHz
    memory: int  # bytes
    bandwidth: float  # of the memory, bytes a second
    cache: int  # of the second level, bytes
    shared: int  # shared memory of a core, bytes
    block: int  # the most shared memory of one block of threads, bytes
    nvlink: float  # to the GPUs of its node, one direction, bytes a second
    network: float  # to other nodes, one direction, bytes a second of one GPU
    source: str


# Numbers of the chips are those of XLA's specs (openxla/xla, xla/backends/gpu/target_config/specs); NVLink and network are those
# of NVIDIA's DGX systems, whose data sheets give NVLink in both directions: twice these numbers.
GPUS = {
    "a100": GPU(
        "NVIDIA A100-SXM4-80GB", 8, 108, 64, 1.41, 85_100_068_864, 2.03904e12, 41_943_040, 167_936, 166_912,
        300e9, 25e9, "DGX A100 data sheet: NVLink 600 GB/s, 8 x 200 Gb/s InfiniBand",
    ),
    "h100": GPU(
        "NVIDIA H100 80GB HBM3", 9, 132, 128, 1.98, 84_942_979_072, 3.35232e12, 52_428_800, 233_472, 232_448,
        450e9, 50e9, "DGX H100 data sheet: NVLink 900 GB/s, 8 x 400 Gb/s InfiniBand",
    ),
    "h200": GPU(
        "NVIDIA H200", 9, 132, 128, 1.98, 151_397_597_184, 4.8e12, 52_428_800, 233_472, 232_448,
        450e9, 50e9, "DGX H200 data sheet: NVLink 900 GB/s, 8 x 400 Gb/s InfiniBand",
    ),
    "b200": GPU(
        "NVIDIA B200", 10, 148, 128, 1.965, 191_514_411_008, 7.67232e12, 132_644_864, 233_472, 232_448,
        900e9, 50e9, "DGX B200 data sheet: NVLink 1.8 TB/s, 8 x 400 Gb/s InfiniBand",
    ),
}  # fmt: skip


def target_config(gpu: GPU) -> str:
    """Returns the text of the `GpuTargetConfigProto` from which XLA compiles for a GPU that is not present."""
    numbers = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49_152,
        "shared_memory_per_core": gpu.shared,
        "threads_per_core_limit": 2048,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.fpus,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
        "memory_bandwidth": int(gpu.bandwidth),
        "l2_cache_size": gpu.cache,
        "clock_rate_ghz": gpu.clock,
        "device_memory_size": gpu.memory,
        "shared_memory_per_block_optin": gpu.block,
        "registers_per_core_limit": 65_536,
        "registers_per_block_limit": 65_536,
    }
    device = " ".join(f"{name}: {number}" for name, number in numbers.items())
    versions = " ".join(
        f"{name} {{ major: {major} minor: {minor} patch: {patch} }}" for name, (major, minor, patch) in VERSIONS.items()
    )
    return (
        f"gpu_device_info {{ {device} cuda_compute_capability {{ major: {gpu.capability} }} }} "
        f'platform_name: "CUDA" {versions} device_description_str: "{gpu.kind}"'
    )


def devices_of(gpu: GPU, nodes: int, each: int) -> list:
    """Makes the devices of `nodes` nodes of `each` GPUs that are not present, node by node.

    Raises:
        ValueError: the CUDA plugin of JAX is missing or too old.
    """
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # otherwise the plugin needs a driver
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(
            topology_name="", platform="cuda", target_config=target_config(gpu), topology=f"1x{nodes}x{each}"
        ).devices
    except Exception as error:  # of several types, depending on what is missing
        raise ValueError(
            f"nothing can be compiled for {gpu.kind} here: `pip install 'pixel_jax[plan-gpu]'` installs the compiler "
            f"({first_line(error)})"
        ) from error
    _name_platform()
    return devices


def first_line(error: Exception) -> str:
    """The first line of what a compiler says, whose further lines are its stack."""
    return str(error).strip().partition("\n")[0]


@functools.cache
def _name_platform() -> None:
    """Lets JAX lower for CUDA in a process without a GPU: otherwise its name is known only once a backend has started."""
    from jax._src import xla_bridge

    canonical = xla_bridge.canonicalize_platform
    xla_bridge.canonicalize_platform = lambda name: "cuda" if name in ("cuda", "gpu") else canonical(name)
