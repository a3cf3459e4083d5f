"""Checkpoints of all that a run needs to resume as if it had never stopped: Orbax arrays, and a file for each process.

A checkpoint appears under its name only when it is complete (Orbax writes elsewhere and renames), so that a process may be killed
at any moment. Files are written while the run goes on; then their sizes and checksums are written. A checkpoint whose files
differ from these is quarantined, and the one before it is read. Arrays are stored under the paths of their weights, and can be
restored onto any mesh by any number of processes. Frozen weights are not stored, but a fingerprint identifies them.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from pixel_jax.files import read_bytes, write_file
from pixel_jax.parallel.processes import all_gather, barrier, is_main_process
from pixel_jax.parallel.sharding import is_variable, shardings, value_of
from pixel_jax.state_files import read_note, write_json
from pixel_jax.terminal import warn

T = TypeVar("T")
ARRAY = "__array__"  # in the JSON document: stands for the array of this name
EMPTY = "__empty__"  # an array without elements: [dtype, shape]


class WriteError(OSError):
    """A checkpoint cannot be written, because the disk is full or for another reason."""


class CheckpointError(ValueError):
    """A checkpoint that differs from the state it is restored into. The message names the arrays."""


def named_arrays(tree: Any) -> dict[str, Any]:
    """Returns {path: array (or abstract array)} of every leaf of `tree`; a weight has the path of its variable."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_variable)[0]
    named = ((jax.tree_util.keystr(path, simple=True, separator="."), value_of(leaf)) for path, leaf in leaves)
    return {name: value for name, value in named if value is not None}


def fingerprint(tree: Any) -> dict[str, str]:
    """Returns {path: two checksums of the array's bits}, which are the same on every mesh.

    A process that has no part of the arrays has no checksums.
    """
    if any(isinstance(x, jax.Array) and not x.addressable_shards for x in jax.tree.leaves(tree)):
        return {}
    sums = {name: _sums(x) for name, x in named_arrays(tree).items()}
    return {name: "".join(f"{int(x):08x}" for x in both) for name, both in jax.device_get(sums).items()}


@jax.jit
def _sums(x: jax.Array) -> jax.Array:
    """Sum and position-weighted sum of the words of `x`, modulo 2^32: of integers, so that the order does not matter."""
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")).astype(jnp.uint32)
    position, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):  # not flattened, so that sharded axes keep their sharding
        position += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.stack([jnp.sum(words), jnp.sum(words * (2 * position + 1))])


def separate(value: Any, arrays: dict[str, np.ndarray], path: str) -> Any:
    """Moves the arrays of `value` (nested dicts and lists of JSON values and NumPy arrays) to `arrays`; returns the rest."""
    if isinstance(value, np.ndarray):
        if value.size == 0:
            return {EMPTY: [value.dtype.str, list(value.shape)]}
        arrays[path] = value
        return {ARRAY: path}
    if isinstance(value, Mapping):
        return {key: separate(x, arrays, f"{path}.{key}") for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [separate(x, arrays, f"{path}.{i}") for i, x in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path} holds {value!r}: only JSON values and NumPy arrays can be kept in a checkpoint")


def rejoin(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """The inverse of `separate` (tuples come back as lists)."""
    if isinstance(value, dict):
        if ARRAY in value:
            return np.asarray(arrays[value[ARRAY]])
        if EMPTY in value:
            return np.zeros(value[EMPTY][1], np.dtype(value[EMPTY][0]))
        return {key: rejoin(x, arrays) for key, x in value.items()}
    if isinstance(value, list):
        return [rejoin(x, arrays) for x in value]
    return value


def to_bytes(state: Mapping[str, Any]) -> bytes:
    """Serialises nested JSON values and arrays, as safetensors."""
    arrays: dict[str, np.ndarray] = {}
    document = json.dumps(separate(state, arrays, "")).encode()
    arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    return safetensors.numpy.save(arrays | {"document": np.frombuffer(document, np.uint8)})


def from_bytes(parcel: bytes) -> Any:
    """The inverse of `to_bytes`."""
    arrays = safetensors.numpy.load(parcel)
    return rejoin(json.loads(arrays["document"].tobytes()), arrays)


class HostHandler(ocp.CheckpointHandler):
    """Saves each process's JSON document and arrays, as `PROCESS.json` and `PROCESS.safetensors`."""

    def save(self, directory, args: "HostSave") -> None:
        """Writes the files of this process."""
        name = pathlib.Path(directory) / str(jax.process_index())
        if args.arrays:
            safetensors.numpy.save_file(args.arrays, f"{name}.safetensors")
        write_file(f"{name}.json", json.dumps(args.document))

    def restore(self, directory, args: "HostRestore") -> list[dict[str, Any]]:
        """Reads the documents of all processes that saved, in order, with their arrays."""
        # Not `read_json`: the state of a generator is an integer of 128 bits.
        paths = pathlib.Path(directory).glob("*.json")
        documents = {int(path.stem): json.loads(read_bytes(path)) for path in paths}
        if 0 not in documents or set(documents) != set(range(documents[0]["processes"])):
            raise FileNotFoundError(f"{directory} has the files of processes {sorted(documents)} only")
        for process, document in documents.items():
            path = pathlib.Path(directory) / f"{process}.safetensors"
            arrays = safetensors.numpy.load_file(path) if document["arrays"] else {}
            for name in ("host", "local"):
                document[name] = rejoin(document[name], arrays)
        return [documents[process] for process in sorted(documents)]


@ocp.args.register_with_handler(HostHandler, for_save=True)
@dataclasses.dataclass
class HostSave(ocp.args.CheckpointArgs):
    """The data that a process saves: a JSON document, and the arrays that it names."""

    document: dict[str, Any]
    arrays: dict[str, np.ndarray]


@ocp.args.register_with_handler(HostHandler, for_restore=True)
@dataclasses.dataclass
class HostRestore(ocp.args.CheckpointArgs):
    """The arguments of a restore, of which there are none: the documents of all processes are read."""


class Restored(NamedTuple):
    """The content of a checkpoint."""

    step: int
    state: Any
    host: dict[str, Any]
    local: list[dict[str, Any]]  # of every process that saved


class Checkpoints:
    """The checkpoints of a run in `directory`, of which the last `keep` are kept (None: all).

    All processes must call its methods together.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int | None = 2):
        self.directory = pathlib.Path(directory).absolute()
        self.checksums = self.directory.with_name(self.directory.name + ".checksums")
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
        handlers = {"state": ocp.StandardCheckpointHandler(), "host": HostHandler()}
        self.manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        # Each process reads on its own: the manager would wait for all processes after a read, forever if one finds damage.
        here = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
        self.reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers), multiprocessing_options=alone)
        self.unnoted: int | None = None  # the step that was saved last, until the checksums of its files are written

    @property
    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, oldest first."""
        return sorted(self.manager.all_steps())

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self.manager.latest_step()

    def save(
        self,
        step: int,
        state: Any,
        host: Mapping[str, Any] | None = None,
        local: Mapping[str, Any] | None = None,
        base: Mapping[str, str] | None = None,
    ) -> None:
        """Begins to save a checkpoint; returns when the arrays may be overwritten. They are on the disk after `finish`.

        Args:
            step: the number of steps done.
            state: any pytree of arrays.
            host: nested dicts of JSON values and NumPy arrays (iterators, buffers), the same in all processes.
            local: like `host`, but different in each process.
            base: the `fingerprint` of the weights that are not saved.

        Raises:
            WriteError: the checkpoint cannot be written.
        """
        arrays: dict[str, np.ndarray] = {}
        named = named_arrays(state)
        document = {
            "leaves": {name: [str(x.dtype), list(x.shape)] for name, x in named.items()},
            "base": dict(base or {}),
            "host": separate(host or {}, arrays, "host"),
            "local": separate(local or {}, arrays, "local"),
            "processes": jax.process_count(),
        }
        document["arrays"] = sorted(arrays)
        if any(_is_elsewhere(x) for x in named.values()):
            named = {name: _of_main(x) for name, x in named.items()}
        elif jax.default_backend() == "cpu":
            # On CPUs a snapshot may share memory with the arrays, which the next step donates.
            named = {name: jnp.copy(x) for name, x in named.items()}
        self.finish()
        if is_main_process():  # removes the checksums of an earlier checkpoint of this step
            for stale in self.checksums.glob(f"{step}.*.json"):
                stale.unlink()
        items = {"state": ocp.args.StandardSave(named), "host": HostSave(document, arrays)}
        with self._explained(step):
            self.manager.save(step, args=ocp.args.Composite(**items), force=True)
        self.unnoted = step

    def poll(self) -> None:
        """Writes the checksums of the last checkpoint if its files are complete. It is cheap, and meant to be called often."""
        if self.unnoted is not None and not self.manager.is_saving_in_progress():
            self.finish()

    def finish(self) -> None:
        """Waits until the last checkpoint is written, and writes the checksums of its files."""
        if self.unnoted is None:
            return
        step, self.unnoted = self.unnoted, None
        with self._explained(step):
            self.manager.wait_until_finished()
            self.checksums.mkdir(exist_ok=True)
            files = {name: checksum(path) for name, path in self._files(step)}
            path = self.checksums / f"{step}.{jax.process_index()}.json"
            write_json(path, {"processes": jax.process_count(), "files": files})
        if is_main_process():
            existing = {str(step) for step in self.manager.all_steps()}
            for old in self.checksums.glob("*.json"):
                if old.name.split(".")[0] not in existing:
                    old.unlink()

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Turns Orbax's errors, such as a full disk, into a `WriteError` that names the newest whole checkpoint."""
        try:
            yield
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            others = [other for other in self.manager.all_steps(read=True) if other != step]
            raise WriteError(
                f"checkpoint {step} cannot be written to {self.directory} ({reason}). The newest whole one is "
                f"{max(others) if others else 'none'}; started again, the run goes on from there"
            ) from error

    def _files(self, step: int) -> list[tuple[str, pathlib.Path]]:
        """(name, path) of the files of a checkpoint whose checksums this process computes."""
        root = self.directory / str(step)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        return [(str(path.relative_to(root)), path) for path in files[jax.process_index() :: jax.process_count()]]

    def _noted(self, step: int) -> list[dict[str, Any]]:
        """Reads the checksums of a checkpoint: those of all processes that saved it, or of fewer if they were killed."""
        return [note for path in self.checksums.glob(f"{step}.*.json") if (note := read_note(path, _is_checksum))]

    def damage(self, step: int) -> str | None:
        """Describes what is wrong with the files of a checkpoint; None if nothing is, or if there are no checksums."""
        checksums = {name: sums for note in self._noted(step) for name, sums in note["files"].items()}
        for name in sorted(checksums)[jax.process_index() :: jax.process_count()]:
            path = self.directory / str(step) / name
            if not path.is_file():
                return f"{name} is missing"
            if checksum(path) != checksums[name]:
                return f"{name} is not what was written"
        return None

    def _is_whole(self, step: int, reason: str | None) -> bool:
        """Whether no process gives a `reason` against a checkpoint; otherwise it is quarantined. All processes call it."""
        barrier(f"checkpoint {step} is checked")  # checking takes some processes longer than others
        whole = all_gather(reason is None)
        if not whole.all():
            self.quarantine(step, reason or f"says process {int(np.argmin(whole))}")
        return bool(whole.all())

    def quarantine(self, step: int, reason: str) -> None:
        """Moves a damaged checkpoint to a directory beside the others, where it can be examined."""
        aside = self.directory.with_name(self.directory.name + ".damaged")
        if is_main_process():
            aside.mkdir(exist_ok=True)
            target = aside / f"{step}-{len(list(aside.iterdir()))}"
            os.replace(self.directory / str(step), target)
            warn(f"Checkpoint {step} is damaged ({reason}). It is set aside: {target}.")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("quarantine")
        self.manager.reload()

    def restore(
        self, like: Any, *, mesh: Mesh | None = None, step: int | None = None, base: Mapping[str, str] | None = None
    ) -> Restored:
        """Restores the newest checkpoint that is whole, or that of `step`.

        Args:
            like: the structure, shapes and types of the state, as arrays or abstract arrays.
            mesh: weights are sharded over it by their logical axes; None: one device.
            step: of the checkpoint; None: the newest.
            base: the `fingerprint` of the weights that the checkpoint does not hold.

        Raises:
            FileNotFoundError: there is no whole checkpoint.
            CheckpointError: the checkpoint holds other arrays.
        """
        self.finish()
        if step is not None:
            return self._read(step, like, mesh, base)
        while (step := self.latest) is not None:
            restored = None  # frees the memory of a damaged checkpoint
            if not self._is_whole(step, self.damage(step)):
                continue
            reason = None
            try:
                restored = self._read(step, like, mesh, base)
            except CheckpointError:
                raise
            except Exception as error:
                noted = self._noted(step)
                if noted and len(noted) == noted[0]["processes"]:
                    raise  # all checksums are right, so that the error is not damage
                # The run was killed before all checksums were written, and only reading shows the damage.
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
            if self._is_whole(step, reason) and restored is not None:
                return restored
        raise FileNotFoundError(f"there is no checkpoint in {self.directory}")

    def restore_part(self, step: int, like: T, base: Mapping[str, str]) -> T:
        """Restores the arrays of a checkpoint that `like` names on one device. The others are not read.

        Raises:
            CheckpointError: the arrays differ from `like`, the frozen ones from `base`, or the files are damaged.
        """
        if (reason := self.damage(step)) is not None:
            raise CheckpointError(f"{self.directory}: checkpoint {step} is damaged ({reason})")
        try:
            return self._read_part(step, like, base)
        except CheckpointError:
            raise
        except Exception as error:  # of any kind: files without checksums may have been cut short
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise CheckpointError(f"{self.directory}: checkpoint {step} cannot be read ({reason})") from error

    def _read_part(self, step: int, like: T, base: Mapping[str, str]) -> T:
        path = self.directory / str(step)
        document = self.reader.restore(path, args=ocp.args.Composite(host=HostRestore())).host[0]
        wanted = {name: [str(x.dtype), list(x.shape)] for name, x in named_arrays(like).items()}
        self._compare(wanted, {name: x for name, x in document["leaves"].items() if name in wanted})
        self._compare(base, document["base"], "frozen ")
        sharding = SingleDeviceSharding(jax.local_devices()[0])
        item = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), named_arrays(like))
        restored = ocp.args.PyTreeRestore(
            item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            arrays = reader.restore(path / "state", args=restored)
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])

    def _read(self, step: int, like: Any, mesh: Mesh | None, base: Mapping[str, str] | None) -> Restored:
        path = self.directory / str(step)
        documents = self.reader.restore(path, args=ocp.args.Composite(host=HostRestore())).host
        wanted = {name: [str(x.dtype), list(x.shape)] for name, x in named_arrays(like).items()}
        self._compare(wanted, documents[0]["leaves"])
        host, local = documents[0]["host"], [document["local"] for document in documents]
        if mesh is not None and not mesh.local_devices:  # this process has no part of the arrays
            return Restored(step, like, host, local)
        self._compare(dict(base or {}), documents[0]["base"], "frozen ")
        if mesh is None:
            sharding = jax.tree.map(lambda _: SingleDeviceSharding(jax.local_devices()[0]), like)
        else:
            sharding = shardings(like, mesh)
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, sharding)
        restored = ocp.args.StandardRestore(named_arrays(abstract))
        arrays = self.reader.restore(path, args=ocp.args.Composite(state=restored)).state
        # Names and leaves are in the same order: a weight is one name and one leaf.
        state = jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])
        return Restored(step, state, host, local)

    def _compare(self, wanted: Mapping[str, Any], have: Mapping[str, Any], kind: str = "") -> None:
        missing, unused = sorted(wanted.keys() - have.keys()), sorted(have.keys() - wanted.keys())
        if missing or unused:
            raise CheckpointError(
                f"{self.directory}: missing from the checkpoint's {kind}arrays {missing[:4] or 'nothing'} "
                f"({len(missing)}), in it without a use {unused[:4] or 'nothing'} ({len(unused)})"
            )
        for name, expected in wanted.items():
            if have[name] != expected:
                raise CheckpointError(
                    f"{self.directory}: {kind}{name} is {have[name]} in the checkpoint, not {expected}"
                )

    def close(self) -> None:
        """Finishes the last checkpoint, and closes the directory."""
        self.finish()
        self.manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error) -> None:
        if error[0] is None:
            self.close()
        elif jax.process_count() == 1 or issubclass(error[0], SystemExit):
            # Closing waits for the write in progress, and forever if other processes have ended.
            self.manager.close()


def _is_elsewhere(x: Any) -> bool:
    """Whether some process has no part of an array."""
    return isinstance(x, jax.Array) and len({d.process_index for d in x.sharding.device_set}) < jax.process_count()


def _of_main(x: jax.Array) -> np.ndarray:
    """Returns the whole array on the host of the main process, and on others zeros in its place.

    Orbax saves neither an array of which a process has no part nor one that a single process of several has.
    """
    if isinstance(x.sharding, NamedSharding):
        x = jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec()))
    if is_main_process():
        return np.array(x.addressable_shards[0].data)
    return np.broadcast_to(np.zeros((), x.dtype), x.shape)


def _is_checksum(value: Any) -> bool:
    match value:
        case {"processes": int(), "files": dict(files)}:
            return all(isinstance(x, list) for x in files.values())
    return False


def checksum(path: pathlib.Path) -> list[int]:
    """[size in bytes, CRC-32] of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while piece := file.read(2**22):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return [size, crc]
