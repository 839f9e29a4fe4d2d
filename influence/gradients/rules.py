"""Which rule a module's own parameters come under."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from influence.gradients.by_sample import BY_SAMPLE
from influence.gradients.conv1d import CONV1D
from influence.gradients.dora import DORA
from influence.gradients.embedding import EMBEDDING, SCALES
from influence.gradients.experts import EXPERTS, is_experts
from influence.gradients.linear import LINEAR, own_parameters
from influence.gradients.norm import NORM, is_norm
from influence.gradients.rule import Rule, swapped_parameters

RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: LINEAR,
    Conv1D: CONV1D,
    nn.Embedding: EMBEDDING,
    nn.LayerNorm: NORM,
}
"""Rules by exact type: a subclass may compute something else in its forward."""


def rule_of(module: nn.Module) -> Rule:
    """The rule for the parameters that `module` itself owns; exact autograd where there is none."""
    rule = RULES.get(type(module))
    if rule is EMBEDDING and (module.scale_grad_by_freq or module.max_norm is not None):
        return BY_SAMPLE
    if rule is not None:
        return rule
    if is_experts(module):
        return EXPERTS
    if _is_dora(module):
        return DORA
    if is_norm(module):
        return NORM
    if _is_scaled_embedding(module):
        return EMBEDDING
    if _is_linear_map(module):
        return LINEAR
    return BY_SAMPLE


def _is_dora(module: nn.Module) -> bool:
    from peft.tuners.lora.dora import DoraLinearLayer

    return type(module) is DoraLinearLayer


def _is_scaled_embedding(module: nn.Module) -> bool:
    """Whether it looks up rows and multiplies them by a factor that it keeps (see `SCALES`)."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    scale = next((getattr(module, name) for name in SCALES if hasattr(module, name)), None)
    if scale is None or module.weight.is_meta:
        return scale is not None
    ids = torch.arange(min(3, module.num_embeddings), device=module.weight.device)
    with torch.no_grad():
        return bool(torch.allclose(module(ids), module.weight[ids] * scale, rtol=1e-2))


def _is_linear_map(module: nn.Module) -> bool:
    """Whether the first output is x W' + b and the only way from the parameters to the outputs.

    So it is with the routers of experts, which return their scores beside the logits. Shown by a
    trial: the weight's gradient through all outputs is that through the first one alone.
    """
    own = own_parameters(module)
    weight = own.get("weight")
    if weight is None or weight.ndim != 2 or set(own) > {"weight", "bias"}:
        return False
    if any(module.children()) or not weight.is_floating_point():
        return False
    if weight.is_meta:
        return type(module).__name__.endswith("Router")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, weight.shape[1], generator=generator).to(weight)
    leaves = {name: p.detach().requires_grad_(True) for name, p in own.items()}
    try:
        with torch.enable_grad(), swapped_parameters(module, leaves):
            outputs = module.forward(x)
    except (TypeError, RuntimeError, ValueError, IndexError):
        return False
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    first = tensors[0]
    expected = F.linear(x, weight, own.get("bias"))
    if not isinstance(first, Tensor) or first.shape != expected.shape:
        return False
    rough = 2e-2 if weight.dtype in (torch.float16, torch.bfloat16) else 1e-5
    # Routers compute in float32 whatever the model's precision is.
    if not torch.allclose(first.double(), expected.double(), rtol=rough, atol=rough):
        return False
    moving = [t for t in tensors if isinstance(t, Tensor) and t.requires_grad]
    loss = sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in moving)
    assert isinstance(loss, Tensor)
    d, found = torch.autograd.grad(loss, (first, leaves["weight"]))
    expected = d.double().mT @ x.double()
    return torch.allclose(
        found.double(), expected, rtol=rough, atol=rough * float(expected.abs().max())
    )
