"""One replica at several checkpoints of its adapter: the base model is loaded once.

An adapter's numbers are copied over the last one's. Nothing else is kept from one checkpoint to
the next but what they have in common, so that a unit's results do not depend on those before it.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from torch import nn

from influence.adapters import ADAPTER_WEIGHTS, local_adapter
from influence.errors import InputError
from influence.stages import Toolbox


def set_adapter(model: nn.Module, adapter: str) -> None:
    """Give a PEFT model the numbers of another adapter of the same shape.

    adapter: folder or URL.

    Raises:
        InputError: the adapter has other factors than the model's.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    peft: Any = model
    own = get_peft_model_state_dict(peft, save_embedding_layers=False)
    numbers = load_file(os.path.join(local_adapter(adapter), ADAPTER_WEIGHTS))
    shapes = [{name: tuple(x.shape) for name, x in each.items()} for each in (own, numbers)]
    if shapes[0] != shapes[1]:
        odd = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})[:3]
        raise InputError(
            f"{adapter}: its factors are not those of the model's adapter ({', '.join(odd)}); "
            "expected checkpoints of one training"
        )
    set_peft_model_state_dict(peft, numbers)


class CheckpointTools:
    """The toolbox of a replica for a checkpoint; the last one's is kept.

    Args:
        base: of the model with its own adapter.
        adapter: that adapter.
    """

    def __init__(self, base: Toolbox, adapter: str | None) -> None:
        self._base, self._adapter = base, adapter
        self._held: str | None = adapter  # whose numbers the model has
        self._made: tuple[str, Toolbox] | None = None

    def at(self, checkpoint: str | None) -> Toolbox:
        """With this checkpoint's adapter and optimiser state; None: the model's own.

        Raises:
            InputError: an adapter or a state of another model.
        """
        if checkpoint is None:
            self._hold(self._adapter)
            return self._base
        if self._made is None or self._made[0] != checkpoint:
            self._made = None  # dropped before the next one's moments are read
            settings = replace(self._base.settings, updates=True, optimizer_state=checkpoint)
            tools = Toolbox(self._base.replica, settings)
            # First, so that layers are settled on the model as the config names it.
            tools.share(self._base)
            self._made = (checkpoint, tools)
        self._hold(checkpoint)
        return self._made[1]

    def _hold(self, adapter: str | None) -> None:
        if adapter == self._held:
            return
        assert adapter is not None  # nothing but adapters ever replaced the model's own
        self._held = None  # neither, should it fail half way
        set_adapter(self._base.replica.model, adapter)
        self._held = adapter
