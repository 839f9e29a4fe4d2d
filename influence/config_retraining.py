"""The config's sections on evaluations that train the model again."""

from __future__ import annotations

from pydantic import Field

from influence.config_finetune import HeldOutConfig
from influence.config_section import PositiveInt


class HeldOutTest(HeldOutConfig):
    """Rows to take the loss of after a training."""

    exact_match: bool = Field(
        False, description="also generate an answer to each row and compare it with the row's"
    )
    max_new_tokens: PositiveInt = Field(256, description="of such an answer")
