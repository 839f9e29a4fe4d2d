"""Tiny causal language models with random weights, and random batches for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB = 97
ARCHITECTURES = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "mistral",
    "gpt2",
    "gpt_neox",
    "phi",
)
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss")
"""Mixtures of experts: fused tensors as (experts, out, in), and gpt-oss's (experts, in, out)."""

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GATED = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
_HEADS = {**_GATED, "head_dim": 8}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_STATES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3}
_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GATED),
    "qwen2": ("Qwen2Config", _GATED),
    "qwen3": ("Qwen3Config", _HEADS),
    "gemma": ("GemmaConfig", _HEADS),
    # A soft cap so low that leaving it out cannot go unnoticed.
    "gemma2": (
        "Gemma2Config",
        {**_HEADS, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    ),
    "mistral": ("MistralConfig", {**_HEADS, "sliding_window": 6}),
    "gpt2": ("GPT2Config", _GPT2),
    "gpt_neox": ("GPTNeoXConfig", {**_COMMON, "intermediate_size": 48}),
    "phi": ("PhiConfig", {**_COMMON, "intermediate_size": 48}),
    # Scales its embeddings in the embedding's own module.
    "gemma3": ("Gemma3TextConfig", {**_HEADS, "query_pre_attn_scalar": 8, "sliding_window": 6}),
    "mixtral": ("MixtralConfig", {**_GATED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_HEADS, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    # Parameters that a mixer reads instead of calling their modules, and norms with a gate.
    "mamba": ("MambaConfig", {**_STATES, "state_size": 8}),
    "bamba": (
        "BambaConfig",
        {**_GATED, **_MAMBA2, "attn_layer_indices": [1], "attn_rotary_emb": 8},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **_HEADS,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    "lfm2": (
        "Lfm2Config",
        {**_GATED, "block_ff_dim": 48, "layer_types": ["conv", "full_attention", "conv"]},
    ),
    # Experts whose tokens come in other layouts than transformers' interface has.
    "llama4": (
        "Llama4TextConfig",
        {
            **_HEADS,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 1,
        },
    ),
    "jetmoe": (
        "JetMoeConfig",
        {
            **_COMMON,
            "num_key_value_heads": 2,
            "kv_channels": 8,
            "intermediate_size": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    # Blocks that change a layer's output in place.
    "falcon": ("FalconConfig", {**_COMMON, "ffn_hidden_size": 48, "parallel_attn": True}),
    "ctrl": (
        "CTRLConfig",
        {**_GPT2, "dff": 48},
    ),
    # Routers that compute in float32.
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_GATED,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    ),
}


@dataclass
class RandomBatch:
    """Right-padded token ids with labels, as the product's own batches have them."""

    positions: list[int]
    input_ids: Tensor
    labels: Tensor
    lengths: Tensor


def tiny_model(architecture: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A three-block model in eval mode; norms' weights and biases are random, too."""
    config_name, options = _CONFIGS[architecture]
    config = getattr(transformers, config_name)(**options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if architecture in (*MIXTURES, "qwen3_next", "deepseek_v3"):
        # Grouped matrix products know no float64.
        model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 1:
                values = 0.3 * values + 0.5
            else:
                values = values / parameter.shape[-1] ** 0.5
            parameter.copy_(values)
    return model.eval()


def wide_norms(model: Any) -> Any:
    """`model` with its RMS norms in its own precision: transformers computes them in float32.

    Differences of a float64 model's gradients are then good for second derivatives, too.
    """
    for module in model.modules():
        if not type(module).__name__.endswith("RMSNorm"):
            continue
        gemma = type(module).__name__.startswith("Gemma")

        def forward(x: Tensor, module: Any = module, gemma: bool = gemma) -> Tensor:
            eps = module.eps if gemma else module.variance_epsilon
            weight = 1 + module.weight if gemma else module.weight
            return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

        module.forward = forward
    return model


def with_lora(model: nn.Module, r: int = 3, seed: int = 1) -> Any:
    """`model` with LoRA factors at every linear layer of its blocks; B is random, not zero."""
    from peft import LoraConfig, get_peft_model

    dtype = next(model.parameters()).dtype
    conv1d = type(model).__name__.startswith("GPT2")
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if type(module).__name__ == ("Conv1D" if conv1d else "Linear")
        and module is not model.get_output_embeddings()  # type: ignore[operator]
    }
    config = LoraConfig(
        r=r, lora_alpha=5, target_modules=sorted(names), fan_in_fan_out=conv1d, lora_dropout=0.1
    )
    adapted = get_peft_model(model, config).to(dtype)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.3 * values)
    return adapted.eval()


def random_batch(lengths: tuple[int, ...] = (9, 5, 12, 7), seed: int = 0) -> RandomBatch:
    """Samples of random ids; about half of each one's tokens are response tokens, one at least."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    input_ids = torch.zeros(len(lengths), width, dtype=torch.long)
    labels = torch.full_like(input_ids, -100)
    for row, length in enumerate(lengths):
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        response = torch.rand(length, generator=generator) < 0.5
        response[0], response[-1] = False, True
        input_ids[row, :length] = ids
        labels[row, :length] = torch.where(response, ids, torch.tensor(-100))
    return RandomBatch(list(range(len(lengths))), input_ids, labels, torch.tensor(lengths))


def rows_of(batch: RandomBatch, rows: list[int]) -> RandomBatch:
    """The given samples as a batch of their own, padded no wider than they need."""
    width = int(batch.lengths[rows].max())
    return RandomBatch(
        rows, batch.input_ids[rows, :width], batch.labels[rows, :width], batch.lengths[rows]
    )
