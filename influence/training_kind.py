"""What tells the trainings apart that a job makes for itself (`influence.own_training`)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from influence.config import Config
from influence.config_finetune import FinetuneConfig

FINETUNE_KEY = re.compile(r"(?<![\w./])(?:reference\.)?finetune\.")
"""Where an error names a key of a fine-tuning's section (no part of a path)."""


@dataclass(frozen=True)
class TrainingKind:
    """One purpose for which a job fine-tunes its model before it takes gradients.

    Attributes:
        stage: the stage's name, the cache's folder for it, and the manifest's key.
        key: of the config, where its settings stand; errors name it.
        what: it is called by in messages.
        files: of the result that later stages read, apart from the marker.
        section: the settings; None where the config asks for none.
        apply: the config with the result in this folder.
    """

    stage: str
    key: str
    what: str
    files: tuple[str, ...]
    section: Callable[[Config], FinetuneConfig | None]
    apply: Callable[[Config, str], Config]

    @property
    def marker(self) -> str:
        """The file that is put last, and makes the others count."""
        return f"{self.stage}.json"

    def own_keys(self, text: str) -> str:
        """An error of the fine-tuning with the keys of this section."""
        return FINETUNE_KEY.sub(f"{self.key}.", text)
