"""Fingerprints: digests of everything that changes a stage's numbers, and of nothing else.

Model and adapter count by content, never by path; batch sizes, replicas and storage do not count.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from influence.adapters import local_adapter
from influence.config import Config, ModelConfig
from influence.errors import ModelLoadError
from influence.hub import hub_commit
from influence.methods import METHODS
from influence.optimizer_file import local_state
from influence.optimizer_use import TARGET_GRADIENTS, scaled_stages
from influence.replica import check_adapter, load_description, resolve_dtype, resolve_name
from influence.schemas import FORMAT_VERSION

# What models load from. Not *.bin: weights never load from a pickle, and trainers leave
# training_args.bin beside them.
_WEIGHT_SUFFIXES = (".safetensors", ".gguf")
_FILES_THAT_COUNT = ("config.json", "adapter_config.json")


@dataclass(frozen=True)
class Fingerprint:
    """A digest (32 hex digits) and the values that it covers."""

    hex: str
    values: dict[str, Any]


def fingerprint(values: Mapping[str, Any]) -> Fingerprint:
    """Digest of a JSON-able mapping, independent of key order."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return Fingerprint(hashlib.blake2b(text.encode(), digest_size=16).hexdigest(), dict(values))


def stage_fingerprints(config: Config, template: str) -> dict[str, Fingerprint]:
    """Fingerprints of every stage of this config; `template` is the tokenizer's fingerprint."""
    tokens: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "template": template,
        "max_length": config.data.max_length,
    }
    if config.data.loss_on != "response":
        tokens["loss_on"] = config.data.loss_on
    stages = {"catalogue": fingerprint(tokens)}
    for stage in METHODS[config.method].stages:
        stages[stage.name] = fingerprint({**tokens, **stage.values(config)})
    if not METHODS[config.method].runs_model:
        return stages
    model = {**tokens, **model_values(config)}
    gradients = config.gradients
    exact, scaled = _gradient_values(config), scaled_stages(config)
    step = optimizer_values(config) if scaled else {}
    stages["embedding"] = fingerprint({**model, **values_that_count(config)})
    if config.gradients.projection != "exact":
        plain = {**model, **exact, **_projection_values(config)}
        stages["gradients"] = fingerprint({**plain, **step} if "gradients" in scaled else plain)
        if scaled:
            of_targets = {**plain, **step} if TARGET_GRADIENTS in scaled else plain
            stages[TARGET_GRADIENTS] = fingerprint(of_targets)
    vectors = {**model, **exact, "normalize": gradients.normalize}
    if "target_vectors" in scaled:
        vectors |= step
    stages["target_vectors"] = fingerprint(vectors)
    return stages


def optimizer_values(config: Config) -> dict[str, Any]:
    """The optimiser's kind and the content of its state.

    Raises:
        InputError: no such file.
    """
    kind, state = config.optimizer.kind, config.optimizer.state
    return {"optimizer": kind, "optimizer_state": None if state is None else file_content(state)}


def file_content(path: str) -> str:
    """Digest of an optimizer's file: its bytes, by whatever path or URL they are found."""
    file = local_state(path)
    status = os.stat(file)
    return _digest_file(file, status.st_size, status.st_mtime_ns).hex()


def _gradient_values(config: Config) -> dict[str, Any]:
    """Which gradients are taken: of what loss, with respect to which parameters."""
    gradients = config.gradients
    values: dict[str, Any] = {
        "reduction": gradients.loss_reduction,
        "parameters": gradients.parameters,
        "blocks": gradients.blocks,
    }
    if gradients.blocks.startswith("random"):
        values["blocks_seed"] = config.seed
    return values


def _projection_values(config: Config) -> dict[str, Any]:
    """The settings that the projection in use reads."""
    gradients = config.gradients
    values: dict[str, Any] = {"projection": gradients.projection}
    if config.layer_patterns is not None:
        values["layers"] = sorted(config.layer_patterns)
    if gradients.projection in ("none", "layerwise"):
        values["norms"] = "by layer"
    else:
        values |= {"dim": gradients.dim, "seed": config.seed, "norms": gradients.norms}
    if gradients.projection == "layerwise":
        values |= {
            "layer_dim": gradients.layer_dim,
            "layer_sketch": gradients.layer_sketch,
            "seed": config.seed,
        }
    if gradients.projection == "kronecker":
        values |= {"side": gradients.side, "sides": "hashed"}
    return values


def embedding_values(config: Config) -> dict[str, Any]:
    """The embedding settings that the kind in use reads."""
    embedding = config.embedding
    kind = METHODS[config.method].embedding_kind or embedding.kind
    values: dict[str, Any] = {"embedding": kind, "dim": embedding.dim, "seed": config.seed}
    if kind in ("jvp", "hidden"):
        values["blocks"] = embedding.blocks
    if kind == "jvp":
        values |= {"tangents": embedding.tangents, "tangent": embedding.tangent}
    return values


def values_that_count(config: Config) -> dict[str, Any]:
    """Without `dim` and `seed` where the kind draws nothing and `dim` cuts nothing.

    `hidden` and `rds` give one value per feature of the hidden state; only a smaller `dim` calls
    for a (seeded) projection. For `jvp` both always count: the tangents are drawn.
    """
    values = embedding_values(config)
    if values["embedding"] in ("hidden", "rds"):
        width = load_description(config.model).get_text_config().hidden_size
        if values["dim"] >= width:
            del values["dim"], values["seed"]
    return values


def model_values(config: Config) -> dict[str, Any]:
    """Content of model and adapter, the dtype that is used, and the attention's form."""
    model = config.model
    return {
        "model": model_content(model),
        "adapter": adapter_content(model) if model.adapter else None,
        "dtype": resolve_dtype(model.dtype, config.replicas.num_gpus, model.device),
        "attention": model.attention,
    }


def model_content(model: ModelConfig) -> str:
    """Digest of a model's files, or the commit (and the GGUF file) of a hub model.

    Raises:
        ModelLoadError: neither a folder nor a hub model that can be resolved.
    """
    name = resolve_name(model)
    if model.gguf_file is not None and os.path.isdir(name):
        path = os.path.join(name, model.gguf_file)
        if not os.path.isfile(path):
            found = sorted(f for f in os.listdir(name) if f.endswith(".gguf"))
            raise ModelLoadError(
                f"model.gguf_file: {model.gguf_file!r} is not in {model.name!r}; "
                f"GGUF files there: {', '.join(found) or 'none'}"
            )
        return _digest_files((path,))
    if os.path.isdir(name):
        if os.path.isfile(os.path.join(name, "adapter_config.json")):
            # transformers would load whatever base model that file names, unseen by a digest.
            raise ModelLoadError(
                f"model.name: {model.name!r} holds an adapter (adapter_config.json); name its "
                "base model in model.name and this folder in model.adapter"
            )
        return folder_content(name, code=model.trust_remote_code)
    commit = f"hub:{name}@{model_commit(model)}"
    return commit if model.gguf_file is None else f"{commit}:{model.gguf_file}"


def model_commit(model: ModelConfig) -> str | None:
    """The commit of a hub model, None for a folder; raises `ModelLoadError` if there is neither."""
    name = resolve_name(model)
    if os.path.isdir(name):
        return None
    return hub_commit("model.name", name, model.revision, model.gguf_file or "config.json")


def adapter_content(model: ModelConfig) -> str:
    """Digest of the folder of a model's adapter, or the commit of one on the hub.

    Raises:
        ModelLoadError: neither, or an adapter without safetensors.
    """
    check_adapter(model)
    commit = adapter_commit(model)
    if commit is not None:
        return f"hub:{model.adapter}@{commit}"
    return folder_content(local_adapter(model.adapter or ""))


def adapter_commit(model: ModelConfig) -> str | None:
    """The commit of a hub adapter, None for a folder; raises `ModelLoadError` for neither."""
    adapter = local_adapter(model.adapter or "")
    if os.path.isdir(adapter):
        return None
    return hub_commit("model.adapter", adapter, model.adapter_revision, "adapter_config.json")


def folder_content(folder: str, *, code: bool = False) -> str:
    """Digest of the weights and configs in a folder (names and bytes, not the path).

    `code`: also of its Python files, where the model runs them.

    Raises:
        ModelLoadError: a folder without weights.
    """
    names = sorted(
        name
        for name in os.listdir(folder)
        if name.endswith(_WEIGHT_SUFFIXES)
        or name in _FILES_THAT_COUNT
        or (code and name.endswith(".py"))
    )
    if not any(name.endswith(_WEIGHT_SUFFIXES) for name in names):
        raise ModelLoadError(f"{folder!r} holds no weights (*.safetensors or *.gguf)")
    return _digest_files(tuple(os.path.join(folder, name) for name in names))


def files_content(folder: str, names: Sequence[str]) -> str:
    """Digest of some files of a folder (their names and bytes, not the folder's path)."""
    return _digest_files(tuple(os.path.join(folder, name) for name in names))


def _digest_files(paths: tuple[str, ...]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        status = os.stat(path)
        digest.update(os.path.basename(path).encode() + b"\0")
        digest.update(_digest_file(path, status.st_size, status.st_mtime_ns))
    return digest.hexdigest()


@functools.lru_cache(maxsize=256)
def _digest_file(path: str, size: int, mtime: int) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
