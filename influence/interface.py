"""What the commands do, for programs and notebooks: see `influence`, which hands these names out.

Only what no job module has: configs out of Python values, the cache's commands, and a run's files
as tables and records. The commands call the same functions.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from influence import storage
from influence.cache_record import CacheListing
from influence.config import Config
from influence.config_loading import parse_config, put_value, read_yaml
from influence.errors import InputError
from influence.records import Fidelity

if TYPE_CHECKING:
    from influence.cache_prune import Pruning
    from influence.plan import Plan
    from influence.training_record import TrainingRecord


def load_config(source: str | os.PathLike[str] | Mapping[str, Any], /, **sets: Any) -> Config:
    """A validated config, out of a YAML file or of a mapping like one.

    Args:
        source: path of the file, or the mapping; paths in it may be `pathlib`'s.
        sets: values that override it, as `--set` does: two underscores stand for the dot. They are
            Python's, and are not read as YAML; `**{"targets.my-task.limit": 8}` goes, too.

    Raises:
        InputError: missing file, bad YAML, unknown key, wrong type, credential, unbuilt value. It
            names the key, what was expected, and the nearest valid name.

    Example:
        >>> config = influence.load_config("job.yaml", selection__budget=8, run="runs/eight")
        >>> config.selection.budget, config.method
        (8, 'influence_distillation')
        >>> influence.load_config("job.yaml", selection__bugdet=8)
        Traceback (most recent call last):
        influence.errors.InputError: job.yaml: unknown key 'selection.bugdet'; did you mean ...
    """
    if isinstance(source, Mapping):
        name, data = "config", _plain(source)
    else:
        name = os.fspath(source)
        data = read_yaml(name)
    if isinstance(data, dict):
        for key, value in sets.items():
            put_value(data, key.replace("__", "."), _plain(value), key)
    return parse_config(data, name=name)


def _plain(value: Any) -> Any:
    """Mappings as dicts and paths as text, all the way down; a copy."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def make_plan(config: Config, *, measure: int = 0, like: str | None = None) -> Plan:
    """What a run would cost, as `influence plan` prints it. Tokenises; runs no model by itself.

    Args:
        measure: first run the model on so many rows here, and take the speeds from that.
        like: take the speeds from this run.

    Returns:
        `plan.bill` has shards, rows, tokens, FLOPs, bytes, seconds and money of every stage,
        `plan.document()` the same as `--json` writes it.

    Raises:
        InputError: rows or a model that are not there, or `like` is no run that is done.

    Example:
        >>> plan = influence.make_plan(config)
        >>> plan.counts["rows"], plan.bill.stages["embedding"].shards
        (72, 5)
    """
    from influence.plan import make_plan as planned
    from influence.plan_commands import known_speeds

    return planned(config, known_speeds(config, measure, like))


def read_scores(run: str | os.PathLike[str], columns: Sequence[str] | None = None) -> pa.Table:
    """RUN/scores: a row for every candidate, in the pool's order.

    Columns: id, source, score, target, weight, exact, n_tokens, n_response_tokens, truncated,
    reason, and score.NAME, low.NAME, high.NAME for every target or group; higher is better. A row
    that could not be scored has a null score and its reason. `columns` reads some of them alone.

    Raises:
        InputError: no scores there.

    Example:
        >>> scores = influence.read_scores(config.run, ["id", "score", "weight", "reason"])
        >>> scores.num_rows, sum(weight > 0 for weight in scores["weight"].to_pylist())
        (72, 8)
    """
    return _table(run, "scores", columns)


def read_selection(run: str | os.PathLike[str], columns: Sequence[str] | None = None) -> pa.Table:
    """RUN/selection: the selected rows, best first, with the columns they came with.

    And with influence_rank (from 1), influence_score, and influence_weight (mean 1).

    Raises:
        InputError: no selection there.

    Example:
        >>> chosen = influence.read_selection(config.run)
        >>> chosen["influence_rank"].to_pylist()
        [1, 2, 3, 4, 5, 6, 7, 8]
    """
    return _table(run, "selection", columns)


def read_fidelity(run: str | os.PathLike[str]) -> Fidelity:
    """RUN/fidelity.json, the certificate: how good the scores are, for every target.

    Raises:
        InputError: none there, or none of this version.

    Example:
        >>> fidelity = influence.read_fidelity(config.run)
        >>> sorted(fidelity.targets), fidelity.landmarks
        (['mixed', 'mixed/x', 'mixed/y', 'sums'], 24)
        >>> spearman = fidelity.targets["sums"].spearman
        >>> -1 <= spearman.low <= spearman.high <= 1
        True
    """
    url = storage.join(os.fspath(run), "fidelity.json")
    if storage.head(url) is None:
        raise _not_there(url)
    try:
        return Fidelity.model_validate_json(storage.read_bytes(url))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"{url}: {'.'.join(map(str, first['loc']))}: {first['msg']}; the file was not written "
            "by this version of influence: run the selection again"
        ) from None


def read_training(folder: str | os.PathLike[str]) -> TrainingRecord:
    """FOLDER/training.json of `influence finetune` (RUN/finetune, or finetune.output).

    Every step's loss, rate, gradient norm, tokens and seconds; the losses of the sets; settings.

    Raises:
        InputError: none there, or none of this version.

    Example:
        >>> training = influence.read_training(config.run + "/finetune")
        >>> training.state, len(training.steps) == training.total_steps
        ('done', True)
    """
    from influence.training_record import NAME, read_record

    record = read_record(os.fspath(folder))
    if record is None:
        url = storage.join(os.fspath(folder), NAME)
        raise InputError(f"{url}: not there; expected the output folder of `influence finetune`")
    return record


def list_cache(cache: str, configs: Sequence[str] = (), runs: Sequence[str] = ()) -> CacheListing:
    """The stages of a cache, their sizes, and which of the configs and runs use them.

    Args:
        cache: its directory or URL.
        configs: paths of configs (or run directories, for their config.yaml): what each one uses.
        runs: run directories: what each one used, by its manifest alone.

    Raises:
        InputError: a config or run that is not there, or whose files or model are not.

    Example:
        >>> listing = influence.list_cache(config.cache_url, runs=[config.run])
        >>> [(entry.stage, entry.used_by) for entry in listing.fingerprints][0]
        ('catalogue', ['runs/eight'])
    """
    from influence.cache_keeping import listing_of
    from influence.cache_listing import scan_cache

    return listing_of(scan_cache(cache), configs, runs)


def prune_cache(
    cache: str, keep: Sequence[str], *, older_than: str = "1h", remove: bool = False
) -> Pruning:
    """What no given config or run uses; with `remove`, that is removed.

    Args:
        cache: its directory or URL.
        keep: configs' paths and run directories whose shards stay; [] keeps none.
        older_than: a fingerprint whose newest shard is younger stays (30m, 12h, 7d; 0: no limit).

    Raises:
        InputError: one of `keep` cannot be resolved, or none uses anything here: nothing is gone.

    Example:
        >>> pruning = influence.prune_cache(config.cache_url, [config.run], older_than="0")
        >>> len(pruning.doomed), len(pruning.kept) > 0
        (0, True)
    """
    from influence.cache_keeping import prune
    from influence.cache_listing import scan_cache

    return prune(scan_cache(cache), keep, older_than, removing=remove)


def _table(run: str | os.PathLike[str], folder: str, columns: Sequence[str] | None) -> pa.Table:
    url = storage.join(os.fspath(run), folder)
    parts = sorted(
        info.url
        for info in storage.list_objects(url)
        if info.url.endswith(".parquet") and info.url.rsplit("/", 1)[-1].startswith("part-")
    )
    if not parts:
        raise _not_there(url)
    wanted = None if columns is None else list(columns)
    tables = []
    for part in parts:
        with pq.ParquetFile(storage.open_input(part)) as file:
            if unknown := set(wanted or ()) - set(file.schema_arrow.names):
                raise InputError(
                    f"{url}: no columns {sorted(unknown)}; there are {file.schema_arrow.names}"
                )
            tables.append(file.read(columns=wanted))
    return pa.concat_tables(tables)


def _not_there(url: str) -> InputError:
    return InputError(f"{url}: not there; expected the run directory of an `influence select`")
