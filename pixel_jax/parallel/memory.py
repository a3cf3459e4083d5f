"""How much memory a device has: what the sizes that nobody has set are worked out by."""

import os
import pathlib

import jax

SHARE = 0.9  # of an accelerator: the rest is fragments, and the runtime's
HOST_SHARE = 0.5  # of a host's: Python, the data that is read ahead, and other programs need some
PICTURES_DIVISOR = 4  # one part in so many of it is for the pictures of a batch of prompts
CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def device_memory() -> int:
    """Bytes that a program may take on one device of this process: of what it reports, or of this host's memory, which all
    CPU devices of the process share. The same at every call, whatever is in use.
    """
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return int(SHARE * limit)
    return int(HOST_SHARE * host_memory()) // jax.local_device_count()


def host_memory() -> int:
    """Bytes of memory that this process may take: the machine's, or those that a container is held to."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in map(pathlib.Path, CGROUPS):
        try:
            total = min(total, int(path.read_text()))
        except (OSError, ValueError):  # there is none, or it says "max"
            continue
    return total
