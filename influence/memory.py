"""Batches that are cut in halves where the device has no room for them; memory given back."""

from __future__ import annotations

import ctypes
import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from influence.batching import Batch
from influence.errors import InputError

T = TypeVar("T")

# What is raised as a plain RuntimeError: the CPU's allocator, and cuBLAS without room for itself.
_NO_ROOM = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass
class TokenLimit:
    """Largest batch (in tokens, padding included) that a replica still tries; None: any.

    It only ever falls, so that a replica runs out of memory a few times in its life and not in
    every shard.
    """

    tokens: int | None = None

    @property
    def note(self) -> str | None:
        """What a shard says of batches that were cut; its numbers may differ in their last bits."""
        if self.tokens is None:
            return None
        return f"out of memory: batches cut to at most {self.tokens} tokens"

    def lower(self, batch: Batch) -> None:
        """After `batch` did not fit: half of it from now on.

        Raises InputError for a batch of one row, which cannot be cut.
        """
        rows, tokens = batch.input_ids.shape
        if rows == 1:
            raise InputError(
                f"replicas.token_budget: one row of {tokens} tokens does not fit into the memory "
                "of its device; lower data.max_length, choose fewer gradients.parameters, or use "
                "a larger device"
            )
        self.tokens = max(1, rows * tokens // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def cut(self, batch: Batch) -> list[Batch]:
        """`batch` in as few parts as stay within the limit (one row at least each)."""
        rows, tokens = batch.input_ids.shape
        if self.tokens is None or rows * tokens <= self.tokens:
            return [batch]
        step = max(1, self.tokens // tokens)
        return [part(batch, slice(start, start + step)) for start in range(0, rows, step)]


def part(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch, padded no wider than they need."""
    width = int(batch.lengths[rows].max())
    return Batch(
        batch.positions[rows],
        batch.input_ids[rows, :width],
        batch.labels[rows, :width],
        batch.lengths[rows],
    )


def computed(
    batches: Sequence[Batch], limit: TokenLimit, compute: Callable[[Batch], T]
) -> Iterator[tuple[Batch, T]]:
    """(batch, what `compute` makes of it); batches that do not fit are cut and tried again."""
    queue = deque(batches)
    while queue:
        first, *others = limit.cut(queue.popleft())
        queue.extendleft(reversed(others))
        try:
            result = compute(first)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            result = None
        if result is None:
            # Out of the handler: the error's traceback would keep the failed pass's tensors alive.
            limit.lower(first)
            queue.appendleft(first)
        else:
            yield first, result


def restarted(
    batches: Sequence[Batch],
    limit: TokenLimit,
    device: torch.device | str,
    compute: Callable[[Sequence[Batch], Iterable[Batch]], T],
) -> T:
    """What `compute` makes of all batches at once: of a list of them, and of them on a device.

    Where one does not fit, all are cut and it begins anew: a sum that broke off in the middle of a
    batch is of no use. `compute` takes the second argument's batches one by one, in order.
    """
    while True:
        parts = [part for batch in batches for part in limit.cut(batch)]
        last = [parts[0]]
        try:
            return compute(parts, _moved(parts, device, last))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        # Out of the handler: the error's traceback would keep the failed pass's tensors alive.
        limit.lower(last[0])


def _moved(
    batches: Sequence[Batch], device: torch.device | str, last: list[Batch]
) -> Iterator[Batch]:
    """Each batch on the device as it is asked for; `last[0]` is the one that was."""
    for batch in batches:
        last[0] = batch
        yield batch.to(device)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the CPU's allocator, had no room."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(text in str(error) for text in _NO_ROOM)


def give_back_memory() -> None:
    """Return what a model that is gone has left in this process to the system.

    glibc keeps freed blocks of up to 32 MB: after a training the driver would hold gigabytes that
    the replicas beside it need. Nothing where the C library is another one.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
