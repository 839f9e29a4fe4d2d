"""The same numbers on a GPU: `pytest -m gpu`. Oracles run on the CPU in float64.

INFLUENCE_TEST_DEVICE=cpu rehearses the tests where there is no GPU.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
from gradient_oracle import flat, oracle, setup
from tiny_models import ARCHITECTURES, MIXTURES, random_batch, tiny_model

from influence.batching import Batch
from influence.embeddings import make_embedder
from influence.gradients import attributed_layers, make_engine
from influence.memory import TokenLimit, computed
from influence.projection import KINDS, layer_shapes, make_projection

DEVICE = os.environ.get("INFLUENCE_TEST_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"
    ),
]
#: float32 products without TF32, sums in another order; bfloat16 has 8 bits of mantissa.
ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.1}


def _cosines(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(found.double().cpu(), expected.double(), dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["all", "lora"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MIXTURES])
def test_gradients_are_those_of_one_sample_on_the_cpu(
    architecture: str, kind: str, dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16 and architecture in MIXTURES:
        pytest.skip("rounding sends tokens to other experts: another gradient, not a wrong one")
    model, layers = setup(architecture, kind)
    model.to(dtype).double()  # the rounded weights are the model: what is judged is the arithmetic
    batch = random_batch()
    losses, gradients = oracle(model, layers, batch)
    moved, there = setup(architecture, kind)
    moved.to(DEVICE, dtype)
    found = make_engine(moved, there, reduction="mean", full=True)(batch)
    assert found.vectors is not None
    assert found.vectors.device.type == DEVICE
    assert found.vectors.dtype == torch.float32, "gradients are summed in half precision"
    error = ERROR[dtype]
    expected = flat(gradients)
    assert _cosines(found.vectors, expected).min() > 1 - error, "another direction on the GPU"
    norms = expected.norm(dim=1)
    torch.testing.assert_close(found.norm.cpu(), norms, rtol=2 * error, atol=0, check_dtype=False)
    torch.testing.assert_close(found.loss.cpu(), losses, rtol=error, atol=error, check_dtype=False)


@pytest.mark.parametrize("projection", sorted(set(KINDS) - {"exact"}))
def test_a_projection_is_the_same_on_both_devices(projection: str) -> None:
    """A shard made on a GPU and one made on a CPU must hold the same sketch."""
    batch, found = random_batch(), []
    for device in ("cpu", DEVICE):
        model, layers = setup("llama", "linear", torch.float32)
        model.to(device)
        projected = make_projection(
            projection, layer_shapes(layers), side=8, dim=64, seed=0, device=device
        )
        engine = make_engine(model, layers, reduction="mean", projection=projected)
        vectors = engine(batch).vectors
        assert vectors is not None
        found.append(vectors.cpu())
    scale = float(found[0].abs().max())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("kind", ["jvp", "hidden", "rds"])
def test_embeddings_are_the_same_on_both_devices(kind: str) -> None:
    batch, found = random_batch(), []
    for device in ("cpu", DEVICE):
        model = tiny_model("llama", torch.float32).to(device)
        embedder = make_embedder(
            model, kind, blocks=2, tangents=2, tangent="rank1", dim=4096, seed=0
        )
        with torch.no_grad():
            found.append(embedder.embed(batch.input_ids, batch.lengths).cpu())
    scale = float(found[0].abs().max())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4 * scale)


def test_a_batch_that_does_not_fit_is_halved_until_it_does() -> None:
    if DEVICE != "cuda":
        pytest.skip("needs a device whose memory can be limited")
    model, layers = setup("llama", "linear", torch.float32)
    reference = copy.deepcopy(model)
    model.to("cuda")
    batch = random_batch(lengths=(48,) * 64)
    whole = Batch(batch.positions, batch.input_ids, batch.labels, batch.lengths)
    expected = make_engine(
        reference, attributed_layers(reference, "linear"), reduction="mean", full=True
    )(batch)
    engine, limit = make_engine(model, layers, reduction="mean", full=True), TokenLimit()
    torch.cuda.empty_cache()
    free = torch.cuda.memory_reserved() + 24 * 2**20
    torch.cuda.set_per_process_memory_fraction(
        free / torch.cuda.get_device_properties(0).total_memory
    )
    try:
        parts = [found.vectors.cpu() for _part, found in computed([whole], limit, engine)]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert limit.tokens is not None, "everything fitted: the test limits too little"
    assert expected.vectors is not None
    scale = float(expected.vectors.abs().max())
    torch.testing.assert_close(torch.cat(parts), expected.vectors, rtol=1e-4, atol=1e-4 * scale)
