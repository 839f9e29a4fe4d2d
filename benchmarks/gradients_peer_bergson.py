"""The rows `bergson*` of gradients.py; run by the interpreter of an environment with bergson 2.5.1.

Timed: CollectorComputer with the InMemoryCollector (the library's own loop and its collector that
writes no index) over given batches: padding of token lists, forward with logits at all positions,
backward, per-sample gradients of the linear layers in the decoder blocks projected on both sides by
random signs to peer_side x peer_side numbers a module, and their copy into one array in memory.
The loss is a row's mean over response tokens. As in bergson's own set-up the only parameter that
requires a gradient is the token embedding. Not timed: turning the ids into a datasets.Dataset.

`bergson_lora` takes the gradients of random LoRA factors of the job's rank on all linear layers as
they are; `bergson_lora_sketch` projects them like `bergson`. A projection of random numbers costs
the same whatever they are: values are not comparable with ours, speeds are.

    PYTHON gradients_peer_bergson.py bergson JOB.json
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bergson.collector.collector import CollectorComputer  # pyright: ignore
from bergson.collector.in_memory_collector import InMemoryCollector  # pyright: ignore
from bergson.config import IndexConfig  # pyright: ignore
from bergson.utils.peft import detect_peft_modules  # pyright: ignore
from bergson.utils.worker_utils import processor_for  # pyright: ignore
from datasets import Dataset, disable_progress_bars  # pyright: ignore
from gradients_protocol import Clock, Job, Make, PaddedBatch, Run, serve
from peft import LoraConfig, get_peft_model


def make(model: Any, job: Job, modules: set[str] | None = None, side: int | None = None) -> Run:
    """Per-sample gradients of every row of the batches, in memory.

    modules: names below `base_model`; default: all that bergson finds. side: of the projection;
    default: the job's; 0: none.
    """
    disable_progress_bars()
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    folder = tempfile.TemporaryDirectory()
    config = IndexConfig(
        run_path=str(Path(folder.name) / "run"),
        projection_dim=job.peer_side if side is None else side,
        projection_seed=job.seed,
        loss_reduction="mean",
    )
    processor = processor_for(config)  # keeps its projection matrices, as between two batches

    def run(batches: Sequence[PaddedBatch], clock: Clock) -> dict[str, Any]:
        with clock.paused():
            data, groups = _dataset(batches)
            # The loop leaves one number there, the count of tokens.
            Path(folder.name, config.partial_run_path.name).mkdir(exist_ok=True)
        collector = InMemoryCollector(
            model=model.base_model,
            data=data,
            cfg=config,
            processor=processor,
            target_modules=modules,
        )
        CollectorComputer(
            model, data, collector=collector, batches=groups, cfg=config
        ).run_with_collector_hooks()
        assert collector.builder is not None
        return {"values_per_row": collector.builder.grad_buffer.shape[1]}

    return run


def _lora(side: int | None) -> Make:
    def made(model: Any, job: Job) -> Run:
        settings = LoraConfig(
            r=job.lora_rank,
            lora_alpha=16,
            target_modules="all-linear",
            init_lora_weights=False,  # B is not zero: the gradients of A are not
            task_type="CAUSAL_LM",
        )
        adapted: Any = get_peft_model(model, settings).eval()
        return make(adapted, job, detect_peft_modules(adapted), side)

    return made


def _dataset(batches: Sequence[PaddedBatch]) -> tuple[Any, list[list[int]]]:
    """Unpadded ids and labels, and the batches as lists of their row numbers."""
    ids, labels, groups = [], [], []
    for batch in batches:
        groups.append(list(range(len(ids), len(ids) + len(batch.positions))))
        for row, length in enumerate(batch.lengths.tolist()):
            ids.append(batch.input_ids[row, :length].tolist())
            labels.append(batch.labels[row, :length].tolist())
    return Dataset.from_dict({"input_ids": ids, "labels": labels}), groups


if __name__ == "__main__":
    serve({"bergson": make, "bergson_lora": _lora(0), "bergson_lora_sketch": _lora(None)})
