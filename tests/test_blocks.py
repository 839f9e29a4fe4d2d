from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_models import ARCHITECTURES, random_batch, tiny_model, with_lora
from torch import nn

from influence.blocks import find_decoder, last_token, run_blocks, run_blocks_last
from influence.errors import InputError

# Where each architecture keeps its blocks, its last norm and its token embedding.
NAMES = {
    "gpt2": ("transformer.h", "transformer.ln_f", "transformer.wte"),
    "gpt_neox": ("gpt_neox.layers", "gpt_neox.final_layer_norm", "gpt_neox.embed_in"),
    "phi": ("model.layers", "model.final_layernorm", "model.embed_tokens"),
}
LLAMA = ("model.layers", "model.norm", "model.embed_tokens")


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoder_is_found(architecture, adapted):
    model = tiny_model(architecture)
    blocks, norm, embedding = NAMES.get(architecture, LLAMA)
    prefix = ""
    if adapted:
        model, prefix = with_lora(model), "base_model.model."
    decoder = find_decoder(model)
    assert decoder.block_prefix == prefix + blocks, "another list than the decoder blocks"
    assert decoder.blocks is model.get_submodule(prefix + blocks)
    assert decoder.base is model.get_submodule((prefix + blocks).rpartition(".")[0])
    assert decoder.final_norm is model.get_submodule(prefix + norm), "not the last norm"
    assert decoder.embedding is model.get_submodule(prefix + embedding)


class TwoTowers(nn.Module):
    """A vision tower as deep as the text decoder, registered before it and just as far out."""

    def __init__(self):
        super().__init__()
        text = tiny_model("llama")
        self.vision = nn.Module()
        self.vision.layers = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
        self.vision.norm = nn.LayerNorm(32)
        self.text = text.model
        self.config = SimpleNamespace(get_text_config=lambda: text.config)

    def get_input_embeddings(self):
        return self.text.embed_tokens


def test_of_two_lists_the_one_beside_the_token_embedding_counts():
    model = TwoTowers()
    decoder = find_decoder(model)
    assert decoder.block_prefix == "text.layers", "took the vision tower for the decoder"
    assert decoder.final_norm is model.text.norm


def test_model_without_decoder_blocks_is_an_error_that_says_what_was_found():
    model = tiny_model("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(InputError, match=r"5 decoder blocks.*model\.layers \(3 modules\)"):
        find_decoder(model)
    with pytest.raises(InputError, match="config"):
        find_decoder(nn.Linear(2, 2))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stopped_forward_equals_the_models_own_hidden_states(architecture):
    model, batch = tiny_model(architecture), random_batch()
    decoder = find_decoder(model)
    assert decoder.final_norm is not None
    with torch.no_grad():
        full = model(batch.input_ids, output_hidden_states=True, use_cache=False).hidden_states
        for count in (1, 2):
            for through_norm in (False, True):
                expected = decoder.final_norm(full[count]) if through_norm else full[count]
                hidden = run_blocks(model, decoder, batch.input_ids, count, through_norm)
                torch.testing.assert_close(
                    hidden, expected, rtol=1e-12, atol=1e-12, msg="stopped at the wrong place"
                )
                last = run_blocks_last(
                    model, decoder, batch.input_ids, batch.lengths, count, through_norm
                )
                for row, length in enumerate(batch.lengths.tolist()):
                    torch.testing.assert_close(
                        last[row],
                        expected[row, length - 1],
                        # Fewer rows in the last matrix products: the norms' float32 may round
                        # the other way.
                        rtol=1e-6,
                        atol=1e-6,
                        msg="not the last real token, or the shortcut lost a part of the block",
                    )
        hidden = run_blocks(model, decoder, batch.input_ids, 3, through_norm=True)
    torch.testing.assert_close(
        hidden, full[3], rtol=1e-12, atol=1e-12, msg="the last block's output or the norm is wrong"
    )


def test_later_blocks_and_the_head_do_not_run():
    model, batch = tiny_model("llama"), random_batch()
    calls = {"block 1": 0, "block 2": 0, "block 3": 0, "head": 0}

    def counting(name):
        def hook(module, args, output):
            calls[name] += 1

        return hook

    for number, block in enumerate(model.model.layers, start=1):
        block.register_forward_hook(counting(f"block {number}"))
    model.lm_head.register_forward_hook(counting("head"))
    run_blocks(model, find_decoder(model), batch.input_ids, 2, through_norm=True)
    assert calls == {"block 1": 1, "block 2": 1, "block 3": 0, "head": 0}, "did not stop in time"


@pytest.mark.parametrize("count", [0, 4])
def test_a_block_that_does_not_exist_is_an_error(count):
    model, batch = tiny_model("llama"), random_batch()
    with pytest.raises(InputError, match=r"embedding\.blocks.*1 to 3"):
        run_blocks(model, find_decoder(model), batch.input_ids, count, through_norm=False)


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_model_is_left_as_it_was():
    model, batch = with_lora(tiny_model("llama")), random_batch()
    decoder = find_decoder(model)
    model.train()
    model.get_submodule(decoder.block_prefix)[0].eval()
    modes = [module.training for module in model.modules()]
    hooks = hook_count(model)
    first = run_blocks_last(model, decoder, batch.input_ids, batch.lengths, 2, True)
    second = run_blocks_last(model, decoder, batch.input_ids, batch.lengths, 2, True)
    assert torch.equal(first, second), "dropout was on"
    with pytest.raises(IndexError):
        run_blocks_last(model, decoder, batch.input_ids + 1000, batch.lengths, 2, True)
    assert hook_count(model) == hooks, "a hook was left on the model"
    assert [module.training for module in model.modules()] == modes, "modes were not restored"


def test_last_token_picks_by_length():
    hidden = torch.arange(24.0).view(2, 4, 3)
    picked = last_token(hidden, torch.tensor([2, 4]))
    assert picked.tolist() == [[3.0, 4.0, 5.0], [21.0, 22.0, 23.0]], "off by one"
