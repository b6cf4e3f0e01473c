"""A run's folder has one driver at a time: `owner.json` in it says which, and is written anew every few seconds.

Two drivers that both go on from one folder would write over each other's checkpoints and curves without a word. The
first to create the file owns the run. Another one watches it: when it changes, its owner is alive and the newcomer is
refused; when it does not for a while, or names a process of this machine that is gone, the run is taken over. No two
clocks are compared. An owner that finds another's name in the file, after a long pause of its own, stops.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from ecocseg.errors import InputError, StorageUnavailable
from ecocseg.storage import Storage, join

FILE = "owner.json"
BEAT_SECONDS = 10.0
STALE_SECONDS = 40.0
"""Without a change for so long, the owner is taken for dead."""
JOBS = {"SLURM_JOB_ID": "SLURM job", "RAY_JOB_SUBMISSION_ID": "Ray job"}


@contextlib.contextmanager
def owned(run_url: str, storage: Storage, lost: Callable[[], None], say: Callable[[str], None] = print) -> Iterator[None]:
    """Own a run's folder while the block runs; `lost` is called when another driver has taken it over.

    Raises:
        InputError: when a driver that is alive owns it.
    """
    me = describe()
    _claim(run_url, storage, me, say)
    done = threading.Event()
    thread = threading.Thread(target=_beat, args=(run_url, storage.soon(), me, done, lost), daemon=True, name="ecocseg-owner")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(5)
        with contextlib.suppress(InputError, StorageUnavailable):
            if (_read(run_url, storage) or {}).get("id") == me["id"]:
                storage.delete(join(run_url, FILE))


def describe() -> dict[str, Any]:
    """This process, as others are told of it."""
    jobs = [f"{name} {os.environ[key]}" for key, name in JOBS.items() if os.environ.get(key)]
    return {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid()),
            "place": _place(), "job": ", ".join(jobs), "beat": 0,
            "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())}


def _claim(run_url: str, storage: Storage, me: dict[str, Any], say: Callable[[str], None]) -> None:
    url, mine = join(run_url, FILE), json.dumps(me).encode()
    while True:
        seen = _read(run_url, storage)
        if seen is None and storage.create(url, mine):
            return
        seen = _read(run_url, storage)
        if seen is None:
            continue  # deleted meanwhile
        if seen.get("id") == me["id"]:
            return  # created by a try whose answer was lost
        if not _is_gone(seen):
            _wait_for_silence(run_url, storage, seen, say)
        say(f"{run_url}: taken over from {_name(seen)}, which is gone")
        storage.delete(url)


def _wait_for_silence(run_url: str, storage: Storage, seen: dict[str, Any], say: Callable[[str], None]) -> None:
    """Return when the owner has not been heard of for long. InputError as soon as it is."""
    say(f"{run_url}: owned by {_name(seen)}; looking for up to {STALE_SECONDS:g} s whether it is alive")
    until = time.monotonic() + STALE_SECONDS
    while time.monotonic() < until:
        time.sleep(min(1.0, BEAT_SECONDS / 4))
        now = _read(run_url, storage)
        if now is None:
            return
        if now != seen:
            raise InputError(f"run.name: {run_url} is being trained by {_name(now)}; wait for it, stop it, or choose another "
                             f"run.name. When it is dead, the run is taken over {STALE_SECONDS:g} s after its last sign of "
                             f"life, or at once when {join(run_url, FILE)} is deleted")


def _beat(run_url: str, storage: Storage, me: dict[str, Any], done: threading.Event, lost: Callable[[], None]) -> None:
    """Thread: show that this process is alive, and see that it still owns the run."""
    number = 0
    while not done.wait(BEAT_SECONDS):
        number += 1
        with contextlib.suppress(InputError, StorageUnavailable):  # a bucket that is away comes back, or ends the run itself
            seen = _read(run_url, storage)
            if seen is not None and seen.get("id", me["id"]) != me["id"]:
                lost()
                return
            storage.write_bytes(join(run_url, FILE), json.dumps({**me, "beat": number}).encode())


def _read(run_url: str, storage: Storage) -> dict[str, Any] | None:
    """What the file says; None without one, nothing while it is being written."""
    try:
        found = json.loads(storage.read_bytes(join(run_url, FILE)))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _name(owner: dict[str, Any]) -> str:
    job = f", {owner['job']}" if owner.get("job") else ""
    return f"process {owner.get('pid', '?')} on {owner.get('host', 'an unknown host')}{job} since {owner.get('since', '?')}"


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine and is none any more."""
    return bool(owner) and owner.get("place") == _place() and owner.get("born") != _born(int(owner.get("pid", 0)))


def _place() -> str:
    """Where a process's number means that process: host, boot, and container."""
    boot = ""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    space = ""
    with contextlib.suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot} {space}"


def _born(pid: int) -> str:
    """When a process of this machine began, in its own unit, so that a number given anew is another process; "" if there is
    none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except FileNotFoundError:
        return "" if os.path.isdir("/proc/self") else _answers(pid)
    except OSError:
        return ""


def _answers(pid: int) -> str:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "alive"
