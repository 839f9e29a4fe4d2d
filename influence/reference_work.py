"""What making In2Core's reference model takes, from the catalogue."""

from __future__ import annotations

from typing import Any

from influence import cost, storage
from influence.checkpoints import ADAPTER_FILES, OPTIMIZER_FILE
from influence.finetune_job import settings_of
from influence.input_bytes import file_bytes
from influence.job import Job
from influence.load import Load
from influence.model_shape import ModelShape, model_shape
from influence.quantities import Quantities, StageWork
from influence.reference import MARKER, STAGE
from influence.training_record import NAME

_FILES = (*ADAPTER_FILES, OPTIMIZER_FILE, NAME, MARKER)
# A LoRA factor's number and its two moments; what a factor takes beside its numbers in the two
# files, the files' own headers, and a step in the record.
_NUMBER_BYTES, _FACTOR_BYTES, _FILE_BYTES, _STEP_BYTES = 12, 800, 8_000, 200


def reference_work(job: Job, reduce: Any) -> StageWork:
    """One shard, on the training's own workers; nothing to do where it was there before the job."""
    reference = job.reference
    assert reference is not None
    name = {"fingerprint": reference.fingerprint, "workers": reference.training.finetune.workers}
    if reference.there:
        return StageWork(STAGE, Quantities(), None, shards=1, cached=1, **name)
    settings = settings_of(reference.training)
    length = reference.training.finetune.max_length
    epoch = reduce.training_load(reference.training.finetune.fraction, settings.seed, length)
    load = epoch.times(settings.epochs)
    shape = _shape(job)
    flops = reference_flops(job, load, shape)
    steps = load.rows / settings.batch_size
    written = _NUMBER_BYTES * shape.attributed + _FACTOR_BYTES * shape.layers
    written += _FILE_BYTES + round(_STEP_BYTES * steps)
    least = Quantities(
        shards=1,
        bundles=1,
        rows=epoch.rows,
        tokens=load.tokens,
        flops=flops,
        effort=flops,
        read=sum(file_bytes(file) for file in reference.files),
        written=written,
        objects=len(_FILES),
    )
    return StageWork(STAGE, least, None, shards=1, **name)


def reference_flops(job: Job, load: Load, shape: ModelShape | None = None) -> float:
    """Operations of the training."""
    reference = job.reference
    assert reference is not None
    again = reference.training.finetune.gradient_checkpointing
    return cost.training(_shape(job) if shape is None else shape, load, checkpointing=again)


def reference_bytes(job: Job) -> dict[str, int]:
    """Bytes of the files that stay, if this job made them."""
    reference = job.reference
    if reference is None or not job.log.computed.get(STAGE):
        return {}
    found = {name: storage.head(storage.join(reference.url, name)) for name in _FILES}
    return {name: info.size for name, info in found.items() if info is not None}


def _shape(job: Job) -> ModelShape:
    """All factors count, whatever layers the scores are of."""
    config = job.config
    lora = config.gradients.model_copy(update={"parameters": "lora", "blocks": "all"})
    return model_shape(config.model_copy(update={"gradients": lora, "layers": "all"}))
