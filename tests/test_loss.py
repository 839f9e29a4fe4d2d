from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import ARCHITECTURES, random_batch, tiny_model

from influence.errors import InputError
from influence.loss import response_forward, sample_losses


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_response_logits_are_the_full_logits_at_those_positions(architecture):
    model, batch = tiny_model(architecture), random_batch()
    logits, labels, sample_index = response_forward(model, batch)
    with torch.no_grad():
        full = model(input_ids=batch.input_ids, use_cache=False).logits
    expected, tokens, owners = [], [], []
    for row in range(len(batch.lengths)):
        for t in range(1, batch.input_ids.shape[1]):
            if batch.labels[row, t] != -100:
                expected.append(full[row, t - 1])
                tokens.append(int(batch.labels[row, t]))
                owners.append(row)
    torch.testing.assert_close(
        logits,
        torch.stack(expected),
        rtol=1e-10,
        atol=1e-12,
        msg="shifted by one, or what follows the head (soft cap, scaling) was lost",
    )
    assert labels.tolist() == tokens, "labels do not belong to the gathered positions"
    assert sample_index.tolist() == owners, "rows of the logits assigned to the wrong samples"


def test_soft_cap_is_what_makes_gemma2_logits_differ():
    logits, _labels, _index = response_forward(tiny_model("gemma2"), random_batch())
    assert logits.abs().max() < 3.0, "final soft cap not applied to the gathered logits"


def test_padding_changes_no_logit():
    model, batch = tiny_model("mistral"), random_batch((6, 14))
    together = response_forward(model, batch)
    batch.input_ids, batch.labels = batch.input_ids[:1, :6], batch.labels[:1, :6]
    alone = response_forward(model, batch)
    torch.testing.assert_close(
        together[0][together[2] == 0], alone[0], rtol=1e-10, atol=1e-12, msg="padding leaks in"
    )


@pytest.mark.parametrize(("reduction", "power"), [("mean", 1.0), ("sum", 0.0), ("sqrt", 0.5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_reductions_match_a_loop(reduction, power, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(11, 17, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(17, (11,), generator=generator)
    owners = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3])
    losses = sample_losses(logits, labels, owners, 4, reduction)
    for sample in range(4):
        mine = (owners == sample).nonzero().flatten().tolist()
        total = sum(-F.log_softmax(logits[k].double(), 0)[labels[k]] for k in mine)
        expected = float(total) / len(mine) ** power
        assert float(losses[sample]) == pytest.approx(expected, rel=1e-6), (
            "reduced by the wrong number of tokens, or computed in half precision"
        )


def test_unknown_reduction_names_the_key():
    with pytest.raises(InputError, match=r"gradients\.reduction.*mean, sum, sqrt"):
        sample_losses(torch.zeros(1, 3), torch.zeros(1).long(), torch.zeros(1).long(), 1, "avg")


def test_row_without_response_is_named():
    batch = random_batch()
    batch.labels[2, 1:] = -100
    with pytest.raises(InputError, match=r"\[2\]"):
        response_forward(tiny_model("llama"), batch)


def test_head_keeps_no_hook():
    model, batch = tiny_model("llama"), random_batch()
    response_forward(model, batch)
    full = model(input_ids=batch.input_ids).logits
    assert full.shape[:2] == batch.input_ids.shape, "the gathering hook stayed on the head"
