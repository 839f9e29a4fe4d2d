"""The decoder of a causal language model, found by structure, and a forward that stops early."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from influence.errors import InputError


@dataclass(frozen=True)
class Decoder:
    """The parts of a causal language model that the embeddings and gradients need.

    base: the module that owns the blocks; it maps token ids to the last hidden states.
    block_prefix: the name of `blocks` in the model's `named_modules`, without a final dot.
    final_norm: the norm between the last block and the output head; None if the model has none.
    """

    base: nn.Module
    blocks: nn.ModuleList
    block_prefix: str
    final_norm: nn.Module | None
    embedding: nn.Module


class _Stop(Exception):
    """Carries a block's output out of the model's forward."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden


def find_decoder(model: nn.Module) -> Decoder:
    """The decoder of `model`, also inside an adapter's wrapper.

    The blocks are the outermost ModuleList of `num_hidden_layers` modules of one class. Of several
    (an encoder or a vision tower may be as deep) it is the one beside the token embedding.

    Raises InputError where the model has no such list, naming what was found instead.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise InputError(
            f"model {type(model).__name__}: expected a transformers model with a `config`; "
            "load it with AutoModelForCausalLM"
        )
    text_config = config.get_text_config()
    layers = text_config.num_hidden_layers
    embedding: nn.Module = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    candidates = [(n, m) for n, m in lists if len(m) == layers and _alike(m)]
    if not candidates:
        found = ", ".join(f"{n} ({len(m)} modules)" for n, m in lists) or "no ModuleList at all"
        raise InputError(
            f"model {type(model).__name__}: looked for a list of {layers} decoder blocks of one "
            f"class (num_hidden_layers of the config) and found {found}; "
            "use a decoder-only causal language model"
        )

    def rank(candidate: tuple[str, nn.ModuleList]) -> tuple[bool, int]:
        parent = model.get_submodule(candidate[0].rpartition(".")[0])
        return all(m is not embedding for m in parent.modules()), candidate[0].count(".")

    name, blocks = min(candidates, key=rank)
    base = model.get_submodule(name.rpartition(".")[0])
    norm = _final_norm(base, blocks, text_config.hidden_size)
    return Decoder(base, blocks, name, norm, embedding)


def _alike(modules: nn.ModuleList) -> bool:
    first = next(iter(modules))
    return next(first.parameters(), None) is not None and all(
        type(module) is type(first) for module in modules
    )


def _final_norm(base: nn.Module, blocks: nn.ModuleList, hidden_size: int) -> nn.Module | None:
    """The norm that the parent registers after its blocks (or before them, if named final)."""
    after = False
    found: nn.Module | None = None
    for name, child in base.named_children():
        after = after or child is blocks
        weight = getattr(child, "weight", None)
        # A norm without a weight (OLMo) is one too.
        fits = weight is None or (weight.dim() == 1 and weight.numel() == hidden_size)
        named_norm = "norm" in type(child).__name__.lower() and child is not blocks
        if named_norm and fits and (after or "final" in name):
            found = found or child
    return found


@contextmanager
def eval_mode(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode back afterwards.

    `modules`: those of the model, where the caller has a list of them.
    """
    training = [
        module for module in (model.modules() if modules is None else modules) if module.training
    ]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def eager_experts(model: nn.Module) -> Iterator[None]:
    """Experts one by one inside: grouped matrix products have neither
    forward-mode nor second derivatives."""
    before = model.get_experts_implementation()  # pyright: ignore[reportCallIssue]
    model.set_experts_implementation("eager")  # pyright: ignore[reportCallIssue]
    try:
        yield
    finally:
        model.set_experts_implementation(before)  # pyright: ignore[reportCallIssue]


def check_count(decoder: Decoder, count: int) -> None:
    """Raise InputError unless the decoder has a block number `count` (counted from 1)."""
    check_depth(len(decoder.blocks), count)


def check_depth(blocks: int, count: int) -> None:
    """Raise InputError unless a model of so many blocks has a block number `count`."""
    if not 1 <= count <= blocks:
        raise InputError(
            f"embedding.blocks: {count}, expected 1 to {blocks}, the number of decoder blocks of "
            "this model"
        )


def run_blocks(
    model: nn.Module,
    decoder: Decoder,
    input_ids: Int[Tensor, "batch tokens"],
    count: int,
    through_norm: bool,
    parameters: Mapping[str, Tensor] | None = None,
) -> Float[Tensor, "batch tokens hidden"]:
    """Hidden states after the first `count` blocks; the later blocks and the head do not run.

    This is the model's own forward (its masks, positions and scaling), left at the block's output,
    in evaluation mode, without a cache. There is no padding mask: rows are padded on the right,
    and causal attention keeps a row's real tokens from its padding.

    through_norm: apply the final norm to the result, if the model has one.
    parameters: tensors to use in place of the model's parameters, by their full names.

    Raises InputError for a `count` that the model does not have.
    """
    check_count(decoder, count)

    def stop(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        raise _Stop(output[0] if isinstance(output, tuple) else output)

    handle = decoder.blocks[count - 1].register_forward_hook(stop)
    call = {"input_ids": input_ids, "use_cache": False, "output_hidden_states": False}
    try:
        with eval_mode(model):
            if parameters:
                functional_call(model, dict(parameters), (), call)
            else:
                model(**call)
    except _Stop as stopped:
        hidden = stopped.hidden
    else:
        raise RuntimeError(f"{decoder.block_prefix}.{count - 1} was not reached by the forward")
    finally:
        handle.remove()
    if through_norm and decoder.final_norm is not None:
        hidden = decoder.final_norm(hidden)
    return hidden


def run_blocks_last(
    model: nn.Module,
    decoder: Decoder,
    input_ids: Int[Tensor, "batch tokens"],
    lengths: Int[Tensor, " batch"],
    count: int,
    through_norm: bool,
    parameters: Mapping[str, Tensor] | None = None,
) -> Float[Tensor, "batch hidden"]:
    """`run_blocks` at each row's last real token, without what only other tokens would need.

    The feed-forward part of block number `count` (if the block has a child named `mlp`) and the
    final norm act on each token by itself, so they see the last tokens alone.

    Raises InputError as `run_blocks`; see `check_lengths`.
    """
    check_count(decoder, count)
    feed_forward = getattr(decoder.blocks[count - 1], "mlp", None)
    width = input_ids.shape[1]

    def only_last(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return last_token(args[0], lengths).unsqueeze(1), *args[1:]

    def widen(
        module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]
    ) -> Tensor | tuple[Tensor, ...]:
        # The block adds it to all tokens: right for the last one, which is the only one read.
        # Contiguous, as some blocks add the residual in place (Falcon).
        first, *others = (output,) if isinstance(output, Tensor) else output
        first = first.expand(-1, width, -1).contiguous()
        return first if isinstance(output, Tensor) else (first, *others)

    handles = []
    if isinstance(feed_forward, nn.Module):
        handles.append(feed_forward.register_forward_pre_hook(only_last))
        handles.append(feed_forward.register_forward_hook(widen))
    try:
        hidden = run_blocks(model, decoder, input_ids, count, False, parameters)
    finally:
        for handle in handles:
            handle.remove()
    hidden = last_token(hidden, lengths)
    if through_norm and decoder.final_norm is not None:
        hidden = decoder.final_norm(hidden)
    return hidden


def last_token(
    hidden: Float[Tensor, "batch tokens hidden"], lengths: Int[Tensor, " batch"]
) -> Float[Tensor, "batch hidden"]:
    """The hidden state of each row's last real token."""
    index = (lengths.to(hidden.device) - 1).view(-1, 1, 1).expand(-1, 1, hidden.shape[2])
    return hidden.gather(1, index).squeeze(1)


def check_lengths(input_ids: Int[Tensor, "batch tokens"], lengths: Int[Tensor, " batch"]) -> None:
    """Raise ValueError unless every row has at least one real token and no more than there are."""
    if int(lengths.min()) < 1 or int(lengths.max()) > input_ids.shape[1]:
        raise ValueError(
            f"lengths: expected 1 to {input_ids.shape[1]} (the padded length), "
            f"got {lengths.tolist()}"
        )
