"""The options of `influence plan`: where speeds come from, and its JSON document."""

from __future__ import annotations

import sys

from influence import history, storage
from influence.bill_record import measured_of
from influence.calibration import measure_speeds
from influence.config import Config
from influence.errors import InputError
from influence.plan import Plan
from influence.plan_schemas import Measured
from influence.records import to_json
from influence.run_log import read_manifest


def known_speeds(config: Config, rows: int, like: str | None) -> list[Measured]:
    """What `--measure` and `--like` ask for; a fresh measurement stays in the cache.

    Raises:
        InputError: no such run, or one that is not done or of an earlier version.
    """
    found = []
    if rows:
        found.append(measure_speeds(config, rows))
        history.remember(config.cache_url, found[0])
    if like is not None:
        manifest = read_manifest(like)
        measured = None if manifest is None else measured_of(manifest, storage.absolute(like))
        if measured is None:
            raise InputError(
                f"--like {like}: no run there that is done and says what it took; expected the "
                "run directory of an `influence select` of this version"
            )
        found.append(measured)
    return found


def write_json(plan: Plan, where: str) -> None:
    """Write the plan's document to a path or URL, or to stdout ("-")."""
    data = to_json(plan.document())
    if where == "-":
        sys.stdout.write(data.decode())
        sys.stdout.flush()
    else:
        storage.put(where, data)
