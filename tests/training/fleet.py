"""Several processes of one computation, as `launch/processes.sh` starts them, for tests to watch and to kill."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(count: int, script: pathlib.Path, *arguments, devices: int = 1) -> list[subprocess.Popen]:
    """`count` processes of `python SCRIPT ARGUMENTS...`, each with `devices` CPU devices."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_NUM")}
    environment |= {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests/rollouts", ROOT / "tests/training"))),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    if count > 1:
        where = f"127.0.0.1:{free_port()}"
        environment |= {
            "JAX_COORDINATOR_ADDRESS": where,
            "JAX_COORDINATOR_BIND_ADDRESS": where,
            "JAX_NUM_PROCESSES": str(count),
        }
    command = [sys.executable, str(script), *map(str, arguments)]
    return [
        subprocess.Popen(
            command,
            env=environment | ({"JAX_PROCESS_ID": str(i)} if count > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]


def wait(processes: list[subprocess.Popen], seconds: float = 300) -> list[tuple[int, str]]:
    """(exit code, output) of each; those still running after `seconds` are killed, and their code is -9."""
    end, found = time.monotonic() + seconds, []
    for process in processes:
        try:
            said, _ = process.communicate(timeout=max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
        found.append((process.returncode, said))
    return found


def expect(processes: list[subprocess.Popen]) -> None:
    """Waits until all have ended, well. Four processes on a busy core take minutes to compile."""
    found = wait(processes, 1200)
    assert [code for code, _ in found] == [0] * len(processes), "\n".join(said[-3000:] for _, said in found)


def weights(directory: pathlib.Path) -> list[np.ndarray]:
    """What a worker wrote down at its end."""
    with np.load(directory / "weights.npz") as arrays:
        return [arrays[name] for name in arrays.files]
