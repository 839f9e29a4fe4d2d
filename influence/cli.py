"""The command line. Every command takes one YAML config; `--set a.b=value` overrides a value."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from influence.cache_commands import register
from influence.cli_options import EXIT_CODES, ConfigPath, Overrides, RunDirectory
from influence.config_loading import load_config
from influence.errors import InfluenceError
from influence.signals import stop_signals

app = typer.Typer(
    name="influence",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Choose which candidate samples to fine-tune a language model on, with what weight, and "
    "how sure that is. Start with `influence plan CONFIG`, then `influence select CONFIG`.",
    epilog=EXIT_CODES,
)


@app.command(epilog=EXIT_CODES)
def select(
    config: ConfigPath,
    set_: Overrides = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Put the results over those of another config.")
    ] = False,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Run without Ray, in this process.")
    ] = False,
) -> None:
    """Run the whole job: cache, regression, weights, selection, report.

    Shards that are in the cache are reused; an interrupted run goes on where it was.
    """
    settings = load_config(config, set_ or ())
    if in_process:
        from influence.one_process import run_select
    else:
        from ray_jobs.select import run_select
    summary = run_select(settings, replace=replace)
    print_summary(settings.run, summary)


@app.command(epilog=EXIT_CODES)
def plan(
    config: ConfigPath,
    set_: Overrides = None,
    numerics: Annotated[
        int,
        typer.Option(
            "--numerics",
            metavar="ROWS",
            min=0,
            help="Also run the model on so many rows, in the run's precision and in float32 "
            "(float64 for a float32 run), and say how similar gradients and embeddings are.",
        ),
    ] = 0,
    json_: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Also write it as JSON; - for stdout alone."),
    ] = None,
    measure: Annotated[
        int,
        typer.Option(
            "--measure",
            metavar="ROWS",
            min=0,
            help="First run the model on so many rows here and take the speeds from that.",
        ),
    ] = 0,
    like: Annotated[
        str | None,
        typer.Option("--like", metavar="RUN", help="Take the speeds from this run."),
    ] = None,
) -> None:
    """Say what a run would cost: counts, tokens, cached shards, FLOPs, bytes, time, money.

    Tokenises the pool and the targets (that much is committed to the cache), loads no weights
    unless `--measure` or `--numerics` asks for it. Times are estimated from what earlier runs on
    the same cache measured, else from defaults that are named.
    """
    from influence.interface import make_plan
    from influence.plan_commands import write_json
    from influence.plan_tables import print_plan

    console = Console()
    settings = load_config(config, set_ or ())
    made = make_plan(settings, measure=measure, like=like)
    if json_ is not None:
        write_json(made, json_)
    if json_ != "-":
        print_plan(made, console)
    if numerics:
        from influence.numerics import compare_precisions, numerics_table

        console.print(numerics_table(compare_precisions(settings, numerics)))


@app.command(epilog=EXIT_CODES)
def status(
    run: RunDirectory,
    json_: Annotated[
        bool, typer.Option("--json", help="Print the same as a JSON document on one line.")
    ] = False,
    watch: Annotated[
        float | None,
        typer.Option(
            "--watch",
            metavar="SECONDS",
            min=0.1,
            help="Look again so often, until the run is over.",
        ),
    ] = None,
) -> None:
    """Say what of a run is committed, what is missing, what failed, how fast it goes, and how long
    it still takes. Reads the run's files alone: from anywhere, while the run goes on."""
    from influence.status import print_json, print_status, watch_status

    console, show = Console(), print_json if json_ else print_status

    def shown(status: Any) -> None:
        if watch is not None and not json_:
            console.clear()
        show(status, console)

    watch_status(run, watch, shown)


@app.command(epilog=EXIT_CODES)
def report(run: RunDirectory) -> None:
    """Rebuild RUN/report.html from the files of a run, or of evaluations."""
    from influence.report import build_report

    Console().print(build_report(run), soft_wrap=True, highlight=False)


@app.command(epilog=EXIT_CODES)
def finetune(
    config: ConfigPath,
    set_: Overrides = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Begin anew over a training of other arguments.")
    ] = False,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Run without Ray, in this process.")
    ] = False,
) -> None:
    """Fine-tune the model with LoRA on RUN's selection with its weights, on the pool, or on files.

    Checkpoints are committed under way: the same command goes on from the newest one. Runs in this
    process, or with Ray Train if RAY_ADDRESS is set or `finetune.workers` is above 1.
    """
    from influence.finetune_summary import summary_tables

    settings = load_config(config, set_ or ())
    if in_process or (settings.finetune.workers == 1 and not os.environ.get("RAY_ADDRESS")):
        from influence.finetune_job import run_finetune
    else:
        from ray_jobs.finetune import run_finetune
    record = run_finetune(settings, replace=replace)
    console = Console()
    for table in summary_tables(record):
        console.print(table)
    output = settings.finetune.output or f"{settings.run.rstrip('/')}/finetune"
    console.print(f"adapter: {output}", soft_wrap=True, highlight=False)


@app.command(epilog=EXIT_CODES)
def evaluate(
    config: ConfigPath,
    set_: Overrides = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Put the results over those of other settings.")
    ] = False,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Run without Ray, in this process.")
    ] = False,
) -> None:
    """Measure how good the scores are, on data whose answers are known.

    What is measured is what the config's section `evaluation` names:

    `evaluation: {class_detection: {column: NAME}}`: candidates and target rows carry a class in the
    column NAME. Are the candidates that rank first for a target row of its own class? Mean AUC and
    recall over the target rows, for DataInf's influence, plain gradient products, cosines of
    gradients, and RDS+ embeddings. The model is that of `method: in2core` (`reference.adapter`).

    `evaluation: {group_influence: {}}`: the effect of leaving the whole selection out, first and
    second order. `{reductions: {}}`: the ways to turn token gradients into a row's, and their
    length bias. `{exact_inverse: {}}`: how far DataInf is from the inverse that it stands for.

    `{downstream: {methods: {...}, tests: {...}}}`: fine-tune on every method's selection with
    several seeds, and compare the test losses with those of random rows and of the whole pool.

    `{fidelity: {}}`: predicted scores against exact ones of random candidates, for a
    grid of landmarks, embeddings, kernels and dampings, what the certificate says of each, and its
    cost.

    `{lds: {}}`: fine-tune on random subsets of a small pool; do summed scores rank the subsets as
    training on them does? `{leave_one_out: {}}`: the same without single rows.

    Gradients and embeddings come from the cache that `influence select` fills, and go there. An
    interrupted evaluation goes on where it was. The results are in RUN/evaluation.json and
    RUN/report.html; RUN/evaluations/NAME is what `influence status` takes meanwhile.
    """
    from influence.evaluation_tables import result_tables, terminal_tables

    settings = load_config(config, set_ or ())
    if in_process:
        from influence.one_process import run_evaluate
    else:
        from ray_jobs.evaluate import run_evaluate
    found = run_evaluate(settings, replace=replace)
    console = Console()
    for result in result_tables(settings.run, found):
        for table in terminal_tables(result, console.width):
            console.print(table)
    url = f"{settings.run.rstrip('/')}/evaluation.json"
    console.print(f"evaluation: {url}", soft_wrap=True, highlight=False)


register(app)


def print_summary(run: str, summary: dict[str, Any]) -> None:
    """Tables after a run: sources in the pool and the selection, certificate, seconds per stage."""
    from influence.summary import (
        contamination_line,
        objective_line,
        proponents_line,
        summary_tables,
    )

    console = Console()
    for table in summary_tables(run, summary):
        console.print(table)
    if summary["counts"]["budget_exceeds_pool"]:
        console.print("The budget is larger than the pool: every scored candidate is selected.")
    if (alike := contamination_line(summary["counts"])) is not None:
        console.print(alike, soft_wrap=True, highlight=False)
    if (minimised := objective_line(summary["fidelity"])) is not None:
        console.print(minimised, soft_wrap=True, highlight=False)
    if (signed := proponents_line(summary["counts"])) is not None:
        console.print(signed, soft_wrap=True, highlight=False)
    console.print(f"selection: {run}/selection.jsonl", soft_wrap=True, highlight=False)
    console.print(f"report:    {summary['report']}", soft_wrap=True, highlight=False)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs a command; an error of the package ends with its message and exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with stop_signals():
            app(args=arguments, prog_name="influence")
    except InfluenceError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("interrupted: what is committed stands; the same command goes on", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
