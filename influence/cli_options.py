"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

EXIT_CODES = (
    "Exit codes: 0 done; 2 bad config or data, a store that fails, a full disk, or another driver "
    "at work on the run; 3 some shards failed for good, or the reducer or a training's workers "
    "were lost (the same command goes on from there); 130 interrupted."
)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML config of the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a value of the config, e.g. `--set selection.budget=10%`. Repeatable.",
    ),
]
RunDirectory = Annotated[str, typer.Argument(metavar="RUN", help="Run directory (or s3://...).")]
