"""LoRA fine-tuning of a loaded model on weighted rows, going on from the newest checkpoint.

Makes reference and warm-up models, and trains on selections; on one device, or in each of several
workers of a torch.distributed group.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from influence import storage
from influence.adapters import local_adapter, peft_quiet
from influence.checkpoints import AT_LEAST, Checkpoints, epoch_folder, publish
from influence.errors import (
    InputError,
    InterruptedRunError,
    RunTakenError,
    StorageError,
    TrainingError,
)
from influence.finetune_settings import FinetuneSettings
from influence.finetune_steps import Steps, effective_rows
from influence.tokenization import Encoded
from influence.training_data import TrainingRows, digest_of
from influence.training_progress import TrainingProgress, Watcher
from influence.training_record import (
    RowsRecord,
    TrainingRecord,
    check_claim,
    evaluations_of,
    now,
    steps_of,
    versions,
    write_record,
)


def finetune(
    model: Any,
    rows: TrainingRows,
    evaluation_sets: Mapping[str, Sequence[Encoded]],
    settings: FinetuneSettings,
    output: str,
    *,
    adapter: str | None = None,
    identity: Mapping[str, Any] | None = None,
    watcher: Watcher | None = None,
) -> TrainingRecord:
    """Train LoRA factors in the model's linear layers; the model itself is left as it was.

    OUTPUT (a folder or s3://...) gets the adapter (adapter_config.json,
    adapter_model.safetensors), AdamW's state (optimizer.pt), training.json, and while training
    goes on checkpoints. Where there is a checkpoint of the same training, it goes on from there,
    to the same result; if it is done, its record is returned.

    Args:
        model: a causal LM on its device, without an adapter.
        rows: what to train on; at least one.
        evaluation_sets: name -> rows with a response, whose losses are taken before the first step,
            every `evaluate_every` steps, and after the last.
        adapter: folder or hub name of an adapter to go on from, instead of fresh factors; its rank,
            alpha, dropout and modules are in force then.
        identity: what else a training that goes on must have in common with the one that began
            (which model, ...), ready for JSON.
        watcher: is told how it goes; by default nobody is.

    Raises:
        InputError: OUTPUT holds another training (both values are named), modules that the model
            does not have, or a loss that is not finite.
        RunTakenError: out of the watcher, where another driver has taken OUTPUT over.
    """
    if not rows.encoded:
        raise TrainingError("finetune: no row can be trained on")
    watcher = watcher or TrainingProgress(quiet=True)
    whole = full_identity(rows, evaluation_sets, settings, identity or {}, adapter)
    before = check_claim(output, whole)
    if before is not None and before.done:
        return before
    record = before or _begin(rows, settings, whole)
    run = _Run(model, rows, evaluation_sets, settings, output, record, watcher)
    try:
        with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
            run.train(folder, adapter)
    except (KeyboardInterrupt, InterruptedRunError):
        run.finish("interrupted")
        raise
    except RunTakenError:
        raise  # the record is another driver's now
    except Exception:
        run.finish("failed")
        raise
    finally:
        watcher.end()
    return run.record


def full_identity(
    rows: TrainingRows,
    evaluation_sets: Mapping[str, Sequence[Encoded]],
    settings: FinetuneSettings,
    identity: Mapping[str, Any],
    adapter: str | None,
) -> dict[str, Any]:
    """What makes two trainings the same one."""
    values = {
        **identity,
        "settings": settings.that_count(),
        "adapter": identity.get("adapter", adapter),
        "rows": {"trained": len(rows.encoded), "content": rows.digest},
        "evaluation": {name: digest_of(each) for name, each in evaluation_sets.items()},
    }
    return json.loads(json.dumps(values))


def _begin(
    rows: TrainingRows, settings: FinetuneSettings, identity: dict[str, Any]
) -> TrainingRecord:
    steps = _steps(rows, settings)
    return TrainingRecord(
        started=now(),
        identity=identity,
        settings=settings.values(),
        rows=RowsRecord(
            trained=len(rows.encoded),
            left_out=rows.left_out,
            truncated=sum(row.truncated for row in rows.encoded),
            weighted=rows.weighted,
            effective_rows=effective_rows(rows.weights),
            tokens=rows.tokens,
            response_tokens=sum(row.n_response_tokens for row in rows.encoded),
        ),
        total_steps=steps.total,
        epoch_steps=steps.per_epoch,
    )


def _steps(rows: TrainingRows, settings: FinetuneSettings) -> Steps:
    return Steps(len(rows.encoded), settings.batch_size, settings.epochs, settings.seed)


class _Run:
    """One call of `finetune`."""

    def __init__(
        self,
        model: Any,
        rows: TrainingRows,
        sets: Mapping[str, Sequence[Encoded]],
        settings: FinetuneSettings,
        output: str,
        record: TrainingRecord,
        watcher: Watcher,
    ) -> None:
        self.model, self.rows, self.sets = model, rows, sets
        self.settings, self.output, self.watcher = settings, output, watcher
        self.record = record
        self._checkpoints = Checkpoints(output)
        self._writes = True

    def train(self, folder: str, adapter: str | None) -> None:
        """All steps that are left; the result is in OUTPUT then."""
        from influence.trainer_lora import LoraTrainer, Work

        steps = _steps(self.rows, self.settings)
        newest = self._checkpoints.fetch_newest(folder)
        with adapted(self.model, self.settings, adapter) as wrapped:
            work = Work(self.rows, self.sets, self.settings, steps, self.watcher, self._saved)
            trainer = LoraTrainer(wrapped, work, folder, begins=newest is None)
            self._describe(trainer, wrapped)
            if self._writes:
                self.watcher.begin(newest[0] if newest else 0, steps.total, steps.per_epoch)
                write_record(self.output, self.record)
            with warnings.catch_warnings():
                # PEFT looks for a config.json to tell a changed vocabulary; GGUF models have none.
                warnings.filterwarnings("ignore", message="Could not find a config file")
                trainer.train(resume_from_checkpoint=newest[1] if newest else None)
            if self._writes and newest and newest[0] >= steps.total:
                # It ended between its last checkpoint and its result.
                self._take(trainer.state.log_history)
                self._publish(newest[1])

    def _describe(self, trainer: Any, wrapped: Any) -> None:
        record, arguments = self.record, trainer.args
        # Of several workers the first one writes.
        self._writes = arguments.process_index == 0
        record.state = "running"
        record.workers = arguments.world_size
        device = arguments.device
        gpu = device.type == "cuda"
        record.device = torch.cuda.get_device_name(device) if gpu else device.type
        record.trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        record.settings, record.versions = self.settings.values(), dict(versions())

    def _saved(self, step: int, folder: str, history: list[dict[str, Any]]) -> None:
        """A checkpoint is in a local folder: commit it; after the last step it is the result."""
        record = self.record
        self._take(history)
        self._publish_epoch(step, folder)
        last = step >= record.total_steps
        try:
            self._checkpoints.commit(step, folder)
            if not last:
                write_record(self.output, record)
                keep = self.settings.keep_checkpoints
                self._checkpoints.prune(None if keep is None else max(AT_LEAST, keep))
        except StorageError as error:
            if last:
                raise
            # The next one is as good: no reason to lose what is in memory.
            self.watcher.note(f"the checkpoint of step {step} was not written: {error}")
        if last:
            self._publish(folder)
        shutil.rmtree(folder, ignore_errors=True)

    def _publish_epoch(self, step: int, folder: str) -> None:
        """Before the checkpoint counts: a training that goes on from it has the epochs before."""
        ends = _steps(self.rows, self.settings).ends
        if self.settings.keep_epochs and step in ends:
            publish(folder, storage.join(self.output, epoch_folder(ends.index(step) + 1)))

    def _take(self, history: list[dict[str, Any]]) -> None:
        """The log of everything up to a checkpoint, into the record."""
        record = self.record
        record.steps, record.evaluations = steps_of(history), evaluations_of(history)
        record.seconds = sum(each.seconds for each in record.steps)
        record.tokens = sum(each.tokens for each in record.steps)

    def _publish(self, folder: str) -> None:
        publish(folder, self.output)
        self.finish("done")
        self._checkpoints.prune(self.settings.keep_checkpoints)

    def finish(self, state: str) -> None:
        """Write the record with this state."""
        if not self._writes:
            return
        self.record.state = state
        try:
            write_record(self.output, self.record)
        except StorageError:
            if state == "done":
                raise  # otherwise the error that ended the training is the one to show


def lora_config(settings: FinetuneSettings) -> Any:
    """PEFT's description of fresh factors."""
    from peft import LoraConfig

    modules = settings.target_modules
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=modules if isinstance(modules, str) else list(modules),
        bias="none",
        task_type="CAUSAL_LM",
    )


@contextmanager
def adapted(model: Any, settings: FinetuneSettings, adapter: str | None) -> Iterator[Any]:
    """The model with LoRA factors to train and all else frozen; afterwards as it was.

    Fresh factors depend on the seed and the order of the layers alone: A Kaiming uniform, B zero.
    In a half-precision model they are float32.

    Raises:
        InputError: `target_modules` that the model does not have.
    """
    from peft import PeftModel, get_peft_model
    from peft.tuners.lora import LoraLayer

    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    training, quantized = model.training, getattr(model, "is_quantized", False)
    if getattr(model, "quantization_method", None) == "gguf":
        # Its weights were dequantised when they were loaded, but the Trainer goes by this mark.
        model.is_quantized = False
    if adapter is None:
        try:
            with peft_quiet():
                wrapped: Any = get_peft_model(model, lora_config(settings))
        except ValueError as error:
            raise InputError(f"finetune.target_modules: {error}") from error
        torch.manual_seed(settings.seed)
        for module in wrapped.modules():
            if isinstance(module, LoraLayer):
                for name in module.lora_A:
                    module.reset_lora_parameters(name, True)
    else:
        with peft_quiet():
            wrapped = PeftModel.from_pretrained(model, local_adapter(adapter), is_trainable=True)
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable()
    try:
        yield wrapped
    finally:
        if settings.gradient_checkpointing:
            model.activation_checkpointing_disable()
        wrapped.unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
        model.train(training)
        if quantized:
            model.is_quantized = quantized
