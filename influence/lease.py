"""Who drives a run: a lease in its directory, so that two drivers never write one result.

`RUN/driver.json` names the driver and is written anew every few seconds while it is at work. It is
created create-only and replaced on its ETag, so that of two drivers one gets it. A lease is free
once it is given back, once its process is dead (known on the same machine only), or once it has
been silent for `STALE_SECONDS`. A driver that finds its lease taken stops before it writes more.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from influence import storage
from influence.errors import InfluenceError, RunBusyError, RunTakenError

BEAT_SECONDS = 5.0
STALE_SECONDS = 30.0
#: A lease that was seen to be held so long ago is looked at again before anything is written.
TRUST_SECONDS = 10.0
_FILE = "driver.json"
_POLL_SECONDS = 1.0
_ATTEMPTS = 5
#: Leases that are held in this process: another one in its name is a leftover.
_held: set[str] = set()


class Holder(BaseModel):
    """What `driver.json` says."""

    owner: str = Field(description="one driver, one start")
    held: bool = Field(default=True, description="false once it was given back")
    host: str
    place: str = Field(description="boot and process namespace that the process id counts in")
    pid: int
    born: str = Field(description="when the process started, as the kernel counts it")
    since: datetime
    beat: datetime = Field(description="the last sign of life, by the driver's own clock")

    @property
    def name(self) -> str:
        """For messages."""
        return (
            f"process {self.pid} on {self.host}, at work since {self.since:%Y-%m-%d %H:%M:%S} UTC"
        )


class Lease:
    """One driver's hold on a run directory; see `driving`, which makes them."""

    def __init__(self, run: str) -> None:
        self.owner = uuid.uuid4().hex
        self._run, self._url = run, storage.join(run, _FILE)
        self._pid = os.getpid()
        self._since = datetime.now(UTC)
        self._confirmed = 0.0
        self._lost: str | None = None
        self._lock, self._stop = threading.Lock(), threading.Event()

    def check(self) -> None:
        """See that the run is still this driver's; cheap, as long as it writes its signs of life.

        Raises:
            RunTakenError: another driver has it.
        """
        if self._lost is None and _now() - self._confirmed > TRUST_SECONDS:
            # Out of reach, this store takes no result either.
            with contextlib.suppress(InfluenceError):
                self._renew()
        if self._lost is not None:
            raise RunTakenError(self._lost)

    def acquire(self, note: Callable[[str], None]) -> None:
        """Take the lease; waits while it is not known whether its holder lives.

        Raises:
            RunBusyError: another driver is at work on this run.
        """
        seen: str | None = None
        while True:
            asked = _now()
            if storage.put_new(self._url, self._document()):
                break
            found = storage.load(self._url)
            if found is None:
                continue
            data, info = found
            holder = parse_holder(data)
            if holder is not None and holder.owner == self.owner:
                break  # the answer to the put was lost
            free, silent = holder is not None and _is_free(holder), 0.0
            if not free:
                silent = (storage.clock(self._run) - info.modified).total_seconds()
            if free or silent > STALE_SECONDS:
                if storage.replace(self._url, self._document(), info.etag):
                    break
                continue  # somebody was faster, or the answer was lost: look again
            if holder is not None and (_is_here(holder) or seen not in (None, info.etag)):
                raise RunBusyError(_refusal(self._run, holder, silent))
            if seen is None:
                note(_waiting(self._run, holder, silent))
            seen = info.etag
            time.sleep(min(_POLL_SECONDS, STALE_SECONDS / 4))
        self._confirmed = asked

    def keep(self) -> None:
        """Give signs of life until `release`, on a thread of its own."""
        threading.Thread(target=self._beat, name="lease", daemon=True).start()

    def release(self) -> None:
        """Give the lease back; where that fails it runs out."""
        self._stop.set()
        _held.discard(self.owner)
        # The other thread may be waiting for the store: what it writes is conditional, too.
        locked = self._lock.acquire(timeout=BEAT_SECONDS)
        try:
            with contextlib.suppress(InfluenceError):
                self._write(held=False)
        finally:
            if locked:
                self._lock.release()

    def _beat(self) -> None:
        while self._lost is None and not self._stop.wait(BEAT_SECONDS):
            # What cannot be written now is written later.
            with contextlib.suppress(InfluenceError, OSError):
                self._renew()

    def _renew(self) -> None:
        with self._lock:
            if not self._stop.is_set():
                self._write()

    def _write(self, held: bool = True) -> None:
        for _ in range(_ATTEMPTS):
            asked = _now()
            found = storage.load(self._url)
            if found is None:
                written = not held or storage.put_new(self._url, self._document())
            else:
                holder = parse_holder(found[0])
                if holder is None or holder.owner != self.owner:
                    self._lost = _taken(self._run, holder)
                    return
                written = storage.replace(self._url, self._document(held), found[1].etag)
            if written:
                self._confirmed = asked
                return

    def _document(self, held: bool = True) -> bytes:
        holder = Holder(
            owner=self.owner,
            held=held,
            host=socket.gethostname(),
            place=_place(),
            pid=self._pid,
            born=_born(self._pid) or "",
            since=self._since,
            beat=datetime.now(UTC),
        )
        return holder.model_dump_json(indent=1).encode() + b"\n"


@contextlib.contextmanager
def driving(run: str, note: Callable[[str], None] = lambda text: None) -> Iterator[Lease]:
    """Drive a run within the block; `note` prints a line that the user should see.

    Raises:
        RunBusyError: another driver is at work on this run.
    """
    lease = Lease(run)
    _held.add(lease.owner)  # before anybody can see it
    try:
        lease.acquire(note)
    except BaseException:
        _held.discard(lease.owner)
        raise
    try:
        lease.keep()
        yield lease
    finally:
        lease.release()


def check_driver(run: str, owner: str) -> None:
    """See that a run is still this driver's, from another process (it looks into the directory).

    Raises:
        RunTakenError: another driver has it.
    """
    found = storage.load(storage.join(run, _FILE))
    holder = None if found is None else parse_holder(found[0])
    if holder is None or holder.owner != owner:
        raise RunTakenError(_taken(run, holder))


def parse_holder(data: bytes) -> Holder | None:
    """What a `driver.json` says; None if that cannot be read."""
    try:
        return Holder.model_validate_json(data)
    except ValidationError:
        return None


def _is_here(holder: Holder) -> bool:
    """Whether its process is one of this machine, whose end shows at once."""
    return bool(holder.place) and holder.place == _place()


def _is_free(holder: Holder) -> bool:
    """Whether it was given back, or its process is known to be dead."""
    if not holder.held:
        return True
    if not _is_here(holder):
        return False
    if holder.pid == os.getpid():
        return holder.owner not in _held
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    born = _born(holder.pid)
    return born is not None and born != holder.born


def _place() -> str:
    """Where a process id means the same process; empty where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(pid: int) -> str | None:
    """The kernel's start time of a process, "ended" for one that only awaits its parent."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "ended" if fields[0] in "ZX" else fields[19]


def _now() -> float:
    """Seconds; they pass while the machine sleeps, too, where the system counts them."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _waiting(run: str, holder: Holder | None, silent: float) -> str:
    by = "another driver" if holder is None else holder.name
    return (
        f"{run} was driven by {by}, whose last sign of life was {silent:.0f} s ago; waiting "
        f"whether there is another one: after {STALE_SECONDS:.0f} s of silence this driver takes "
        "over"
    )


def _refusal(run: str, holder: Holder, silent: float) -> str:
    return (
        f"{run} is being written by another driver: {holder.name}, last sign of life "
        f"{max(0.0, silent):.0f} s ago. Wait until it is done (`influence status {run}`) or stop "
        "it, then run the same command again; or use another `run` (the `cache` may be the same)"
    )


def _taken(run: str, holder: Holder | None) -> str:
    by = "another driver" if holder is None else f"another driver ({holder.name})"
    return (
        f"{run} was taken over by {by}, as this one gave no sign of life for "
        f"{STALE_SECONDS:.0f} s: it stops here and writes nothing more. The run goes on there"
    )
