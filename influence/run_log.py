"""The run's record: `manifest.json`, kept up to date while the job goes on."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata

from pydantic import ValidationError

from influence import storage
from influence.errors import InfluenceError, InputError, InterruptedRunError, RunTakenError
from influence.fingerprints import Fingerprint
from influence.lease import Lease
from influence.records import FailedShard, Manifest, StageRecord, to_json
from influence.units import Unit
from influence.worker import UnitResult

_PACKAGES = ("torch", "transformers", "peft", "pyarrow", "numpy", "ray", "obstore")
_SAVE_EVERY_SECONDS = 5.0
#: A job at work writes its manifest at least so often while shards are computed on a cluster.
SIGN_OF_LIFE_SECONDS = 30.0


class RunLog:
    """Collects what happens to every stage and writes it to RUN/manifest.json.

    Args:
        run: the run directory.
        method: the selection method.
        note: prints a line that the user should see.
        lease: the driver's hold on the run; once that is lost nothing is written.

    Attributes:
        computed: keys of the shards that this job computed, by stage.
        maps: how often shards of the cache were mapped to scores.
        scored_rows, scored_tokens: of the shards beside the run's results (scores and the like)
            that were made, by stage.
        failed_writes: writes that the store failed since the job began; see `save`.
        refresh: called with the manifest before every write, for what changes all the time.
    """

    def __init__(
        self,
        run: str,
        method: str,
        note: Callable[[str], None] = lambda text: None,
        lease: Lease | None = None,
    ) -> None:
        self.url = storage.join(run, "manifest.json")
        self.manifest = Manifest(method=method, versions=_versions(), started=_now())
        self.computed: dict[str, set[str]] = {}
        self._begun: dict[str, dict[str, Unit]] = {}
        self._lent: set[str] = set()
        self._anew: dict[str, dict[str, Unit]] = {}
        self.maps = 0
        self.scored_rows: Counter[str] = Counter()
        self.scored_tokens: Counter[str] = Counter()
        self.failed_writes = 0
        self.refresh: Callable[[Manifest], None] = lambda manifest: None
        self.lease = lease
        self._note = note
        self._damaged: set[str] = set()
        self._tried = 0.0
        self._on_disk = False
        self._writes = True

    @classmethod
    def unsaved(cls, run: str, method: str) -> RunLog:
        """A log that writes no file: for plans."""
        log = cls(run, method)
        log._writes = False
        return log

    def begin(self, stage: str, fingerprint: Fingerprint, units: Sequence[Unit]) -> None:
        """Announce a stage's shards; a stage may be announced in several parts."""
        record = self.manifest.stages.setdefault(
            stage, StageRecord(fingerprint=fingerprint.hex, values=fingerprint.values)
        )
        record.planned += [unit.key for unit in units]
        record.shards = len(record.planned)
        self._begun.setdefault(stage, {}).update((unit.key, unit) for unit in units)

    def chosen(self, plan: Sequence[Unit], found: Sequence[Unit]) -> None:
        """Shards of other choices of rows are among `found`; without a cache it would be `plan`."""
        self._lent.update(unit.key for unit in found)
        for unit in plan:
            self._anew.setdefault(unit.stage, {})[unit.key] = unit

    def units_without_cache(self, stage: str) -> list[Unit]:
        """The stage's units so far, as they would have been announced with an empty cache."""
        begun = self._begun.get(stage, {})
        own = {key: unit for key, unit in begun.items() if key not in self._lent}
        return list({**own, **self._anew.get(stage, {})}.values())

    def reused(self, unit: Unit) -> None:
        """A shard of an earlier run stands in the cache, whole."""
        self.manifest.stages[unit.stage].reused += 1

    def damaged(self, stage: str, key: str) -> None:
        """What stands under this name is no whole shard of its unit."""
        record = self.manifest.stages[stage]
        record.damaged += key not in self._damaged
        record.notes = sorted({*record.notes, f"replaced a damaged shard: {key}"})
        self._damaged.add(key)

    def check(self) -> None:
        """See that the run is still this driver's.

        Raises:
            RunTakenError: another driver has it.
        """
        if self.lease is not None:
            self.lease.check()

    def done(self, stage: str, result: UnitResult) -> None:
        """A shard was computed (or found committed by somebody else)."""
        record = self.manifest.stages[stage]
        if result.outcome == "exists":
            record.reused += 1
        else:
            record.computed += 1
            self.computed.setdefault(stage, set()).add(result.key)
        record.rows += result.rows
        record.tokens += result.tokens
        record.model_seconds += result.model_seconds
        record.set_up_seconds += result.set_up_seconds
        record.load += result.load
        if result.device is not None:
            record.devices = sorted({*record.devices, result.device})
        record.notes = sorted({*record.notes, *result.notes})
        if result.outcome == "replaced":
            self.damaged(stage, result.key)
        self.save_sometimes()

    def mapped(self, stage: str, beside: Sequence[str]) -> None:
        """A map over shards begins, by objects of these keys (a predictor, say)."""
        self.maps += stage != "curvature"
        self.computed.setdefault(stage, set()).update(beside)

    def scored(self, stage: str, results: Sequence[UnitResult]) -> None:
        """Shards of such a map were made; the record does not count them, as they are not in the
        cache, but what models computed for them."""
        for result in results:
            if result.outcome != "exists":
                self.scored_rows[stage] += result.rows
                self.scored_tokens[stage] += result.tokens
                self.computed.setdefault(stage, set()).add(result.key)
                self.manifest.stages[stage].load += result.load

    def held(self, stage: str, seconds: float) -> None:
        """A replica spent this time on the stage; see `influence.observer.Observer`."""
        self.manifest.stages[stage].replica_seconds += seconds

    def doing(self, step: str) -> None:
        """Name the step that begins; written with the next save."""
        self.manifest.doing = step

    def failed(self, unit: Unit, attempts: int, error: str) -> None:
        """A shard failed for good."""
        self.manifest.stages[unit.stage].failed.append(
            FailedShard(
                key=unit.key,
                file=unit.file.url,
                first=unit.first,
                last=unit.last,
                attempts=attempts,
                error=error,
                label=unit.label,
            )
        )
        self.save()

    def took(self, stage: str, seconds: float, up_seconds: float = 0.0) -> None:
        """Add wall time to a stage, and the seconds that replicas were up in it, all together;
        stages without shards (regression, ...) are made here."""
        record = self.manifest.stages.setdefault(stage, StageRecord(fingerprint=""))
        record.seconds += seconds
        record.up_seconds += up_seconds

    def failures(self) -> list[FailedShard]:
        """Every shard that failed for good in this run."""
        return [failed for record in self.manifest.stages.values() for failed in record.failed]

    def finish(self, state: str) -> None:
        """Write the final state: done, failed or interrupted.

        Raises:
            InfluenceError: the store failed or refused the write.
        """
        self.manifest.state = state
        self.manifest.doing = ""
        self._write()

    @contextmanager
    def telling_the_end(self) -> Iterator[None]:
        """Within the block a job may end: interrupted or failed, which is written then."""
        try:
            yield
        except (KeyboardInterrupt, InterruptedRunError):
            self._last_word("interrupted")
            raise
        except Exception:
            self._last_word("failed")
            raise

    def _last_word(self, state: str) -> None:
        """What the job ended of (a full disk, a store that is away) may also keep this from being
        written, and is what the user has to be told. A job that began nothing leaves no word."""
        if self._on_disk or self.manifest.stages:
            with suppress(InfluenceError):
                self.finish(state)

    def save(self) -> None:
        """Write the manifest now.

        A write that fails is counted and shown, and made good at the next occasion: the shards are
        what a job cannot do without, its record is whole again with the final write.

        Raises:
            InfluenceError: the first write of the job failed: it could not record anything.
            RunTakenError: another driver has the run.
        """
        try:
            self._write()
        except RunTakenError:
            raise
        except InfluenceError as error:
            if not self._on_disk:
                raise
            self.failed_writes += 1
            self._note(
                f"manifest.json was not written ({self.failed_writes} failed so far), "
                f"trying again later: {error}"
            )

    def save_sometimes(self) -> None:
        """Write the manifest if the last attempt is some seconds old."""
        if time.monotonic() - self._tried > _SAVE_EVERY_SECONDS:
            self.save()

    def sign_of_life(self) -> None:
        """Write the manifest if nothing has happened for long: its age tells a dead job."""
        if self._on_disk and time.monotonic() - self._tried > SIGN_OF_LIFE_SECONDS:
            self.save()

    def _write(self) -> None:
        if not self._writes:
            return
        self.refresh(self.manifest)
        self.manifest.written = _now()
        self.check()
        try:
            storage.put(self.url, to_json(self.manifest))
        finally:
            self._tried = time.monotonic()
        self._on_disk = True


def read_manifest(run: str) -> Manifest | None:
    """The manifest of a run directory, or None if there is none.

    Raises:
        InputError: a manifest that this version cannot read.

    Example:
        >>> manifest = influence.read_manifest(config.run)
        >>> manifest.stages["embedding"].rows
        72
    """
    url = storage.join(run, "manifest.json")
    if storage.head(url) is None:
        return None
    try:
        return Manifest.model_validate_json(storage.read_bytes(url))
    except ValidationError as error:
        raise InputError(
            f"{url}: not a manifest of this version ({error.error_count()} problems, first: "
            f"{error.errors()[0]['loc']}: {error.errors()[0]['msg']})"
        ) from None


def _now() -> datetime:
    return datetime.now(UTC)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
