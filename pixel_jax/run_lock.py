"""A lock that lets one run at a time use a directory. It names its holder, and is taken over when the holder has ended."""

import contextlib
import json
import os
import pathlib
import socket
import threading
import time
import uuid
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from pixel_jax.files import FileError, parse_json, write_file
from pixel_jax.signals import SIGNALS
from pixel_jax.terminal import warn

LOCK = "lock.json"
BEAT = 10.0  # seconds between two heartbeats; a heartbeat sets the file's time of modification
SILENCE = 60.0  # seconds without a heartbeat after which a holder on another machine counts as dead
LOOK = 1.0  # seconds between two readings of the lock of another machine
TAKEN = 1  # exit code of a process whose lock was taken over while it was stopped


class LockError(OSError):
    """A run directory that another run is using."""


class Holder(NamedTuple):
    """A process with all that identifies it: pids are reused, and every machine and container has its own."""

    host: str
    space: str  # boot and pid namespace: processes of the same one see each other
    pid: int
    started: str  # when, in the kernel's clock
    token: str  # of this very lock

    @classmethod
    def me(cls) -> "Holder":
        """This process, with a new token."""
        space = f"{_read('/proc/sys/kernel/random/boot_id')} {_link('/proc/self/ns/pid')}"
        return cls(socket.gethostname(), space, os.getpid(), _started(os.getpid()) or "", uuid.uuid4().hex)

    def alive(self) -> bool | None:
        """Whether the process runs; None if that cannot be seen from here."""
        me = Holder.me()
        if (self.host, self.space) != (me.host, me.space) or not me.started:
            return None
        return _started(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """The start time of a process, from /proc/PID/stat; None: there is no such process, or it is a zombie."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()  # the name before it may have spaces
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else None


class LockContent(NamedTuple):
    """The content of a lock file: its bytes and its last heartbeat."""

    content: bytes
    beat: int

    @classmethod
    def at(cls, path: pathlib.Path) -> "LockContent | None":
        """Reads a lock file; None: there is none."""
        try:
            with path.open("rb") as file:  # opening the file makes a network file system look again
                return cls(file.read(2**16), os.fstat(file.fileno()).st_mtime_ns)
        except FileNotFoundError:
            return None

    def holder(self) -> Holder | None:
        """The process that the lock names; None if that cannot be read."""
        try:
            value = parse_json(self.content, LOCK)
        except FileError:
            return None
        match value:
            case {"host": str(), "space": str(), "pid": int(), "started": str(), "token": str()}:
                return Holder(**{name: value[name] for name in Holder._fields})
        return None


@contextlib.contextmanager
def hold(directory: str | os.PathLike, first: bool = True) -> Iterator[None]:
    """Holds the lock of `directory` during a run. All processes of the run call it, and the `first` takes the lock.

    A lock is taken over at once if its process ran on this machine and has ended. Where that cannot be known, or the lock
    cannot be read, it is taken over after `SILENCE` seconds without a heartbeat.

    Raises:
        LockError: another run holds it.
    """
    if not first:
        yield
        return
    path = pathlib.Path(directory) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    me = Holder.me()
    content = json.dumps(me._asdict()).encode()
    while not _create(path, content):
        seen = LockContent.at(path)
        if seen is not None and _given_up(path, seen) and _take_over(path, seen, content):
            break
    done = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, content, done), daemon=True, name="heartbeat")
    heart.start()

    def release() -> None:
        done.set()
        heart.join()
        _remove(path, content)

    with SIGNALS.at_end(release):
        yield


def _create(path: pathlib.Path, content: bytes) -> bool:
    """Creates the lock; False if there is one already."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return False
    with open(descriptor, "wb") as file:
        file.write(content)
    return True


def _given_up(path: pathlib.Path, seen: LockContent) -> bool:
    """Whether the holder of the lock has ended; False also if the lock has changed and must be read again.

    Raises:
        LockError: the holder is alive.
    """
    holder = seen.holder()
    alive = None if holder is None else holder.alive()
    if alive:
        raise LockError(f"{path.parent} is in use by {holder}: wait until it has ended, or choose another directory")
    if alive is False:
        warn(f"{path.parent} was in use by {holder}, which has ended: its lock is taken over")
        return True
    who = str(holder or "a process that its lock does not name")
    warn(f"{path.parent} is in use by {who}; if that gives no sign for {SILENCE:.0f} s, its lock is taken over")
    began = time.monotonic()
    while time.monotonic() - began < SILENCE:
        time.sleep(LOOK)
        now = LockContent.at(path)
        if now is None or now.content != seen.content:
            return False
        if now.beat != seen.beat:
            raise LockError(f"{path.parent} is in use by {who}: wait until it has ended, or choose another directory")
    warn(f"{who} has given no sign for {SILENCE:.0f} s: its lock on {path.parent} is taken over")
    return True


def _take_over(path: pathlib.Path, seen: LockContent, content: bytes) -> bool:
    """Replaces an abandoned lock by this one; False if another process did, or is about to."""
    claim = path.with_name(f".{LOCK}.{zlib.crc32(seen.content):08x}")
    if not _create(claim, b""):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - claim.stat().st_mtime > SILENCE:  # the process that made the claim has died
                claim.unlink()
        time.sleep(LOOK / 10)
        return False
    try:
        # While the claim exists no other process replaces the lock: what is there now stays.
        now = LockContent.at(path)
        if now is None or now.content != seen.content:
            return False
        write_file(path, content)
        return True
    finally:
        claim.unlink(missing_ok=True)


def _remove(path: pathlib.Path, content: bytes) -> None:
    """Removes this lock. A lock that another process has put in its place is put back."""
    aside = path.with_name(f".{LOCK}.{uuid.uuid4().hex}")
    try:
        os.rename(path, aside)  # of several processes that try, one succeeds
    except FileNotFoundError:
        return
    current = LockContent.at(aside)
    if current is not None and current.content != content:
        _create(path, current.content)
    aside.unlink(missing_ok=True)


def _beat(path: pathlib.Path, content: bytes, done: threading.Event) -> None:
    """Writes heartbeats while the process holds the lock, and ends the process if it has lost it."""
    while not done.wait(BEAT):
        try:
            current = LockContent.at(path)
            if current is not None and current.content == content:
                os.utime(path)
                continue
            if current is None and _create(path, content):
                continue
        except OSError as error:  # a file server fails for a while; other runs still wait `SILENCE` seconds
            warn(f"{path}: no heartbeat could be written ({error})")
            continue
        warn(f"{path.parent} was taken over by another run while this process stood still: it ends")
        os._exit(TAKEN)
