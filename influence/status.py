"""`influence status RUN`: what is committed, what is missing, what failed; from anywhere."""

from __future__ import annotations

from dataclasses import dataclass

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from influence import storage
from influence.cache import Cache
from influence.config import Config
from influence.errors import InputError
from influence.run_log import read_manifest
from influence.schemas import Manifest

_RESULTS = ("fidelity.json", "selection.jsonl", "report.html")


@dataclass(frozen=True)
class Status:
    """A run as its files tell it. `committed` counts each stage's shards in the cache now."""

    run: str
    manifest: Manifest
    committed: dict[str, int]
    results: dict[str, bool]


def read_status(run: str) -> Status:
    """Read the manifest and look which of its shards the cache holds now.

    Raises:
        InputError: not a run directory.
    """
    manifest = read_manifest(run)
    url = storage.join(run, "config.yaml")
    if manifest is None or storage.head(url) is None:
        raise InputError(
            f"{run}: no manifest.json and config.yaml there; expected the run directory of an "
            "`influence select` (the config's `run`)"
        )
    config = Config.model_validate(yaml.safe_load(storage.read_bytes(url)))
    cache = Cache(config.cache_url)
    committed = {
        name: len(cache.present(record.planned))
        for name, record in manifest.stages.items()
        if record.planned
    }
    results = {name: storage.head(storage.join(run, name)) is not None for name in _RESULTS}
    return Status(run, manifest, committed, results)


def print_status(status: Status, console: Console) -> None:
    """The state, a table of stages, failures, and which results are there."""
    manifest = status.manifest
    # As Text, in which rich looks for neither markup nor emoji codes: names come out of the data.
    console.print(Text(f"{status.run}: {manifest.method}, {manifest.state}"))
    table = Table()
    for heading in ("stage", "shards", "committed", "missing", "failed", "reused", "seconds"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for name, record in manifest.stages.items():
        planned = len(set(record.planned))
        committed = status.committed.get(name, 0)
        table.add_row(
            Text(name),
            str(planned or ""),
            str(committed) if planned else "",
            str(planned - committed) if planned else "",
            str(len(record.failed) or ""),
            str(record.reused) if planned else "",
            f"{record.seconds:.1f}",
        )
    console.print(table)
    for record in manifest.stages.values():
        for failed in record.failed:
            console.print(
                Text(
                    f"failed: {failed.file} rows {failed.first}-{failed.last} after "
                    f"{failed.attempts} attempts: {failed.error}"
                ),
                soft_wrap=True,
            )
    there = [name for name, present in status.results.items() if present]
    console.print(f"results: {', '.join(there) or 'none yet'}", highlight=False)
    if manifest.state == "running":
        console.print(
            "running (or killed without a chance to say so: the same command goes on)",
            highlight=False,
        )
