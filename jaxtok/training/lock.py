"""One training at a time in a run's folder, also on a disk that several machines share.

The folder holds a file that names the process that trains there, and that this process writes anew every few seconds.
Locks of the file system are not used, as many shared disks do not pass them on to other machines. Clocks of machines
are not compared either: the time of a file is that of the disk.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from jaxtok.training.distributed import gather, is_main

PULSE = 5.0
"""The seconds between two signs of life."""
EXPIRES = 60.0
"""The seconds without a sign of life after which a process is taken for dead."""
SETTLE = 0.5
"""The seconds after which a process that took over a lock looks whether another one did too."""


class RunLock:
    """The right to train in a folder; a context manager. All processes of a run enter it, and the main one holds it."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._path = directory / "training.lock"
        self._own = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
            "machine": _machine(),
            "began": _began(os.getpid()),
            "key": uuid.uuid4().hex,
        }
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._taken_by: dict[str, Any] | None = None

    def __enter__(self) -> RunLock:
        """Takes the lock.

        Raises:
          ValueError: another process trains in the folder.
        """
        error = self._take() if is_main() else ""
        if error := next((text for text in gather(error) if text), ""):
            raise ValueError(error)
        if is_main():
            self._thread = threading.Thread(target=self._live, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if _read(self._path)[0].get("key") == self._own["key"]:
                self._path.unlink()

    def check(self) -> None:
        """Raises a ValueError if another process has taken the lock over, so that this one must write nothing more."""
        if self._taken_by is not None:
            raise ValueError(
                f"{self._directory} was taken over by {_name(self._taken_by)}, as this process gave no sign of life "
                f"for {EXPIRES:g} s; it stops here, and the other one goes on."
            )

    def _take(self) -> str:
        """Takes the lock; returns why that is not possible, if it is not."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._own["folder"] = self._directory.stat().st_ino
        try:
            with self._path.open("x") as file:  # which one process alone can do, on shared disks too
                file.write(json.dumps(self._own))
            return ""
        except FileExistsError:
            pass
        if (other := self._living()) is None:
            self._write()
            time.sleep(SETTLE)
            other, _ = _read(self._path)
            if other.get("key") in (self._own["key"], None):
                return ""
        there = other.get("machine") != self._own["machine"]
        expiry = f" (If it is dead, its lock expires {EXPIRES:g} s after its last sign of life.)" if there else ""
        return (
            f"{self._directory} is being trained by {_name(other)}; wait for it, stop it, or choose another --workdir."
            f"{expiry}"
        )

    def _living(self) -> dict[str, Any] | None:
        """Returns the process that holds the lock; None if it is dead.

        What is not known of one on another machine shows within `PULSE` seconds if it lives, and `EXPIRES` if not.
        """
        first, seen, told = *_read(self._path), False
        while first:
            if first.get("machine") == self._own["machine"]:
                copied = first.get("folder") != self._own["folder"]  # from a run that is being trained
                return first if _began(first.get("pid", 0)) == first.get("began") and not copied else None
            other, written = _read(self._path)
            if other.get("key") != first.get("key") or written != seen:
                return other or None
            if self._now() - seen > EXPIRES:
                return None
            if not told:
                told = True
                print(f"waiting to see whether {_name(first)} still trains {self._directory}", file=sys.stderr)
            time.sleep(PULSE / 10)
        return None

    def _live(self) -> None:
        while not self._ended.wait(PULSE):
            with contextlib.suppress(OSError):  # the disk may be there again at the next sign of life
                other, _ = _read(self._path)
                if other.get("key") not in (self._own["key"], None):
                    self._taken_by = other
                    return
                self._write()

    def _write(self) -> None:
        half = self._path.with_name(f"{self._path.name}.{self._own['key']}")
        try:
            half.write_text(json.dumps(self._own))
            os.replace(half, self._path)
        except OSError:
            half.unlink(missing_ok=True)
            os.utime(self._path)  # a full disk has room for this

    def _now(self) -> float:
        """Returns the time of the disk."""
        probe = self._path.with_name(f"{self._path.name}.{self._own['key']}")
        probe.write_text("")
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()


def _read(path: Path) -> tuple[dict[str, Any], float]:
    """Returns what a lock says and when it was written; nothing, if there is none, or if it is not written yet."""
    for _ in range(10):
        try:
            with path.open() as file:
                text, written = file.read(), os.fstat(file.fileno()).st_mtime
            return dict(json.loads(text)), written
        except FileNotFoundError:
            return {}, 0.0
        except (ValueError, TypeError, OSError):  # half written, or replaced meanwhile
            time.sleep(0.02)
    return {"host": "an unknown machine"}, path.stat().st_mtime


def _name(process: dict[str, Any]) -> str:
    return f"process {process.get('pid', '?')} on {process.get('host', '?')} since {process.get('since', '?')}"


def _machine() -> str:
    """Returns what two processes share if each knows the other by its number (containers may share a host's name)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _began(pid: int) -> str | None:
    """Returns when a process of this machine began, as numbers are used again; None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]  # a zombie is dead
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"
