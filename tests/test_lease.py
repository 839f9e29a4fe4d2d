"""The lease on a run directory: one driver at a time, and none that waits for a dead one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from influence import lease, storage
from influence.errors import InputError, RunTakenError
from influence.lease import Holder, Lease, check_driver, driving, parse_holder


@pytest.fixture(params=["local", "s3"])
def run(request, tmp_path) -> str:
    """A run directory on either kind of store."""
    if request.param == "local":
        return str(tmp_path / "run")
    return storage.join(request.getfixturevalue("s3_url"), uuid.uuid4().hex)


def _holder(run: str) -> Holder:
    found = parse_holder(storage.read_bytes(storage.join(run, "driver.json")))
    assert found is not None
    return found


def _claim(run: str, **values: object) -> None:
    """Leave a lease as another driver would, with these values changed."""
    with driving(run) as own:
        document = json.loads(storage.read_bytes(storage.join(run, "driver.json")))
        del own
    document |= {"held": True, "owner": uuid.uuid4().hex, **values}
    storage.put(storage.join(run, "driver.json"), json.dumps(document).encode())


ELSEWHERE = {"place": "another boot", "host": "node-7", "pid": 4242}


def test_a_second_driver_is_refused_while_the_first_is_at_work(run):
    with driving(run), pytest.raises(InputError, match="another driver") as caught, driving(run):
        pass
    assert f"process {os.getpid()} on" in str(caught.value), "who holds it is not said"
    assert "influence status" in str(caught.value), "what to do is not said"
    assert caught.value.exit_code == 2
    with driving(run) as second:  # given back: no waiting
        assert _holder(run).owner == second.owner
    assert not _holder(run).held


def test_of_many_drivers_at_once_one_gets_the_run(run):
    for _ in range(5):  # the first time there is no lease yet, then there is one that is free
        start, won, refused = threading.Barrier(4), [], []
        done = threading.Barrier(4)

        def drive(start=start, done=done, won=won, refused=refused) -> None:
            start.wait()
            try:
                with driving(run) as own:
                    won.append(own.owner)
                    done.wait()
            except InputError as error:
                refused.append(str(error))
                done.wait()

        threads = [threading.Thread(target=drive) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1, "several drivers write into one run directory"
        assert len(refused) == 3
        assert _holder(run).owner == won[0]


def test_a_killed_driver_of_this_machine_is_followed_at_once(run):
    script = (
        "import sys, time; from influence.lease import Lease; own = Lease(sys.argv[1]);"
        "own.acquire(print); print('has it', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, run],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "has it\n"
        with pytest.raises(InputError, match=f"process {process.pid} on"), driving(run):
            pass
    finally:
        process.kill()  # a zombie, until somebody waits for it
    began = time.monotonic()
    while not lease._is_free(_holder(run)):
        assert time.monotonic() - began < 10, "a killed process counts as alive"
    with driving(run, note=lambda text: pytest.fail(f"waited for a dead driver: {text}")):
        pass
    process.wait(timeout=10)


def test_a_process_that_came_after_with_the_same_number_is_another_one(run):
    _claim(run, pid=os.getppid(), born="1")
    with driving(run) as own:
        assert _holder(run).owner == own.owner


def test_a_leftover_of_this_process_is_no_driver(run):
    _claim(run)  # as after a release that the store failed
    with driving(run) as own:
        assert _holder(run).owner == own.owner


def test_a_silent_driver_elsewhere_is_waited_for_and_followed(run, monkeypatch):
    monkeypatch.setattr(lease, "STALE_SECONDS", 1.5)
    _claim(run, **ELSEWHERE)
    notes: list[str] = []
    began = time.monotonic()
    with driving(run, notes.append) as own:
        took = time.monotonic() - began
        assert _holder(run).owner == own.owner
    assert took > 1.0, "taken over before it was known to be dead"
    (note,) = notes
    assert "process 4242 on node-7" in note
    assert "takes over" in note


def test_a_driver_elsewhere_that_shows_signs_of_life_is_not_followed(run, monkeypatch):
    _claim(run, **ELSEWHERE)
    url = storage.join(run, "driver.json")

    def beat() -> None:
        time.sleep(0.5)
        document = json.loads(storage.read_bytes(url))
        storage.put(url, json.dumps(document | {"beat": "2030-01-01T00:00:00Z"}).encode())

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(InputError, match="process 4242 on node-7"), driving(run):
        pass
    thread.join()


@pytest.mark.parametrize("left", [b"", b"{", b'{"owner": 3}'])
def test_a_lease_that_cannot_be_read_runs_out(tmp_path, monkeypatch, left):
    run = str(tmp_path / "run")
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.5)
    storage.put(storage.join(run, "driver.json"), left)
    with driving(run) as own:
        assert _holder(run).owner == own.owner


def test_a_driver_at_work_goes_on_giving_signs_of_life(run, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    with driving(run) as own:
        seen = {_holder(run).beat}
        deadline = time.monotonic() + 30
        while len(seen) < 4:
            assert time.monotonic() < deadline, "no signs of life"
            seen.add(_holder(run).beat)
        own.check()
        storage.delete(storage.join(run, "driver.json"))  # by somebody who tidied up
        while storage.head(storage.join(run, "driver.json")) is None:
            assert time.monotonic() < deadline, "a removed lease is not written again"
        own.check()


def test_a_driver_that_lost_its_lease_notices_and_leaves_it_alone(run, monkeypatch):
    monkeypatch.setattr(lease, "TRUST_SECONDS", 0.0)
    first = Lease(run)
    monkeypatch.setattr(lease, "_held", {first.owner})
    first.acquire(lambda text: None)
    check_driver(run, first.owner)
    monkeypatch.setattr(lease, "STALE_SECONDS", -1.0)  # as if it had been paused for long
    with driving(run) as second:
        with pytest.raises(RunTakenError, match="taken over") as caught:
            first.check()
        assert caught.value.exit_code == 2
        with pytest.raises(RunTakenError):
            check_driver(run, first.owner)
        check_driver(run, second.owner)
        first.release()
        assert _holder(run).owner == second.owner, "the lease of another was given back"
        assert _holder(run).held
