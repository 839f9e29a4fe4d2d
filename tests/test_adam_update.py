"""AdamW's update by a single sample, and its projections, against torch and autograd by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradient_oracle import close, flat, oracle
from tiny_models import random_batch, tiny_model, with_lora

from influence.adam_update import adam_update
from influence.errors import InputError
from influence.gradients import attributed_layers
from influence.gradients.term import Formed
from influence.optimizer_state import AdamState
from influence.projection import layer_shapes, make_projection
from influence.update_engine import make_update_engine


def torch_update(
    gradient: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, **settings: Any
) -> torch.Tensor:
    """What torch's AdamW, in this state, moves by at a rate of 1."""
    moved = torch.nn.Parameter(torch.zeros_like(gradient))
    betas = (settings["beta1"], settings["beta2"])
    optimizer = torch.optim.AdamW(
        [moved], lr=1.0, betas=betas, eps=settings["eps"], weight_decay=0.0
    )
    optimizer.state[moved] = {
        "step": torch.tensor(float(settings["step"])),
        "exp_avg": exp_avg.clone(),
        "exp_avg_sq": exp_avg_sq.clone(),
    }
    moved.grad = gradient.clone()
    optimizer.step()
    return -moved.detach()


@pytest.mark.parametrize("step", [1, 3, 400])
def test_it_is_torchs_next_step(step: int) -> None:
    draw = torch.Generator().manual_seed(step)
    shape = (5, 7)
    gradient, exp_avg = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    exp_avg_sq = torch.rand(shape, generator=draw, dtype=torch.float64)
    gradient[0], exp_avg_sq[:, 0] = 0.0, 0.0  # what moves without a gradient, and had none before
    settings = {"step": step, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3}
    found = adam_update(gradient, exp_avg, exp_avg_sq, **settings)
    wanted = torch_update(gradient, exp_avg, exp_avg_sq, **settings)
    close(found, wanted, "a bias correction, eps or the order of the moments is not torch's", 1e-12)


def trained(architecture: str, kind: str) -> tuple[Any, list[Any], AdamState]:
    """A tiny model after three steps of AdamW on the attributed parameters, and its state."""
    model = tiny_model(architecture, torch.float64)
    model = with_lora(model) if kind == "lora" else model
    layers = attributed_layers(model, kind)
    named = {layer.name: layer.parameter for layer in layers}
    optimizer = torch.optim.AdamW(named.values(), lr=1e-2, betas=(0.8, 0.9), eps=1e-4)
    for parameter in named.values():
        parameter.requires_grad_(True)
    batch = random_batch(seed=5)
    for row, length in enumerate(batch.lengths.tolist()[:3]):
        optimizer.zero_grad()
        ids = batch.input_ids[row : row + 1, :length]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    for parameter in named.values():
        parameter.requires_grad_(False)
        parameter.grad = None
    states = {name: optimizer.state[p] for name, p in named.items()}
    state = AdamState(
        steps={name: int(each["step"]) for name, each in states.items()},
        beta1=0.8,
        beta2=0.9,
        eps=1e-4,
        exp_avg={name: each["exp_avg"] for name, each in states.items()},
        exp_avg_sq={name: each["exp_avg_sq"] for name, each in states.items()},
        weight_decay=dict.fromkeys(states, 0.0),
        learning_rate=1e-2,
    )
    return model, layers, state


def updates_of(model: Any, layers: list[Any], state: AdamState) -> dict[str, torch.Tensor]:
    """{layer: (b, out, in)}: torch's step by every sample alone, from its autograd gradient."""
    _losses, gradients = oracle(model, layers, random_batch())
    found = {}
    for layer in layers:
        moments = (state.exp_avg[layer.name], state.exp_avg_sq[layer.name])
        settings = {"step": state.steps[layer.name], "beta1": 0.8, "beta2": 0.9, "eps": 1e-4}
        first, second = (layer.shape.present(each) for each in moments)
        rows = [torch_update(g, first, second, **settings) for g in gradients[layer.name]]
        found[layer.name] = torch.stack(rows)
    return found


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("llama", "lora"), ("gpt2", "lora"), ("mixtral", "all"), ("llama", "linear")],
)
def test_whole_updates_are_torchs_steps_by_each_sample_alone(architecture: str, kind: str) -> None:
    model, layers, state = trained(architecture, kind)
    wanted = updates_of(model, layers, state)
    engine = make_update_engine(model, layers, state, "mean", None)
    found = engine(random_batch())
    close(found.vectors, flat(wanted), "not the update by the sample's own gradient", 1e-7)
    close(found.norm, flat(wanted).norm(dim=1), "norms are not those of the updates", 1e-7)
    norms = torch.stack([each.flatten(1).norm(dim=1) for each in wanted.values()], dim=1)
    close(found.layer_norms, norms, "norms by layer are not those of the updates", 1e-7)


@pytest.mark.parametrize("projection", ["srht", "rademacher", "countsketch", "kronecker"])
@pytest.mark.parametrize(("architecture", "kind"), [("llama", "lora"), ("mixtral", "all")])
def test_projected_updates_are_projections_of_the_whole_ones(
    architecture: str, kind: str, projection: str
) -> None:
    model, layers, state = trained(architecture, kind)
    updates = updates_of(model, layers, state)
    chosen = make_projection(
        projection, layer_shapes(layers), side=4, dim=64, seed=3, dtype=torch.float64
    )
    wanted = chosen.accumulator(4)
    for layer in layers:
        for row, update in enumerate(updates[layer.name]):
            for part, block in enumerate(update.unflatten(0, (layer.parts, -1))):
                of_row = torch.tensor([row])
                where = torch.tensor([part]) if layer.parts > 1 else None
                chosen.add_formed(layer.name, Formed(block.unsqueeze(0), of_row, where), wanted)
    found = make_update_engine(model, layers, state, "mean", chosen)(random_batch())
    close(found.vectors, wanted, "projected before the update was made, or a part is lost", 1e-7)
    close(found.norm, wanted.norm(dim=1), "cosines need the norms of what is kept", 1e-7)


def test_a_layer_that_was_not_trained_is_named() -> None:
    model, layers, state = trained("llama", "lora")
    name = layers[3].name
    for each in (state.exp_avg, state.exp_avg_sq):
        del each[name]
    with pytest.raises(InputError, match=f"no moments for 1 of .*{name}"):
        make_update_engine(model, layers, state, "mean", None)
