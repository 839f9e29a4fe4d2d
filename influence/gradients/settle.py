"""Every rule is tried against autograd before it is used, on a few random tokens.

A parameter that its module's parent reads, a norm that multiplies by a gate, a layer whose rows are
not in the order of the samples: what a rule supposes can be wrong in ways that no shape shows. So
each parameter's gradient, summed over a small batch, is compared with that of plain autograd. Where
they differ the layer is run sample by sample, from its own module up to its decoder block; if even
that differs, the parameter is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from influence.errors import InputError
from influence.gradients.backward import backpropagate, frozen
from influence.gradients.by_sample import BY_SAMPLE
from influence.gradients.contractions import wide
from influence.gradients.layers import Layer, Use, has_forward
from influence.gradients.rule import RowsError
from influence.gradients.term import OneHot, Term, wide_dtype
from influence.loss import response_forward, sample_losses

_PROBES = 3
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-3}
_HALF_TOLERANCE = 0.15
# (lengths of the rows): the second has as many rows as tokens, where shapes are ambiguous.
_BATCHES = ((7, 6, 4), (4, 4, 3, 4))
_ATTEMPTS = 24


@dataclass(frozen=True)
class Trial:
    """Random rows, padded on the right."""

    input_ids: Int[Tensor, "b t"]
    labels: Int[Tensor, "b t"]


def settled_layers(model: nn.Module, layers: Sequence[Layer]) -> tuple[list[Layer], list[str]]:
    """The layers with rules that agree with autograd, and notes on those that were changed.

    Takes a few forward and backward passes over some ten tokens; memory for one parameter's
    gradient at a time. Raises InputError naming the parameters whose gradients cannot be had.
    """
    current = {layer.name: layer for layer in layers}
    moved: dict[str, str] = {}
    for _attempt in range(_ATTEMPTS):
        wrong = _wrong(model, list(current.values()))
        if not wrong:
            return list(current.values()), _notes(moved)
        for name, why in _with_companions(wrong, current.values()).items():
            current[name] = _one_up(model, current[name], why)
            moved[name] = current[name].uses[0].path
    raise InputError(_refusal(list(wrong), "no module was found that can be run sample by sample"))


def _wrong(model: nn.Module, layers: Sequence[Layer]) -> dict[str, str]:
    """Names of the layers whose rule fails, and how; those that differ, or that cannot be cut."""
    for lengths in _BATCHES:
        trial = _trial(model, lengths)
        try:
            found = _by_rules(model, layers, trial)
        except RowsError as error:
            role = _role(_path(model, error.module))
            stuck = [x for x in layers if any(_role(use.path) == role for use in x.uses)]
            if not stuck:
                raise
            return {layer.name: str(error) for layer in stuck}
        expected, norms = _by_autograd(model, layers, trial)
        wrong = {}
        largest = max(norms.values(), default=0.0)
        for layer in layers:
            near = _TOLERANCE.get(layer.parameter.dtype, _HALF_TOLERANCE)
            size = norms[layer.name] + 1e-6 * largest
            error = float((found[layer.name] - expected[layer.name]).abs().max())
            if not error <= near * max(size, 1e-30) * 3:
                wrong[layer.name] = f"off by {error / max(size, 1e-30):.2g} of its size"
        if wrong:
            return wrong
    return {}


def _with_companions(wrong: Mapping[str, str], layers: Iterable[Layer]) -> dict[str, str]:
    """Also the layers whose rule takes the forward of a wrong one's module for itself."""
    whys: dict[int, str] = {}
    layers = list(layers)
    for layer in layers:
        if layer.name in wrong:
            whys |= {id(u.module): wrong[layer.name] for u in layer.uses if u.rule.replaces_forward}
    found = dict(wrong)
    for layer in layers:
        for use in layer.uses:
            if id(use.module) in whys and use.rule.replaces_forward:
                found.setdefault(layer.name, whys[id(use.module)])
    return found


def _one_up(model: nn.Module, layer: Layer, why: str) -> Layer:
    """The layer by autograd at its module, or at the next module above that has a forward."""
    use, *others = layer.uses
    if others:
        raise InputError(_refusal([layer.name], f"several modules share it, and it is {why}"))
    if use.rule is not BY_SAMPLE:
        return _moved(layer, use.path, use.module, use.own_name)
    parts = use.path.split(".")
    while len(parts) > 1:
        own, parts = parts[-1] + "." + use.own_name, parts[:-1]
        use = replace(use, own_name=own)
        module = model.get_submodule(".".join(parts))
        if has_forward(module):
            if _is_whole(model, module):
                break
            return _moved(layer, ".".join(parts), module, own)
    raise InputError(_refusal([layer.name], why))


def _moved(layer: Layer, path: str, module: nn.Module, own_name: str) -> Layer:
    shape = BY_SAMPLE.present(module)[own_name]
    return Layer(layer.name, layer.parameter, shape, (Use(module, own_name, BY_SAMPLE, path),))


def _is_whole(model: nn.Module, module: nn.Module) -> bool:
    """Whether the module holds the token embedding: it is the model, not a part of a block."""
    embedding = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    return any(each is embedding for each in module.modules())


def _trial(model: nn.Module, lengths: Sequence[int]) -> Trial:
    embedding = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    generator = torch.Generator().manual_seed(len(lengths))
    count = embedding.weight.shape[0]
    shape = (len(lengths), max(lengths))
    ids = torch.randint(min(3, count - 1), count, shape, generator=generator)
    labels = torch.full(shape, -100)
    for row, length in enumerate(lengths):
        # The first two rows' responses differ in length from the others'.
        start = max(1, length // 2 - (row % 2))
        labels[row, start:length] = ids[row, start:length]
    device = embedding.weight.device
    return Trial(ids.to(device), labels.to(device))


def _probes(layer: Layer) -> tuple[Float[Tensor, "k out"], Float[Tensor, "k in"]]:
    generator = torch.Generator().manual_seed(layer.size)
    dtype, device = wide_dtype(layer.parameter.dtype), layer.parameter.device
    u = torch.randn(_PROBES, layer.out_features, generator=generator, dtype=torch.float64)
    v = torch.randn(_PROBES, layer.in_features, generator=generator, dtype=torch.float64)
    return u.to(device, dtype), v.to(device, dtype)


def _by_rules(model: nn.Module, layers: Sequence[Layer], trial: Trial) -> dict[str, Tensor]:
    """u' G v of every layer's summed gradient, for a few random u and v, from its terms."""
    found = {layer.name: torch.zeros(_PROBES, dtype=torch.float64) for layer in layers}

    def consume(layer: Layer, terms: list[Term]) -> None:
        u, v = _probes(layer)
        for term in terms:
            found[layer.name] += _probed(wide(term), u, v, layer.parts).double().cpu()

    backpropagate(model, layers, trial, reduction="mean", consume=consume)
    return found


def _probed(term: Term, u: Tensor, v: Tensor, parts: int) -> Float[Tensor, " k"]:
    # A layer may compute in another precision than its parameter has (routers in float32).
    blocks, v = u.to(term.x).view(_PROBES, parts, -1), v.to(term.x)
    chosen = blocks[:, 0].unsqueeze(1) if term.part is None else blocks[:, term.part]
    if isinstance(term.d, OneHot):
        groups = len(term.d.index)
        index = term.d.index.unsqueeze(0).expand(_PROBES, -1, -1)
        left = chosen.expand(-1, groups, -1).gather(2, index)
    else:
        left = torch.einsum("gto,kgo->kgt", term.d, chosen.expand(-1, len(term.d), -1))
    right = torch.einsum("gti,ki->kgt", term.x, v)
    return (left * right).sum((1, 2))


def _by_autograd(
    model: nn.Module, layers: Sequence[Layer], trial: Trial
) -> tuple[dict[str, Tensor], Mapping[str, float]]:
    """The same numbers from plain gradients, and the gradients' norms."""
    expected = {layer.name: torch.zeros(_PROBES, dtype=torch.float64) for layer in layers}
    norms = dict.fromkeys(expected, 0.0)
    handles = []

    def collect(layer: Layer):
        def after(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            with torch.no_grad():
                u, v = _probes(layer)
                presented = layer.shape.present(gradient).to(u.dtype)
                expected[layer.name] = torch.einsum("ko,oi,ki->k", u, presented, v).double().cpu()
                norms[layer.name] = float(presented.norm())

        return after

    with frozen(model), torch.enable_grad():
        for layer in layers:
            layer.parameter.requires_grad_(True)
            handles.append(layer.parameter.register_post_accumulate_grad_hook(collect(layer)))
        try:
            logits, labels, sample = response_forward(model, trial)
            losses = sample_losses(logits, labels, sample, len(trial.input_ids), "mean")
            losses.sum().backward()
        finally:
            for handle in handles:
                handle.remove()
            for layer in layers:
                layer.parameter.requires_grad_(False)
                layer.parameter.grad = None
    return expected, norms


def _path(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, each in model.named_modules() if each is module)


def _role(path: str) -> str:
    """A module's path without its numbers: the same for all blocks and experts."""
    return re.sub(r"\d+", "*", path)


def _notes(moved: Mapping[str, str]) -> list[str]:
    """One line for every kind of module that is run sample by sample after all."""
    roles: dict[str, set[str]] = {}
    for name, path in moved.items():
        roles.setdefault(_role(path), set()).add(_role(name))
    return [
        f"gradients of {', '.join(sorted(names))} by autograd, running {role} sample by sample"
        for role, names in sorted(roles.items())
    ]


def _refusal(names: Sequence[str], why: str) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"gradients.parameters: the gradients of {shown} by sample do not agree with those of the "
        f"batch ({why}); leave them out by choosing others by name"
    )
