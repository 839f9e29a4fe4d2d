"""The rows of dattri in gradients.py; run by the interpreter of an environment with dattri.

`dattri`: timed is AttributionTask's vmap(grad) of the loss over a padded batch, for the decoder
blocks' matrices, one flat gradient a layer and row (layer_split). TRAKAttributor takes all layers
in one flat tensor (layer_name): the backward pass of each of its slices then fills a tensor of the
whole size, out of reach for 200 layers of 1e8 numbers together on a CPU. Its random_project cannot
be timed whole on a CPU: there it keeps a (size, 100) matrix, 42 GB for 1e8 parameters, and draws it
anew for every 100 of the dim columns. It is timed apart, on the first SLICE numbers of the
gradients, and taken to cost the same for the others (projection_seconds).

`dattri_logra`: the loop of its LoGraAttributor.cache (HookManager and its compressors, no Hessian):
forward, backward and two-sided projections to peer_side x peer_side numbers a layer.

The loss is a row's mean over response tokens, from logits at all positions.

    PYTHON gradients_peer_dattri.py dattri|dattri_logra JOB.json
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from dattri.algorithm.logra import LoGraAttributor  # pyright: ignore
from dattri.func.projection import random_project  # pyright: ignore
from dattri.task import AttributionTask  # pyright: ignore
from gradients_protocol import (
    IGNORED,
    Clock,
    Job,
    PaddedBatch,
    Run,
    serve,
    split_batch,
)
from torch import Tensor, nn

SLICE = 4096
PROJECTED_AT_ONCE = 32


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each row's response tokens."""
    shifted = labels[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), shifted, ignore_index=IGNORED, reduction="none"
    )
    return losses.sum(dim=1) / (shifted != IGNORED).sum(dim=1)


def linear_layers(model: Any) -> list[str]:
    """The linear layers inside the decoder blocks."""
    head = model.get_output_embeddings()
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]


def make_vmap(model: Any, job: Job) -> Run:
    """TRAK's gradients; see the module."""
    wanted = {f"{name}.weight" for name in linear_layers(model)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)

    def loss(parameters: Any, data: Any) -> Tensor:
        ids, labels = data
        call = {"input_ids": ids.unsqueeze(0), "use_cache": False}
        logits = torch.func.functional_call(model, parameters, (), call).logits
        return row_losses(logits, labels.unsqueeze(0)).squeeze(0)

    task = AttributionTask(loss, model, {}, checkpoints_load_func=lambda same, _state: same)
    gradients = task.get_grad_loss_func(in_dims=(None, 0))
    parameters, _ = task.get_param(ckpt_idx=0, layer_split=True)
    parameters = tuple(each.detach() for each in parameters)
    width = sum(each.numel() for each in parameters)
    size = width * parameters[0].element_size()
    limit = max(1, int(job.gradient_bytes / size))

    def run(batches: Sequence[PaddedBatch], clock: Clock) -> dict[str, Any]:
        projection = 0.0
        for batch in batches:
            for part in split_batch(batch, limit):
                found = gradients(parameters, (part.input_ids, part.labels))
                with clock.paused():
                    part_seconds = _projection_seconds(found[0], job, clock)
                    projection += part_seconds * width
                del found
        return {
            "projection_seconds": projection,
            "projection_measured_share": min(SLICE, parameters[0].numel()) / width,
            "values_per_row": job.dim,
            "rows_per_batch_limit": limit,
        }

    return run


def _projection_seconds(gradients: Tensor, job: Job, clock: Clock) -> float:
    """Seconds of random_project for each number of the width, on the first SLICE of a layer."""
    part = gradients[:, :SLICE].contiguous()
    clock.synchronize()
    begin = time.perf_counter()
    random_project(
        part, len(part), job.dim, PROJECTED_AT_ONCE, job.seed, "rademacher", device=job.device
    )(part)
    clock.synchronize()
    return (time.perf_counter() - begin) / part.shape[1]


def make_logra(model: Any, job: Job) -> Run:
    """LoGra's projected gradients; see the module."""
    model.requires_grad_(False)
    # So that a backward pass reaches the first layer; its hooks leave out the weights' gradients.
    model.get_input_embeddings().register_forward_hook(
        lambda _module, _args, output: output.detach().requires_grad_(True)
    )

    def loss(model: Any, batch: PaddedBatch, _device: str) -> Tensor:
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
        return row_losses(logits, batch.labels).sum()

    task = AttributionTask(loss, model, {}, checkpoints_load_func=lambda same, _state: same)
    attributor = LoGraAttributor(
        task,
        layer_names=linear_layers(model),
        hessian="Identity",
        device=job.device,
        proj_dim=job.peer_side**2,
        offload="none",
    )
    hooks: list[Any] = []

    def run(batches: Sequence[PaddedBatch], clock: Clock) -> dict[str, Any]:
        if not hooks:
            with clock.paused():
                hooks.append(_hooked(attributor, batches[-1].input_ids))
        width = 0
        for batch in batches:
            model.zero_grad()
            loss(model, batch, job.device).backward()
            found = torch.cat([each.cpu() for each in hooks[0].get_compressed_grads()], dim=1)
            width = found.shape[1]
        return {"values_per_row": width}

    return run


def _hooked(attributor: Any, sample: Tensor) -> Any:
    """The attributor's hooks with its compressors, set up on a sample as its cache() does."""
    from dattri.algorithm.block_projected_if.core.hook import HookManager  # pyright: ignore

    attributor._setup_compressors([{"input_ids": sample}])
    hooks = HookManager(attributor.model, attributor.layer_names, device=attributor.device)
    hooks.set_compressors(attributor.compressors)
    return hooks


if __name__ == "__main__":
    serve({"dattri": make_vmap, "dattri_logra": make_logra})
