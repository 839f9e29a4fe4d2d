"""Values that a method has where a config gives none, beside those of its gradients."""

from __future__ import annotations

from typing import Any

from influence.config_finetune import WarmupConfig
from influence.methods.kind import Method


def fill_defaults(config: Any, method: Method) -> None:
    """Fill sections and targets of a `Config` that is being validated, in place.

    A warm-up that is null on purpose stays null.
    """
    for section, values in method.section_defaults.items():
        found = getattr(config, section)
        if found is None and section in config.model_fields_set:
            continue
        if found is None:
            found = WarmupConfig.model_validate({})
        own = {name: v for name, v in values.items() if name not in found.model_fields_set}
        object.__setattr__(config, section, _filled(found, own))
    for name, target in config.targets.items():
        given = target.model_fields_set
        own = {key: v for key, v in method.target_defaults.items() if key not in given}
        if own:
            config.targets[name] = _filled(target, own)


def _filled(section: Any, values: dict[str, Any]) -> Any:
    found = section.model_copy(update=values)
    # They are no choice of the user's: another method has others.
    found.model_fields_set.difference_update(values)
    return found
