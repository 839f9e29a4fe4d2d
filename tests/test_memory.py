"""Batches that do not fit are cut and tried again; nothing is lost and nothing is done twice."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_batch, tiny_model

from influence.batching import Batch
from influence.errors import InputError
from influence.gradients import attributed_layers, make_engine
from influence.memory import TokenLimit, computed


def as_batch(lengths: tuple[int, ...], seed: int = 0) -> Batch:
    drawn = random_batch(lengths, seed)
    return Batch(drawn.positions, drawn.input_ids, drawn.labels, drawn.lengths)


class Device:
    """Raises above `room` tokens, as a GPU would."""

    def __init__(self, room: int, message: str | None = None) -> None:
        self.room, self.message = room, message
        self.tried: list[int] = []

    def __call__(self, batch: Batch) -> list[int]:
        self.tried.append(batch.input_ids.numel())
        if self.tried[-1] > self.room:
            if self.message is None:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            raise RuntimeError(self.message)
        return [int(ids.sum()) for ids in batch.input_ids]


CPU = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


@pytest.mark.parametrize("message", [None, CPU, CUBLAS])
@pytest.mark.parametrize("room", [12, 25, 50, 1000])
def test_every_row_is_computed_once_in_batches_that_fit(room, message):
    batches = [as_batch((12, 11, 9, 8)), as_batch((7, 7, 5, 4, 3), seed=1)]
    whole = [int(ids.sum()) for batch in batches for ids in batch.input_ids]
    device, limit = Device(room, message), TokenLimit()
    found, positions = [], []
    for batch, sums in computed(batches, limit, device):
        assert batch.input_ids.numel() <= room
        found += sums
        positions.append(batch.positions)
    assert found == whole, "a row was lost, done twice, or its order changed"
    assert [p for part in positions for p in part] == [0, 1, 2, 3, 0, 1, 2, 3, 4], (
        "positions do not follow the rows"
    )
    failures = sum(tokens > room for tokens in device.tried)
    assert failures <= 3, f"ran out of memory {failures} times: the limit is forgotten"
    assert (limit.note is None) == (room >= 48), "a shard must say that its batches were cut"


def test_the_limit_holds_for_later_shards():
    device, limit = Device(30), TokenLimit()
    list(computed([as_batch((12, 11, 9, 8))], limit, device))
    before = len([tokens for tokens in device.tried if tokens > 30])
    list(computed([as_batch((12, 11, 9, 8), seed=5)], limit, device))
    assert len([tokens for tokens in device.tried if tokens > 30]) == before


def test_a_row_that_does_not_fit_alone_names_what_to_do():
    with pytest.raises(InputError, match=r"12 tokens.*max_length"):
        list(computed([as_batch((12, 11))], TokenLimit(), Device(10)))


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def fail(batch: Batch) -> int:
        raise RuntimeError("expected scalar type Float")

    with pytest.raises(RuntimeError, match="scalar type"):
        list(computed([as_batch((5, 4))], TokenLimit(), fail))


def test_gradients_of_cut_batches_agree():
    model = tiny_model("llama")
    engine = make_engine(model, attributed_layers(model, "all"), reduction="mean", full=True)
    batch = as_batch((12, 11, 9, 8))
    whole = engine(batch).vectors
    room = TokenLimit(20)
    parts = [result.vectors for _batch, result in computed([batch], room, engine)]
    torch.testing.assert_close(
        torch.cat(parts), whole, rtol=1e-9, atol=1e-12, msg="neighbours or padding leak in"
    )
    assert len(parts) == 4
