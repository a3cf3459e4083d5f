"""The memory of a device, from which sizes follow that a config leaves open."""

import os
import pathlib

import jax

DEVICE_SHARE = 0.9  # of an accelerator's memory; fragmentation and the runtime take the rest
HOST_SHARE = 0.5  # of a host's memory; Python, data that is read ahead, and other programs take the rest
PICTURES_DIVISOR = 4  # the pictures of a batch of prompts may take the memory divided by this
CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def device_memory() -> int:
    """Returns the bytes that a program may take on one device of this process.

    They are a share of what the device reports, or of this host's memory, which all CPU devices of the process divide among
    them. The result is the same at every call, whatever is in use.
    """
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return int(DEVICE_SHARE * limit)
    return int(HOST_SHARE * host_memory()) // jax.local_device_count()


def host_memory() -> int:
    """Returns the bytes of memory that this process may take: the machine's, or the limit of its container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in map(pathlib.Path, CGROUPS):
        try:
            total = min(total, int(path.read_text()))
        except (OSError, ValueError):  # there is none, or it says "max"
            continue
    return total
