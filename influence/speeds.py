"""How fast a stage goes: as an earlier run measured it, or else a default that is named.

A speed is effort per second of one replica (of the driver for its own steps); see
`influence.quantities.Quantities` for what effort is. Speeds in operations carry over between pools,
length limits and numbers of tangents; between models of other sizes only roughly, which is why
runs of the same settings and of the same model come first.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from influence.config import Config
from influence.fingerprints import Fingerprint
from influence.model_shape import ModelShape
from influence.plan_schemas import Measured, MeasuredStage, ReplicaKind
from influence.quantities import StageWork
from influence.replica import resolve_dtype

# Dense bfloat16 rates that makers state, in operations a second, by a part of the device's name.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "L4": 121e12,
    "A10": 125e12,
    "4090": 165e12,
}
UNKNOWN_GPU = 400e12
# What per-sample gradients and embeddings reach of the rate of large matrix products. The CPU's is
# measured (SmolLM2-135M, whose matrices are small), the GPU's is not.
CPU_PART, GPU_PART = 0.5, 0.25
# Bytes of rows that a replica tokenises, or compares with targets, a second; and what a shard takes
# beside its rows.
BYTES_PER_SECOND, SHARD_SECONDS = {"catalogue": 1.5e6, "contamination": 1e6}, 0.01
# A replica's start (libraries, device) and how fast it reads weights.
START_SECONDS, WEIGHTS_PER_SECOND = 15.0, 0.5e9
# A measurement that took less is taken only if there is none that took longer.
ENOUGH_SECONDS = 30.0
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Speed:
    """Effort per second of one replica, where the figure is from, and seconds for every shard."""

    per_second: float
    source: str
    shard: float = SHARD_SECONDS


def kind_of(config: Config) -> ReplicaKind:
    """The replicas of a config."""
    replicas = config.replicas
    dtype = resolve_dtype(config.model.dtype, replicas.num_gpus, config.model.device)
    return ReplicaKind(num_gpus=replicas.num_gpus, num_cpus=replicas.num_cpus, dtype=dtype)


class Speeds:
    """The speeds of a config's stages.

    Args:
        config: the run's.
        shape: its model's; None for a method without one.
        fingerprints: of its stages.
        history: what earlier runs measured, the newest first.
        asked: measurements that come before those, whatever they are of.
    """

    def __init__(
        self,
        config: Config,
        shape: ModelShape | None,
        fingerprints: Mapping[str, Fingerprint],
        history: Sequence[Measured] = (),
        asked: Sequence[Measured] = (),
    ) -> None:
        self._config, self._shape = config, shape
        self._model = fingerprints["embedding"].values if "embedding" in fingerprints else {}
        kind = kind_of(config)
        # Speeds of other replicas (more threads, another dtype) say nothing of these.
        self._groups = [[e for e in group if e.replica == kind] for group in (asked, history)]

    def of(self, work: StageWork) -> Speed:
        """Of a stage."""
        found = self._measured(work)
        if found is not None:
            run, stage = found
            device = f", {', '.join(stage.devices)}" if stage.devices else ""
            per_second = stage.effort / stage.seconds
            source = f"measured in {run.source} ({run.finished[:10]}{device})"
            return Speed(per_second, source, 0.0)
        if (rate := BYTES_PER_SECOND.get(work.name)) is not None:
            return Speed(rate, f"assumed: {rate / 1e6:g} MB of rows a second")
        if not work.replicas:
            return Speed(1.0, "assumed: as fast as in docs/results.md")
        if self._config.replicas.num_gpus > 0:
            return gpu_speed(self._config.replicas.num_gpus)
        return cpu_speed(self._config.replicas.num_cpus)

    def set_up(self) -> tuple[float, str]:
        """Seconds until a replica can begin, and where they are from."""
        for run in (run for group in self._groups for run in group):
            same = any(self._same_model(stage) for stage in run.stages.values())
            if run.set_up_seconds is not None and same:
                return run.set_up_seconds, f"measured in {run.source}"
        size = 0 if self._shape is None else self._shape.parameters
        weights = size * _BYTES[kind_of(self._config).dtype]
        return START_SECONDS + weights / WEIGHTS_PER_SECOND, "assumed"

    def _measured(self, work: StageWork) -> tuple[Measured, MeasuredStage] | None:
        """The nearest measurement: of the same settings, else of the same model, else of another;
        of these the newest that took long enough, else the longest."""
        groups = [
            [(run, run.stages[work.name]) for run in group if work.name in run.stages]
            for group in self._groups
        ]
        found = groups[0] or groups[1]
        if not found:
            return None
        mine = work.fingerprint.hex if work.fingerprint is not None else ""
        same = [each for each in found if mine and each[1].fingerprint == mine]
        model = [each for each in found if self._same_model(each[1])]
        nearest = same or model or found
        long = [each for each in nearest if each[1].seconds >= ENOUGH_SECONDS]
        return long[0] if long else max(nearest, key=lambda each: each[1].seconds)

    def _same_model(self, stage: MeasuredStage) -> bool:
        names = ("model", "adapter")
        return bool(stage.values.get("model")) and all(
            stage.values.get(name) == self._model.get(name) for name in names
        )


def gpu_speed(gpus: float) -> Speed:
    """Of a replica on so many GPUs: by the name of the one that is here, if one is."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((rate for part, rate in PEAKS.items() if part in name), UNKNOWN_GPU)
    known = name if peak != UNKNOWN_GPU else "a GPU"
    rate = peak * GPU_PART * gpus
    source = f"assumed: {GPU_PART:.0%} of {peak / 1e12:,.0f} TFLOP/s ({known})"
    return Speed(rate, source + ("" if gpus == 1 else f" x {gpus:g} GPU"))


def cpu_speed(threads: int) -> Speed:
    """Of a replica of so many threads on a CPU like this one."""
    rate = _thread_rate() * threads
    source = f"assumed: half of {rate / 1e9:,.0f} GFLOP/s (a large product here)"
    return Speed(CPU_PART * rate, source)


@lru_cache(maxsize=1)
def _thread_rate() -> float:
    """Operations a second of one thread in large matrix products, measured for 0.1 s."""
    a = torch.full((1024, 1024), 0.5)
    torch.mm(a, a)
    start, products = time.perf_counter(), 0
    while products < 2 or time.perf_counter() - start < 0.1:
        torch.mm(a, a)
        products += 1
    rate = 2.0 * 1024**3 * products / (time.perf_counter() - start)
    return rate / torch.get_num_threads()
