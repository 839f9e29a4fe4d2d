"""`influence status RUN`: what is committed, what is missing, what failed; from anywhere."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from influence import storage
from influence.cache import Cache
from influence.config import Config
from influence.config_evaluation import EvaluationConfig
from influence.errors import InputError
from influence.meter import Left
from influence.progress import left_text, speed_text
from influence.records import Manifest, Pace, StageRecord
from influence.report_format import percent, step_phrase
from influence.report_format import seconds as duration
from influence.run_log import SIGN_OF_LIFE_SECONDS, read_manifest

_RESULTS = ("fidelity.json", "selection.jsonl", "report.html")


@dataclass(frozen=True)
class Status:
    """A run as its files tell it. `committed` counts each stage's shards in the cache at `now`.

    optimizer: whose step the scores are about; "" for plain gradient descent.
    """

    run: str
    manifest: Manifest
    committed: dict[str, int]
    results: dict[str, bool]
    optimizer: str = ""
    now: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def age(self) -> float | None:
        """Seconds since the manifest was written, by this machine's clock and the job's."""
        written = self.manifest.written
        return None if written is None else max(0.0, (self.now - written).total_seconds())

    @property
    def elapsed(self) -> float | None:
        """Seconds from the job's start to its last word."""
        started, written = self.manifest.started, self.manifest.written
        if started is None or written is None:
            return None
        return (written - started).total_seconds()

    @property
    def since_start(self) -> Pace:
        """Samples and tokens per second over all of that time; a row counts in every stage."""
        if not self.elapsed:
            return Pace()
        stages = self.manifest.stages.values()
        return Pace(
            samples_per_second=sum(record.rows for record in stages) / self.elapsed,
            tokens_per_second=sum(record.tokens for record in stages) / self.elapsed,
        )

    @property
    def seconds_left(self) -> float | None:
        """The job's own estimate when it wrote, less what has passed since; None if unknown."""
        pace = self.manifest.pace
        if self.manifest.state != "running" or pace is None or pace.seconds_left is None:
            return None
        return max(0.0, pace.seconds_left - (self.age or 0.0))

    def planned(self, stage: str) -> int:
        """Shards of a stage, as far as they are known."""
        return len(set(self.manifest.stages[stage].planned))


def _evaluations_in(run: str) -> str:
    """Of a folder with runs of `influence evaluate` alone: where these are."""
    places = [storage.join(run, "evaluations", name) for name in EvaluationConfig.model_fields]
    found = [url for url in places if storage.head(storage.join(url, "manifest.json")) is not None]
    return f", or that of an evaluation: {', '.join(found)}" if found else ""


def read_status(run: str) -> Status:
    """Read the manifest and look which of its shards the cache holds now.

    Raises:
        InputError: not a run directory.

    Example:
        >>> status = influence.read_status(config.run)
        >>> status.manifest.state, status.results["selection.jsonl"]
        ('done', True)
    """
    manifest = read_manifest(run)
    url = storage.join(run, "config.yaml")
    if manifest is None or storage.head(url) is None:
        raise InputError(
            f"{run}: no manifest.json and config.yaml there; expected the run directory of an "
            f"`influence select` (the config's `run`){_evaluations_in(run)}"
        )
    config = Config.model_validate(yaml.safe_load(storage.read_bytes(url)))
    cache = Cache(_cache_url(run, config, manifest))
    committed = {
        name: len(cache.present(record.planned))
        for name, record in manifest.stages.items()
        if record.planned
    }
    results = {name: storage.head(storage.join(run, name)) is not None for name in _RESULTS}
    step = step_phrase(config.optimizer.kind, config.optimizer.state)
    return Status(run, manifest, committed, results, step)


def _cache_url(run: str, config: Config, manifest: Manifest) -> str:
    """Wherever this is called: RUN/cache goes where the run goes, another one stays in place."""
    if config.cache is None:
        return storage.join(run, "cache")
    return manifest.cache or config.cache


def watch_status(run: str, every: float | None, show: Callable[[Status], None]) -> None:
    """Show a run's state, and with `every` (seconds) again and again until the run is over.

    Raises:
        InputError: not a run directory.
    """
    while True:
        status = read_status(run)
        show(status)
        if every is None or status.manifest.state != "running":
            return
        time.sleep(every)


def status_document(status: Status) -> dict[str, Any]:
    """All that `print_status` shows, as plain values; what is not known is null."""
    manifest = status.manifest
    return {
        "run": status.run,
        "method": manifest.method,
        "state": manifest.state,
        "doing": manifest.doing or None,
        "optimizer": status.optimizer or None,
        "started": _iso(manifest.started),
        "written": _iso(manifest.written),
        "written_seconds_ago": status.age,
        "elapsed_seconds": status.elapsed,
        "stages": {
            name: _stage_document(status, name, record) for name, record in manifest.stages.items()
        },
        "since_start": _speeds(status.since_start),
        "recent": None if manifest.pace is None else _speeds(manifest.pace),
        "seconds_left": status.seconds_left,
        "not_begun": [] if manifest.pace is None else manifest.pace.not_begun,
        "replicas": None if manifest.replicas is None else manifest.replicas.model_dump(),
        "model_share": manifest.model_share,
        "set_up_share": manifest.set_up_share,
        "model_share_of_up": manifest.model_share_of_up,
        "results": status.results,
    }


def _stage_document(status: Status, name: str, record: StageRecord) -> dict[str, Any]:
    planned, committed = status.planned(name), status.committed.get(name, 0)
    return {
        "shards": planned,
        "committed": committed,
        "missing": planned - committed,
        "reused": record.reused,
        "computed": record.computed,
        "damaged": record.damaged,
        "rows": record.rows,
        "tokens": record.tokens,
        "seconds": record.seconds,
        "model_seconds": record.model_seconds,
        "set_up_seconds": record.set_up_seconds,
        "replica_seconds": record.replica_seconds,
        "model_share": record.model_share,
        "failed": [failed.model_dump() for failed in record.failed],
    }


def _speeds(pace: Pace) -> dict[str, float | None]:
    return pace.model_dump(include={"samples_per_second", "tokens_per_second"})


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat(timespec="seconds")


def print_json(status: Status, console: Console) -> None:
    """`status_document` on one line, so that documents of a watched run are lines."""
    console.file.write(json.dumps(status_document(status)) + "\n")
    console.file.flush()


def print_status(status: Status, console: Console) -> None:
    """State, a table of stages, speed, replicas, time left, failures, which results are there."""
    manifest = status.manifest
    state = manifest.state + (f" ({manifest.doing})" if manifest.doing else "")
    # As Text, in which rich looks for neither markup nor emoji codes: names come out of the data.
    console.print(Text(f"{status.run}: {manifest.method}, {state}"), soft_wrap=True)
    if status.optimizer:
        console.print(Text(f"scores are about {status.optimizer}"), soft_wrap=True)
    for line in _lines_of_time(status):
        console.print(Text(line), soft_wrap=True)
    console.print(_stages(status))
    for line in _lines_of_work(status):
        console.print(Text(line), soft_wrap=True)
    for record in manifest.stages.values():
        for failed in record.failed:
            console.print(
                Text(f"failed: {failed.place} after {failed.tries}: {failed.error}"),
                soft_wrap=True,
            )
    there = [name for name, present in status.results.items() if present]
    console.print(f"results: {', '.join(there) or 'none yet'}", highlight=False)


def _stages(status: Status) -> Table:
    table = compact_table()
    headings = ("stage", "shards", "committed", "missing", "failed", "reused", "seconds")
    for heading in (*headings, "in model"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for name, record in status.manifest.stages.items():
        planned, committed = status.planned(name), status.committed.get(name, 0)
        table.add_row(
            Text(name),
            str(planned or ""),
            str(committed) if planned else "",
            str(planned - committed) if planned else "",
            str(len(record.failed) or ""),
            str(record.reused) if planned else "",
            f"{record.seconds:.1f}",
            "" if record.model_share is None else percent(record.model_share),
        )
    return table


def compact_table(**options: Any) -> Table:
    """A table of eight columns that fits into 80 characters."""
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, **options)


def _lines_of_time(status: Status) -> list[str]:
    manifest = status.manifest
    killed = "killed without a chance to say so: the same command goes on"
    if manifest.started is None or status.elapsed is None or status.age is None:
        return [f"running (or {killed})"] if manifest.state == "running" else []
    begun = manifest.started.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    if manifest.state != "running":
        return [f"started {begun}, took {duration(status.elapsed)}"]
    line = f"started {begun}; its last word was {duration(status.age)} ago"
    if status.age > 3 * SIGN_OF_LIFE_SECONDS:
        line += f" (a long step, or {killed})"
    return [line]


def _lines_of_work(status: Status) -> list[str]:
    manifest, lines = status.manifest, []
    speeds = [f"since the start {speed_text(status.since_start)}"] if status.elapsed else []
    if manifest.pace is not None and (recent := speed_text(manifest.pace)):
        speeds.append(f"in the last minute {recent}")
    if speeds:
        lines.append("; ".join(speeds))
    lines += [line for line in (share_text(manifest), damage_text(manifest)) if line]
    if manifest.state != "running":
        return lines
    if manifest.replicas is not None:
        lines.append(f"replicas: {manifest.replicas.up} up, {manifest.replicas.awaited} awaited")
    if manifest.pace is not None and status.seconds_left is not None:
        left = left_text(Left(status.seconds_left, tuple(manifest.pace.not_begun)))
        lines.append(f"{left} (of the shards that are known so far)")
    return lines


def damage_text(manifest: Manifest) -> str:
    """How many shards were found damaged; nothing if none was."""
    count = sum(record.damaged for record in manifest.stages.values())
    return f"damaged shards found and made anew: {count} (named in manifest.json)" if count else ""


def share_text(manifest: Manifest) -> str:
    """The share of the replicas' time that their models were at work; nothing if none was."""
    if manifest.model_share is None:
        return ""
    text = f"models at work: {percent(manifest.model_share)} of the time with shards to compute"
    if manifest.set_up_share:
        text += f" (setting up: {percent(manifest.set_up_share)})"
    if manifest.model_share_of_up is not None:
        text += f", {percent(manifest.model_share_of_up)} of the time that replicas were up"
    return text
