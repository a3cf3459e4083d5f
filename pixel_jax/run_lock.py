"""One run at a time in a directory: a lock that says who has it, and that nobody has to take away by hand."""

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
BEAT = 10.0  # seconds between two heartbeats, which are the file's time of change
SILENCE = 60.0  # seconds without one, after which the holder counts as dead where it cannot be looked for
LOOK = 1.0  # seconds between two looks at the lock of another machine
TAKEN = 1  # exit code of a process whose lock was taken over while it was stopped


class LockError(OSError):
    """A run directory that another run is using."""


class Holder(NamedTuple):
    """A process, for ever: pids are given again, and every machine and container has its own."""

    host: str
    space: str  # boot and pid namespace: processes of the same one see each other
    pid: int
    started: str  # when, in the kernel's clock
    token: str  # of this very lock

    @classmethod
    def me(cls) -> "Holder":
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
    """When a process began, from /proc/PID/stat; None if there is none, or only what its parent has not yet waited for."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()  # the name before it may have spaces
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else None


class LockContent(NamedTuple):
    """A lock as it lies there: its bytes and its last heartbeat."""

    content: bytes
    beat: int

    @classmethod
    def at(cls, path: pathlib.Path) -> "LockContent | None":
        try:
            with path.open("rb") as file:  # opening it asks a file server anew
                return cls(file.read(2**16), os.fstat(file.fileno()).st_mtime_ns)
        except FileNotFoundError:
            return None

    def holder(self) -> Holder | None:
        """None if it cannot be read."""
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
    """Around a run in `directory`. Several processes of one run call it, and the `first` of them has the lock.

    The lock of a process of this machine that has ended is taken over at once. Where that cannot be seen, or the lock
    cannot be read, its heartbeat is waited for, and after `SILENCE` seconds without one it is taken over, too.

    Raises:
        LockError: another run has it.
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
    """Whether there was no lock, and now is this one."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return False
    with open(descriptor, "wb") as file:
        file.write(content)
    return True


def _given_up(path: pathlib.Path, seen: LockContent) -> bool:
    """Whether nobody has the lock any more; False as well if another look is needed.

    Raises:
        LockError: somebody has it.
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
    """Puts this lock in the place of one that was given up; False if somebody else was faster, or is about to be."""
    claim = path.with_name(f".{LOCK}.{zlib.crc32(seen.content):08x}")
    if not _create(claim, b""):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - claim.stat().st_mtime > SILENCE:  # whose process has died just there
                claim.unlink()
        time.sleep(LOOK / 10)
        return False
    try:
        # As long as there is the claim, nobody else puts anything in its place: what is there now stays.
        now = LockContent.at(path)
        if now is None or now.content != seen.content:
            return False
        write_file(path, content)
        return True
    finally:
        claim.unlink(missing_ok=True)


def _remove(path: pathlib.Path, content: bytes) -> None:
    """Takes away this lock; one that somebody else has put in its place is put back."""
    aside = path.with_name(f".{LOCK}.{uuid.uuid4().hex}")
    try:
        os.rename(path, aside)  # of several who do this, one succeeds
    except FileNotFoundError:
        return
    found = LockContent.at(aside)
    if found is not None and found.content != content:
        _create(path, found.content)
    aside.unlink(missing_ok=True)


def _beat(path: pathlib.Path, content: bytes, done: threading.Event) -> None:
    """Shows that the process lives, as long as it has the lock; without it, it must not go on."""
    while not done.wait(BEAT):
        try:
            found = LockContent.at(path)
            if found is not None and found.content == content:
                os.utime(path)
                continue
            if found is None and _create(path, content):
                continue
        except OSError as error:  # of a file server; the lock stays ours for a while
            warn(f"{path}: no heartbeat could be written ({error})")
            continue
        warn(f"{path.parent} was taken over by another run while this process stood still: it ends")
        os._exit(TAKEN)
