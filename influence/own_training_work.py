"""What a training of the job's own takes, from the catalogue."""

from __future__ import annotations

from typing import Any

from influence import cost, storage
from influence.checkpoints import RESULT_FILES
from influence.finetune_job import settings_of
from influence.input_bytes import file_bytes
from influence.job import Job
from influence.load import Load
from influence.model_shape import ModelShape, model_shape
from influence.quantities import Quantities, StageWork
from influence.training_record import NAME

_FILES = (*RESULT_FILES, NAME)  # and the marker
# A LoRA factor's number and its two moments; what a factor takes beside its numbers in the two
# files, the files' own headers, and a step in the record.
_NUMBER_BYTES, _FACTOR_BYTES, _FILE_BYTES, _STEP_BYTES = 12, 800, 8_000, 200


def training_work(job: Job, reduce: Any) -> StageWork:
    """One shard, on the training's own workers; nothing to do where it was there before the job."""
    own = job.own_training
    assert own is not None
    name = {"fingerprint": own.fingerprint, "workers": own.training.finetune.workers}
    if own.there:
        return StageWork(own.stage, Quantities(), None, shards=1, cached=1, **name)
    settings = settings_of(own.training)
    length = own.training.finetune.max_length
    epoch = reduce.training_load(own.training.finetune.fraction, settings.seed, length)
    load = epoch.times(settings.epochs)
    shape = _shape(job)
    flops = training_flops(job, load, shape)
    steps = load.rows / settings.batch_size
    written = _NUMBER_BYTES * shape.attributed + _FACTOR_BYTES * shape.layers
    written += _FILE_BYTES
    written *= 1 + own.epochs
    written += round(_STEP_BYTES * steps)
    least = Quantities(
        shards=1,
        bundles=1,
        rows=epoch.rows,
        tokens=load.tokens,
        flops=flops,
        effort=flops,
        read=sum(file_bytes(file) for file in own.files),
        written=written,
        objects=len(_FILES) + own.epochs * len(RESULT_FILES) + 1,
    )
    return StageWork(own.stage, least, None, shards=1, **name)


def training_flops(job: Job, load: Load, shape: ModelShape | None = None) -> float:
    """Operations of the training."""
    own = job.own_training
    assert own is not None
    again = own.training.finetune.gradient_checkpointing
    return cost.training(_shape(job) if shape is None else shape, load, checkpointing=again)


def training_bytes(job: Job) -> dict[str, int]:
    """Bytes of the files that stay, if this job made them."""
    own = job.own_training
    if own is None or not job.log.computed.get(own.stage):
        return {}
    names = {*_FILES, *own.result_files, own.kind.marker}
    found = {name: storage.head(storage.join(own.url, name)) for name in names}
    return {name: info.size for name, info in found.items() if info is not None}


def _shape(job: Job) -> ModelShape:
    """All factors count, whatever layers the scores are of."""
    config = job.config
    lora = config.gradients.model_copy(update={"parameters": "lora", "blocks": "all"})
    return model_shape(config.model_copy(update={"gradients": lora, "layers": "all"}))
