"""The rows of gradients.py that run in this interpreter: name -> a function that makes its run.

Linear parameters are the attributed ones everywhere: the matrices inside the decoder blocks. Losses
are the mean cross-entropy of a row's response tokens unless said otherwise; the model is in eval
mode, without an attention mask (padding is on the right) and without an optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from gradients_dense import DenseProjection
from gradients_protocol import IGNORED, Clock, Job, Make, PaddedBatch, Run, split_batch
from jaxtyping import Float, Int
from peft import get_peft_model
from torch import Tensor, nn

from influence.blocks import find_decoder, run_blocks
from influence.finetune import lora_config
from influence.finetune_settings import FinetuneSettings
from influence.gradients import Layer, attributed_layers, make_engine
from influence.jvp import Embed, Tangent, make_jvp_embedder
from influence.loss import response_forward, sample_losses
from influence.pooling import make_rds_embedder
from influence.projection import layer_shapes, make_projection

Ids = Int[Tensor, " t"]
Step = Callable[[PaddedBatch], Any]


def full_logits_loss(model: Any, batch: PaddedBatch) -> Float[Tensor, ""]:
    """Cross-entropy summed over response tokens, from logits at every position."""
    logits = model(input_ids=batch.input_ids, use_cache=False).logits
    shifted = logits[:, :-1].float().flatten(0, 1)
    return F.cross_entropy(
        shifted, batch.labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def response_logits_loss(model: nn.Module, batch: PaddedBatch) -> Float[Tensor, ""]:
    """The sum of the rows' mean losses, from logits at the response positions alone."""
    logits, labels, sample = response_forward(model, batch)
    return sample_losses(logits, labels, sample, len(batch.positions), "mean").sum()


def trains(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Only these parameters require gradients."""
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)


def _each(step: Step) -> Run:
    def run(batches: Sequence[PaddedBatch], _clock: Clock) -> dict[str, Any]:
        for batch in batches:
            step(batch)
        return {}

    return run


def _weight_gradients(loss: Callable[[Any, PaddedBatch], Tensor]) -> Make:
    """Forward and backward with the gradients of the linear parameters, summed over rows."""

    def make(model: Any, _job: Job) -> Run:
        weights = [layer.parameter for layer in attributed_layers(model, "linear")]
        trains(model, weights)

        def step(batch: PaddedBatch) -> None:
            loss(model, batch).backward()
            for weight in weights:
                weight.grad = None

        return _each(step)

    return make


def _activation_gradients(loss: Callable[[Any, PaddedBatch], Tensor]) -> Make:
    """The same with all parameters frozen; the graph starts at the embeddings' output."""

    def make(model: Any, _job: Job) -> Run:
        trains(model, [])

        def differentiable(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
            return output.detach().requires_grad_(True)

        find_decoder(model).embedding.register_forward_hook(differentiable)
        return _each(lambda batch: loss(model, batch).backward())

    return make


def _forward(model: Any, _job: Job) -> Run:
    @torch.no_grad()
    def step(batch: PaddedBatch) -> None:
        model(input_ids=batch.input_ids, use_cache=False)

    return _each(step)


def _forward_blocks(model: Any, job: Job) -> Run:
    decoder = find_decoder(model)

    @torch.no_grad()
    def step(batch: PaddedBatch) -> None:
        run_blocks(model, decoder, batch.input_ids, job.blocks, through_norm=False)

    return _each(step)


def _ours(kind: str, *, exact_norms: bool = False) -> Make:
    """The engine: projected gradients and their norms, copied to the host."""

    def make(model: Any, job: Job) -> Run:
        layers = attributed_layers(model, "linear")
        projection = make_projection(
            kind,
            layer_shapes(layers),
            side=job.side,
            dim=job.dim,
            seed=job.seed,
            device=job.device,
        )
        engine = make_engine(
            model, layers, reduction="mean", projection=projection, exact_norms=exact_norms
        )
        return _sample_vectors(lambda batch: engine(batch).vectors)

    return make


def with_lora(model: Any, job: Job) -> nn.Module:
    """The model with random LoRA factors of the job's rank on its linear layers."""
    wrapped: Any = get_peft_model(model, lora_config(FinetuneSettings(rank=job.lora_rank)))
    wrapped.eval()
    # The inner model has get_output_embeddings; its linear layers carry the adapter.
    adapted = wrapped.get_base_model()
    generator = torch.Generator().manual_seed(job.seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # zero at first, and with it the gradient of A
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    return adapted


def _ours_lora(model: Any, job: Job) -> Run:
    adapted = with_lora(model, job)
    engine = make_engine(adapted, attributed_layers(adapted, "lora"), reduction="mean", full=True)
    return _sample_vectors(lambda batch: engine(batch).vectors)


def _lora_training_step(model: Any, job: Job) -> Run:
    """Forward and backward with the gradients of the LoRA factors, response logits."""
    adapted = with_lora(model, job)
    factors = [layer.parameter for layer in attributed_layers(adapted, "lora")]
    trains(adapted, factors)

    def step(batch: PaddedBatch) -> None:
        response_logits_loss(adapted, batch).backward()
        for factor in factors:
            factor.grad = None

    return _each(step)


def _sample_vectors(vectors: Callable[[PaddedBatch], Tensor | None]) -> Run:
    """Vectors of every row, brought to the host as a user of them would."""

    def run(batches: Sequence[PaddedBatch], _clock: Clock) -> dict[str, Any]:
        width = 0
        for batch in batches:
            found = vectors(batch)
            assert found is not None
            width = found.cpu().shape[1]
        return {"values_per_row": width}

    return run


def row_gradient(
    model: nn.Module, weights: Sequence[nn.Parameter], batch: PaddedBatch
) -> Float[Tensor, "1 size"]:
    """The flattened gradient of a batch of one row."""
    found = torch.autograd.grad(response_logits_loss(model, batch), weights)
    return torch.cat([gradient.flatten() for gradient in found]).unsqueeze(0)


def _batch_of_one(model: Any, job: Job) -> Run:
    """Plain autograd, a row at a time; the dense projection's time is counted apart."""
    weights = [layer.parameter for layer in attributed_layers(model, "linear")]
    trains(model, weights)
    dense = DenseProjection(job.dim, job.seed)

    def run(batches: Sequence[PaddedBatch], clock: Clock) -> dict[str, Any]:
        dense.reset()
        for batch in batches:
            for one in split_batch(batch, 1):
                flat = row_gradient(model, weights, one)
                with clock.paused():
                    dense.measure(flat, clock)
        return dense.answer()

    return run


def vmap_gradients(
    model: Any, layers: Sequence[Layer]
) -> Callable[[PaddedBatch], Float[Tensor, "b size"]]:
    """A function that gives a batch's flat gradients by torch.func's vmap over grad."""
    weights = {layer.name: layer.parameter.detach() for layer in layers}

    def loss(chosen: dict[str, Tensor], ids: Ids, labels: Ids) -> Tensor:
        call = {"input_ids": ids.unsqueeze(0), "use_cache": False}
        logits = torch.func.functional_call(model, chosen, (), call).logits[0, :-1]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        total = F.cross_entropy(wide, labels[1:], ignore_index=IGNORED, reduction="sum")
        return total / (labels[1:] != IGNORED).sum()

    gradients = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def flat(batch: PaddedBatch) -> Float[Tensor, "b size"]:
        found = gradients(weights, batch.input_ids, batch.labels)
        return torch.cat([found.pop(name).flatten(1) for name in list(found)], dim=1)

    return flat


def _vmap(model: Any, job: Job) -> Run:
    """torch.func's vmap over grad; the dense projection's time is counted apart.

    Every row of a padded batch has its own copy of the gradients, so a batch has no more rows than
    the job's gradient_bytes hold. Logits are full: which positions are response differs by row.
    """
    layers = attributed_layers(model, "linear")
    trains(model, [])
    gradients = vmap_gradients(model, layers)
    size = sum(layer.size * layer.parameter.element_size() for layer in layers)
    limit = max(1, int(job.gradient_bytes / size))
    dense = DenseProjection(job.dim, job.seed)

    def run(batches: Sequence[PaddedBatch], clock: Clock) -> dict[str, Any]:
        dense.reset()
        for batch in batches:
            for part in split_batch(batch, limit):
                flat = gradients(part)
                with clock.paused():
                    dense.measure(flat, clock)
                del flat
        return {**dense.answer(), "rows_per_batch_limit": limit}

    return run


def _embeddings(make: Callable[[Any, Job], Embed]) -> Make:
    def made(model: Any, job: Job) -> Run:
        embed = make(model, job)
        return _sample_vectors(lambda batch: embed(batch.input_ids, batch.lengths))

    return made


def _jvp(tangent: Tangent) -> Make:
    return _embeddings(
        lambda model, job: make_jvp_embedder(
            model, blocks=job.blocks, tangents=job.tangents, tangent=tangent, seed=job.seed
        )
    )


METHODS: dict[str, Make] = {
    "training_step": _weight_gradients(full_logits_loss),
    "activation_backward": _activation_gradients(full_logits_loss),
    "training_step_response_logits": _weight_gradients(response_logits_loss),
    "activation_backward_response_logits": _activation_gradients(response_logits_loss),
    "forward": _forward,
    "forward_blocks": _forward_blocks,
    "ours_kronecker": _ours("kronecker"),
    "ours_kronecker_exact_norms": _ours("kronecker", exact_norms=True),
    "ours_lora": _ours_lora,
    "ours_srht": _ours("srht"),
    "batch_of_one": _batch_of_one,
    "vmap": _vmap,
    "jvp_dense": _jvp("dense"),
    "jvp_rank1": _jvp("rank1"),
    "rds_forward": _embeddings(lambda model, _job: make_rds_embedder(model)),
    "lora_training_step": _lora_training_step,
}
