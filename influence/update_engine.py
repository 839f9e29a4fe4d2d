"""Per-sample AdamW updates of a model, projected or whole: what LESS compares with targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from influence.adam_update import LayerMoments
from influence.errors import InputError
from influence.gradients import SampleGradients, make_engine
from influence.gradients.layers import Layer
from influence.gradients.per_sample import block_layout
from influence.gradients.projected import Projection
from influence.gradients.updates import Flat, UpdateProjection
from influence.loss import Reduction, TokenBatch
from influence.optimizer_file import check_trained
from influence.optimizer_order import KEY
from influence.optimizer_state import AdamState


def layer_moments(state: AdamState, layers: Sequence[Layer]) -> dict[str, LayerMoments]:
    """The moments of every layer, presented as its gradient is, on the layer's device.

    Raises InputError naming the layers that the state has no moments of, or other shapes.
    """
    check_trained(layers, state.exp_avg_sq)
    found = {}
    for layer in layers:
        moments = state.exp_avg[layer.name], state.exp_avg_sq[layer.name]
        if any(each.shape != layer.parameter.shape for each in moments):
            raise InputError(
                f"{KEY}: expected moments of shape {tuple(layer.parameter.shape)} for "
                f"{layer.name}, got {[tuple(each.shape) for each in moments]}; load the state with "
                "this very model"
            )
        dtype = torch.promote_types(layer.parameter.dtype, torch.float32)
        device = layer.parameter.device
        first, second = (layer.shape.present(x.to(device, dtype)) for x in moments)
        found[layer.name] = LayerMoments(
            exp_avg=first,
            exp_avg_sq=second,
            step=state.steps[layer.name],
            beta1=state.beta1,
            beta2=state.beta2,
            eps=state.eps,
            parts=layer.parts,
        )
    return found


def make_update_engine(
    model: nn.Module,
    layers: Sequence[Layer],
    state: AdamState,
    reduction: Reduction,
    projection: Projection | None,
) -> Any:
    """A function from a batch to its samples' updates, as `make_engine`'s is to gradients.

    `vectors` are the projected updates, or with no projection the whole ones, whose norms by layer
    are there, too; norms are those of these vectors.

    Raises InputError as `layer_moments`.
    """
    inner = Flat(layers) if projection is None else projection
    updates = UpdateProjection(inner, layer_moments(state, layers))
    engine = make_engine(model, layers, reduction=reduction, projection=updates, exact_norms=False)
    if projection is not None:
        return engine
    blocks = block_layout(layers)

    def whole(batch: TokenBatch) -> SampleGradients:
        found = engine(batch)
        assert found.vectors is not None
        sizes = [block.shape[0] * block.shape[1] for block in blocks]
        norms = [
            torch.linalg.vector_norm(part, dim=1, dtype=torch.float64)
            for part in found.vectors.split(sizes, dim=1)
        ]
        found.layer_norms = torch.stack(norms, dim=1)
        return found

    return whole
