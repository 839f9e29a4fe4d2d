from __future__ import annotations

import pytest
import torch
from tiny_models import ARCHITECTURES, random_batch, rows_of, tiny_model, with_lora

from influence.blocks import find_decoder
from influence.embeddings import EMBEDDINGS, make_embedder
from influence.errors import InputError
from influence.jvp import make_jvp_embedder
from influence.pooling import make_hidden_embedder, make_rds_embedder, position_weighted_mean
from influence.projection import rademacher_projection

OPTIONS = {"blocks": 2, "tangents": 2, "tangent": "rank1", "seed": 1}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rds_is_the_position_weighted_mean_of_the_last_hidden_states(architecture):
    model, batch = tiny_model(architecture), random_batch()
    embedding = make_rds_embedder(model)(batch.input_ids, batch.lengths)
    for row, length in enumerate(batch.lengths.tolist()):
        ids = batch.input_ids[row : row + 1, :length]
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states[-1][0]
        total = torch.zeros(32, dtype=torch.float64)
        for i in range(1, length + 1):
            total += i * hidden[i - 1]
        torch.testing.assert_close(
            embedding[row],
            total / (length * (length + 1) / 2),
            # The norms compute in float32.
            rtol=1e-5,
            atol=1e-6,
            msg="weights count from 0, padding is included, or the final norm is missing",
        )


def test_position_weights():
    hidden = torch.tensor([[[6.0], [12.0], [18.0], [99.0]], [[5.0], [99.0], [99.0], [99.0]]])
    pooled = position_weighted_mean(hidden, torch.tensor([3, 1]))
    expected = torch.tensor([[(6 + 24 + 54) / 6], [5.0]])
    torch.testing.assert_close(pooled, expected, rtol=1e-6, atol=0, msg="weights are not t / sum")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_is_the_normed_state_of_the_last_token(architecture):
    model, batch = tiny_model(architecture), random_batch()
    norm = find_decoder(model).final_norm
    embedding = make_hidden_embedder(model, blocks=2)(batch.input_ids, batch.lengths)
    for row, length in enumerate(batch.lengths.tolist()):
        ids = batch.input_ids[row : row + 1, :length]
        with torch.no_grad():
            state = model(ids, output_hidden_states=True, use_cache=False).hidden_states[2]
            expected = norm(state[0, -1])
        torch.testing.assert_close(
            embedding[row],
            expected,
            rtol=1e-5,
            atol=1e-6,
            msg="another block's or another token's state, or no norm",
        )


@pytest.mark.parametrize("kind", sorted(EMBEDDINGS))
def test_registry_makes_the_named_embedding_and_projects_only_what_is_longer(kind):
    model, batch = with_lora(tiny_model("llama")), random_batch()
    raw = {
        "jvp": make_jvp_embedder(model, **OPTIONS),
        "hidden": make_hidden_embedder(model, blocks=2),
        "rds": make_rds_embedder(model),
    }[kind](batch.input_ids, batch.lengths)
    size = {"jvp": 64, "hidden": 32, "rds": 32}[kind]

    whole = make_embedder(model, kind, dim=size, **OPTIONS)
    assert whole.dim == size
    values = whole.embed(batch.input_ids, batch.lengths)
    assert torch.equal(values, raw), "another embedding than the one named, or projected in vain"

    short = make_embedder(model, kind, dim=size - 1, **OPTIONS)
    assert short.dim == size - 1
    values = short.embed(batch.input_ids, batch.lengths)
    torch.testing.assert_close(
        values,
        rademacher_projection(raw, size - 1, OPTIONS["seed"]),
        rtol=1e-12,
        atol=1e-12,
        msg="the projection is not the seeded one",
    )
    parts = [rows_of(batch, [0, 1]), rows_of(batch, [2, 3])]
    torch.testing.assert_close(
        torch.cat([short.embed(part.input_ids, part.lengths) for part in parts]),
        values,
        rtol=1e-5,
        atol=1e-5 * values.abs().max().item(),
        msg="the embedding depends on the batch",
    )


def test_bad_settings_are_named():
    model = tiny_model("llama")
    with pytest.raises(InputError, match=r"embedding\.kind.*jvp, hidden, rds"):
        make_embedder(model, "jpv", dim=8, **OPTIONS)
    with pytest.raises(InputError, match=r"embedding\.dim"):
        make_embedder(model, "jvp", dim=0, **OPTIONS)
    with pytest.raises(InputError, match=r"embedding\.blocks"):
        make_embedder(model, "hidden", dim=8, **{**OPTIONS, "blocks": 4})
