"""The commands `influence cache list`, `influence cache prune` and `influence export`."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from influence.cli_options import EXIT_CODES, ConfigPath, Overrides
from influence.config_loading import load_config
from influence.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Look after a cache: what is in it, who uses it, and what can go.",
)

CacheUrl = Annotated[
    str,
    typer.Argument(
        metavar="CACHE", help="Cache directory (or s3://...): a config's `cache`, else RUN/cache."
    ),
]


class Stage(StrEnum):
    """Stages with a vector for each row."""

    embedding = "embedding"
    gradients = "gradients"


@app.command(
    "list",
    epilog="Example: `influence cache list s3://bucket/cache --config job.yaml --run runs/june`\n\n"
    + EXIT_CODES,
)
def list_(
    cache: CacheUrl,
    config: Annotated[
        list[str] | None,
        typer.Option(
            "--config",
            metavar="CONFIG",
            help="Say what this config uses, by the files and the model that it names. Also a run "
            "directory, for its config.yaml. Repeatable.",
        ),
    ] = None,
    run: Annotated[
        list[str] | None,
        typer.Option(
            "--run",
            metavar="RUN",
            help="Say what this run used, by its manifest.json alone. Repeatable.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Write the same as JSON.")] = False,
) -> None:
    """List the stages of a cache: shards, rows, bytes, age, and which configs and runs use them.

    A fingerprint stands for everything that changes the numbers of its shards (model, template,
    settings): what it covers is shown where a given config or run uses it. Sizes come from the
    store's listing; no shard is read.
    """
    from influence.cache_keeping import listing_of
    from influence.cache_listing import scan_cache
    from influence.cache_tables import print_listing
    from influence.records import to_json

    contents = scan_cache(cache)
    listing = listing_of(contents, config or (), run or ())
    if json:
        typer.echo(to_json(listing).decode(), nl=False)
    else:
        print_listing(listing, [*(config or ()), *(run or ())], contents.inner, _console())


@app.command(
    "prune",
    epilog="Example: `influence cache prune cache --keep job.yaml --keep runs/june`, and once more "
    "with `--yes`\n\n" + EXIT_CODES,
)
def prune_(
    cache: CacheUrl,
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG_OR_RUN", help="More to keep, after `--keep`."),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep",
            metavar="CONFIG_OR_RUN",
            help="Keep whatever this config (or this run directory) uses: every stage, for all of "
            "its targets. Repeatable; `--keep runs/*` keeps all of them. Name the run directory of "
            "a run that was made with `--set`.",
        ),
    ] = None,
    older_than: Annotated[
        str,
        typer.Option(
            "--older-than",
            metavar="AGE",
            help="Leave a fingerprint alone as long as its newest shard is younger than this by "
            "the store's own clock: a job at work whose config is not named goes on committing to "
            "it. "
            "30m, 12h, 7d; 0 for no limit.",
        ),
    ] = "1h",
    all_: Annotated[
        bool, typer.Option("--all", help="Keep nothing (but what is too young).")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove; else only say what would go.")
    ] = False,
) -> None:
    """Remove the shards that no given config uses. Without `--yes` it only says what would go.

    What a config uses is computed as the job computes it, so its files and its model have to be
    there: if one of the given configs cannot be resolved, nothing is removed. Shards of a
    fingerprint go together or not at all, and nothing but shards is ever removed. A job at work
    whose config is not named may still read shards that it found here: name it, or wait for it.
    """
    from influence.cache_keeping import prune
    from influence.cache_listing import scan_cache
    from influence.cache_prune import parse_age
    from influence.cache_tables import print_pruning

    parse_age(older_than)  # before a large cache is listed
    named = list(dict.fromkeys([*(keep or ()), *(more or ())]))
    if not all_ and not keep:
        raise InputError(
            "name every config or run that is still in use: --keep CONFIG_OR_RUN (repeatable); "
            "or --all to keep none"
        )
    if all_ and named:
        raise InputError("--all keeps nothing, --keep does: pass one of them")
    contents = scan_cache(cache)
    pruning = prune(contents, named, older_than, removing=yes)
    print_pruning(pruning, contents, older_than, removed=yes, console=_console())


def export(
    config: ConfigPath,
    stage: Annotated[Stage, typer.Option("--stage", help="Which vectors.")],
    out: Annotated[
        str, typer.Option("--out", metavar="FOLDER", help="A new folder (or s3://...).")
    ],
    set_: Overrides = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Export what is there, even if shards are missing.")
    ] = False,
) -> None:
    """Write embeddings or gradients from the cache as Parquet files for other tools.

    FOLDER/candidates/part-*.parquet (and FOLDER/targets/NAME, where targets have such vectors)
    with the columns id, source, file, row, vector (a fixed-size list), norm and n_tokens; dim,
    dtype, fingerprint and the layers' blocks are in the schema's metadata. Rows without a vector
    are left out and counted. Runs no model.
    """
    from influence.cache_tables import print_exported
    from influence.vector_export import export_vectors

    settings = load_config(config, set_ or ())
    overrides = "".join(f" --set {override}" for override in set_ or ())
    command = f"influence select {config}{overrides}"
    done = export_vectors(settings, stage.value, out, command=command, partial=partial)
    print_exported(done, out, _console())


def _console() -> Console:
    """The terminal; in a pipe or a file no table has to be cut."""
    return Console() if sys.stdout.isatty() else Console(width=120)


def register(root: typer.Typer) -> None:
    """Add these commands to the command line."""
    root.add_typer(app, name="cache")
    example = "Example: `influence export job.yaml --stage embedding --out vectors`\n\n"
    root.command(epilog=example + EXIT_CODES)(export)
