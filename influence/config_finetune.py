"""The config's sections on fine-tuning: of a target model, a reference, and a warm-up."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from influence.config_section import PositiveFloat, PositiveInt, Section, Share

POOL = "pool"
"""What `finetune.data` calls the candidates."""


class HeldOutConfig(Section):
    """Rows to take the loss of while training goes on."""

    path: str = Field(description="file of rows like the candidates'")
    limit: PositiveInt | None = Field(None, description="take the first rows")


def held_out_paths(value: object) -> object:
    """Named sets of held-out rows, of which a path alone stands for a section with it."""
    if not isinstance(value, dict):
        return value
    return {k: {"path": v} if isinstance(v, str) else v for k, v in value.items()}


class FinetuneConfig(Section):
    """LoRA fine-tuning on a selection, with its weights, or on the pool."""

    data: list[str] | None = Field(
        None, description="files or globs, or `pool`; default: RUN/selection"
    )
    fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="random part of those rows, drawn with the seed"
    )
    weights: bool = Field(True, description="use the column influence_weight where there is one")
    max_length: Annotated[int, Field(ge=2)] | None = Field(
        None, description="default: data.max_length"
    )
    rank: PositiveInt = Field(8, description="of the LoRA factors")
    alpha: PositiveFloat = Field(16.0, description="LoRA: the update is scaled by alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="on the factors' input")
    target_modules: str | list[str] = Field(
        "all-linear", description="as in PEFT: names of modules, or all linear ones but the head"
    )
    adapter: str | None = Field(
        None, description="adapter to go on from, instead of fresh factors; default: model.adapter"
    )
    epochs: PositiveFloat = Field(2.0, description="may be broken")
    learning_rate: PositiveFloat = Field(5e-4, description="of AdamW, at its highest")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="of the rate after the warm-up"
    )
    warmup_ratio: Share = Field(0.1, description="part of the steps in which the rate rises")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="of AdamW")
    max_grad_norm: PositiveFloat = Field(1.0, description="longer gradients are cut to it")
    batch_size: PositiveInt = Field(16, description="rows of an optimiser step, of all workers")
    token_budget: PositiveInt | None = Field(
        None,
        description="tokens of a micro-batch, padding included; default: replicas.token_budget",
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations twice rather than keep them"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float64"] | None = Field(
        None, description="of the frozen base; default: model.dtype"
    )
    evaluate: dict[str, HeldOutConfig] | None = Field(
        None, description="named sets, NAME: path; default: the targets; {}: none"
    )
    evaluate_every: PositiveInt | None = Field(None, description="steps; default: an epoch")
    save_every: PositiveInt | None = Field(100, description="steps; null: an epoch")
    keep_checkpoints: Annotated[int, Field(ge=0)] | None = Field(
        0, description="newest ones that stay once training is done; null: all"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = Field(None, description="default: seed")
    workers: PositiveInt = Field(1, description="more than one: with Ray Train")
    output: str | None = Field(None, description="default: RUN/finetune")

    @field_validator("data", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    _paths = field_validator("evaluate", mode="before")(held_out_paths)


class ReferenceConfig(Section):
    """In2Core's reference model: an adapter that is there, or one that the job makes first."""

    adapter: str | None = Field(None, description="PEFT adapter: folder, s3:// or hub name")
    finetune: FinetuneConfig | None = Field(
        None, description="LoRA fine-tuning on the pool, kept in the cache; {}: with the defaults"
    )


class WarmupConfig(FinetuneConfig):
    """LoRA fine-tuning on a part of the pool before gradients are taken, kept in the cache.

    `data`, `evaluate` and `output` are not for it.
    """

    fraction: Share = Field(
        0.05, description="random part of the pool, drawn with the seed; 0: no warm-up"
    )
    keep_epochs: bool = Field(
        False,
        description="keep what there is after each epoch, too; less, which takes gradients there: "
        "true",
    )
