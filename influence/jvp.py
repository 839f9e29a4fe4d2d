"""JVP embeddings: how the first blocks' output moves along random directions of their parameters.

Influence Distillation (Nikdan et al., arXiv 2505.19051), section on JVP embeddings: the
forward-mode derivative of the hidden state of the last token after the first blocks, along a few
random tangents of those blocks' parameters, concatenated. The paper's tangents are standard normal
(`dense`). `rank1` draws each matrix's tangent as the outer product of two standard normal vectors
u and v: its entries have mean 0 and variance 1 too, hence the same expected squared Frobenius
norm, and its product with an activation x is (v . x) u, so that no tangent of the size of a weight
exists.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D

from influence.blocks import (
    Decoder,
    check_count,
    check_lengths,
    eager_experts,
    find_decoder,
    run_blocks_last,
)

Tangent = Literal["rank1", "dense"]
Embed = Callable[[Int[Tensor, "batch tokens"], Int[Tensor, " batch"]], Float[Tensor, "batch size"]]


@dataclass(frozen=True)
class LinearTangent:
    """Tangents of one linear layer, the first dimension counting the tangents.

    The weight's tangent (out x in) number k is the outer product of u[k] and v[k].
    """

    u: Float[Tensor, "tangents out"]
    v: Float[Tensor, "tangents in"]
    bias: Float[Tensor, "tangents out"] | None


@dataclass(frozen=True)
class Tangents:
    """linear: by the layer's full name, applied to its output; dense: by the parameter's."""

    linear: dict[str, LinearTangent] = field(default_factory=dict)
    dense: dict[str, Float[Tensor, "tangents ..."]] = field(default_factory=dict)


def draw_tangents(
    model: nn.Module, *, blocks: int, tangents: int, tangent: Tangent, seed: int
) -> Tangents:
    """Random tangents of every floating-point parameter of the first `blocks` decoder blocks.

    Each entry has mean 0 and variance 1. The numbers depend on the seed, the parameter's name and
    the tangent's number alone: every replica and device draws the same. A `rank1` matrix that is
    not the weight of a plain linear layer (an expert tensor, the last two dimensions a matrix) gets
    its outer product as a dense tangent; vectors always get standard normal ones.
    """
    decoder = find_decoder(model)
    check_count(decoder, blocks)
    if tangents < 1:
        raise ValueError(f"tangents: expected at least 1, got {tangents}")
    if tangent not in ("rank1", "dense"):
        raise ValueError(f"tangent: expected 'rank1' or 'dense', got {tangent!r}")

    drawn = Tangents()
    # A parameter that several modules share has one name, and so one tangent.
    names = {id(p): name for name, p in model.named_parameters()}
    taken: set[int] = set()
    if tangent == "rank1":
        for layer_name, layer in _plain_linears(decoder, blocks):
            u, v = _factors(layer.weight, seed, names[id(layer.weight)], tangents)
            u, v = u.squeeze(-1), v.squeeze(-2)
            if isinstance(layer, Conv1D):  # stored as (in, out)
                u, v = v, u
            bias = layer.bias
            b = None if bias is None else _normal(bias, seed, names[id(bias)], tangents)
            drawn.linear[layer_name] = LinearTangent(u, v, b)
            taken.update(id(p) for p in layer.parameters(recurse=False))
    for index in range(blocks):
        for parameter in decoder.blocks[index].parameters():
            if id(parameter) in taken or not parameter.is_floating_point():
                continue
            name = names[id(parameter)]
            if tangent == "rank1" and parameter.dim() >= 2:
                u, v = _factors(parameter, seed, name, tangents)
                drawn.dense[name] = u * v
            else:
                drawn.dense[name] = _normal(parameter, seed, name, tangents)
    return drawn


def make_jvp_embedder(
    model: nn.Module,
    *,
    blocks: int,
    tangents: int,
    tangent: Tangent,
    seed: int,
    final_norm: bool = True,
) -> Embed:
    """A function of (token ids padded on the right, lengths) that returns JVP embeddings.

    Row i is the derivative of the hidden state at sample i's last real token after the first
    `blocks` blocks, then (`final_norm`) through the model's final norm, along `tangents` random
    directions of all parameters of those blocks, one after the other: tangents * hidden_size
    numbers, float64 for a float64 model and float32 otherwise. All tangents share one forward
    pass of the values. The directions are drawn here, once; the model is left as it was.

    Raises InputError for a model without decoder blocks or a `blocks` it does not have.
    """
    decoder = find_decoder(model)
    drawn = draw_tangents(model, blocks=blocks, tangents=tangents, tangent=tangent, seed=seed)
    flat, rebuild = _flatten(drawn)

    def embed(
        input_ids: Int[Tensor, "batch tokens"], lengths: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch size"]:
        def directional(one: Tangents) -> Float[Tensor, "batch hidden"]:
            return _directional(
                model, decoder, input_ids, lengths, one, count=blocks, final_norm=final_norm
            )

        check_lengths(input_ids, lengths)
        # Fused attention kernels have no forward-mode derivative.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), eager_experts(model):
            derivative = torch.vmap(lambda *tensors: directional(rebuild(tensors)))(*flat)  # pyright: ignore[reportArgumentType]
        embedding = derivative.transpose(0, 1).flatten(1)
        return embedding if embedding.dtype == torch.float64 else embedding.float()

    return embed


def _directional(
    model: nn.Module,
    decoder: Decoder,
    input_ids: Int[Tensor, "batch tokens"],
    lengths: Int[Tensor, " batch"],
    tangents: Tangents,
    *,
    count: int,
    final_norm: bool,
) -> Float[Tensor, "batch hidden"]:
    """The derivative along one tangent (no leading dimension in `tangents`; runs under vmap)."""
    parameters = dict(model.named_parameters())
    # jvp wants an input of its own; the hooks' tangents enter on the way.
    zero = torch.zeros((), device=input_ids.device)

    def last_hidden(_: Tensor, moved: dict[str, Tensor]) -> Float[Tensor, "batch hidden"]:
        with _linear_hooks(model, tangents.linear):
            return run_blocks_last(model, decoder, input_ids, lengths, count, final_norm, moved)

    values = {name: parameters[name].detach() for name in tangents.dense}
    return torch.func.jvp(last_hidden, (zero, values), (zero, tangents.dense))[1]


@contextmanager
def _linear_hooks(model: nn.Module, tangents: Mapping[str, LinearTangent]) -> Iterator[None]:
    """Add the effect of the layers' parameter tangents to the tangents of their outputs."""

    modules = dict(model.named_modules())
    handles = []
    for name, tangent in tangents.items():
        take, add = _linear_hook_pair(tangent)
        handles.append(modules[name].register_forward_pre_hook(take))
        handles.append(modules[name].register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _linear_hook_pair(tangent: LinearTangent):
    """Hooks for before and after a layer that runs on the values alone.

    They carry the tangents by the product rule: W dx + (v . x) u + db, in one buffer.
    """
    inputs: list[tuple[Tensor, Tensor | None]] = []

    def take(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        dual = forward_ad.unpack_dual(args[0])
        inputs.append((dual.primal, dual.tangent))
        return dual.primal, *args[1:]

    def add(module: nn.Linear | Conv1D, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        value, carried = inputs.pop()
        along = (value @ tangent.v).unsqueeze(-1)
        if carried is None:
            total = along * tangent.u
        else:
            weight = module.weight.detach()
            total = carried @ (weight if isinstance(module, Conv1D) else weight.T)
            total = torch.addcmul(total, along, tangent.u)
        if tangent.bias is not None:
            total = total + tangent.bias
        # A dual made from a view would copy its tangent once more.
        value = torch.ops.aten._unsafe_view(output, output.shape)
        return forward_ad.make_dual(value, total)

    return take, add


def _plain_linears(decoder: Decoder, blocks: int) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    """Linear layers of the first blocks by full name, where the output is x W' + b."""
    for index in range(blocks):
        for name, module in decoder.blocks[index].named_modules():
            # A subclass with a forward of its own (a router, a quantised layer) may do otherwise.
            plain = type(module).forward in (nn.Linear.forward, Conv1D.forward)
            if isinstance(module, nn.Linear | Conv1D) and plain:
                yield f"{decoder.block_prefix}.{index}.{name}", module


def _flatten(
    tangents: Tangents,
) -> tuple[list[Tensor], Callable[[tuple[Tensor, ...]], Tangents]]:
    """All tensors of `tangents` in a list, and the way back (for vmap, which takes tensors)."""
    flat: list[Tensor] = []
    for one in tangents.linear.values():
        flat.extend([one.u, one.v] if one.bias is None else [one.u, one.v, one.bias])
    flat.extend(tangents.dense.values())

    def rebuild(tensors: tuple[Tensor, ...]) -> Tangents:
        left = iter(tensors)
        linear = {
            name: LinearTangent(next(left), next(left), None if t.bias is None else next(left))
            for name, t in tangents.linear.items()
        }
        return Tangents(linear, {name: next(left) for name in tangents.dense})

    return flat, rebuild


def _factors(
    parameter: Tensor, seed: int, name: str, tangents: int
) -> tuple[Float[Tensor, "tangents ... rows 1"], Float[Tensor, "tangents ... 1 columns"]]:
    """Standard normal factors whose outer product is a tangent of the matrix (or stack of them)."""
    *stack, rows, columns = parameter.shape
    u = _normal(parameter, seed, f"{name}:u", tangents, (*stack, rows, 1))
    v = _normal(parameter, seed, f"{name}:v", tangents, (*stack, 1, columns))
    return u, v


def _normal(
    parameter: Tensor, seed: int, name: str, tangents: int, shape: tuple[int, ...] | None = None
) -> Float[Tensor, "tangents ..."]:
    """Standard normal numbers of the parameter's dtype and device, drawn on the CPU."""
    draws = []
    for index in range(tangents):
        digest = hashlib.blake2b(f"{seed}\0{name}\0{index}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        draw = torch.randn(
            shape or tuple(parameter.shape), generator=generator, dtype=torch.float64
        )
        draws.append(draw.to(parameter.dtype))
    return torch.stack(draws).to(parameter.device)
