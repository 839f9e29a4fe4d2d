"""The response mask covers exactly what the assistant says, under published chat templates."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from influence.candidates import Example, Message
from influence.errors import InputError
from influence.tokenization import make_encoder, template_fingerprint

# As published in the configs of SmolLM2-Instruct, Meta-Llama-3-Instruct, Mistral-7B-Instruct-v0.2
# and zephyr-7b-beta.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate "
    "user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token}}{% else %}{{ raise_exception('Only user and assistant "
    "roles are supported!') }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + "
    "message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' "
    "+ message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and "
    "add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Qwen3's: an assistant turn looks different once another turn follows.
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if loop.last and "
    "message['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "smollm2": (SMOLLM2, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "mistral": (MISTRAL, "</s>"),
    "zephyr": (ZEPHYR, "</s>"),
    "marked": (MARKED, "<|im_end|>"),
}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>"]
CORPUS = ["What is the answer to this question? The answer is 42. [/INST](yes) assistant user"] * 40


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    """A small byte-level BPE like those of Llama 3 and SmolLM2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture
def make_tokenizer(bpe):
    def make(template: str | None) -> PreTrainedTokenizerFast:
        copy = Tokenizer.from_str(bpe.to_str())
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=copy, bos_token="<s>", eos_token="</s>", pad_token="</s>"
        )
        tokenizer.chat_template = template
        return tokenizer

    return make


def example(*turns: tuple[str, str], row: int = 0, reason: str | None = None) -> Example:
    messages = tuple(Message(*turn) for turn in turns)
    return Example("id", row, messages, "s", "g", reason, "pool/x.jsonl")


U, A, S = "user", "assistant", "system"
CONVERSATIONS = {
    "one": example((U, "What is this?"), (A, "The answer is 42.")),
    "three": example((U, "a"), (A, "First answer"), (U, "b"), (A, "Second"), (U, "c"), (A, "x")),
    "repeated": example((U, "assistant"), (A, "assistant"), (U, "user"), (A, "assistant\nuser")),
    "unicode": example((U, "héé 😀"), (A, "naïve 😀😀 日本語\n\nend")),
    "long": example((U, "q " * 300), (A, "The answer is 42. " * 100 + "end")),
    "open": example((U, "a"), (A, "answered"), (U, "not answered")),
}


def masked_runs(tokenizer, encoded) -> list[str]:
    """The text of every run of response tokens."""
    runs, previous = [], False
    for token, response in zip(encoded.input_ids, encoded.response_mask, strict=True):
        if response and not previous:
            runs.append([])
        if response:
            runs[-1].append(int(token))
        previous = bool(response)
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]


def answers(conversation: Example, end_of_turn: str) -> list[str]:
    return [m.content + end_of_turn for m in conversation.messages if m.role == A]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", TEMPLATES)
def test_the_mask_is_the_assistants_words_and_their_end(family, conversation, make_tokenizer):
    template, end_of_turn = TEMPLATES[family]
    tokenizer = make_tokenizer(template)
    case = CONVERSATIONS[conversation]
    (encoded,) = make_encoder(tokenizer, 4096)([case])
    assert encoded.reason is None
    assert masked_runs(tokenizer, encoded) == answers(case, end_of_turn), "wrong tokens trained on"
    oracle = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in case.messages], return_dict=False
    )
    assert encoded.input_ids.tolist() == oracle, "not the ids that the model was trained with"
    assert encoded.n_tokens == len(oracle)
    assert encoded.n_response_tokens == int(encoded.response_mask.sum())
    assert encoded.digest == case.digest
    assert (encoded.id, encoded.source, encoded.group) == ("id", "s", "g")


@pytest.mark.parametrize("family", ["smollm2", "llama3", "zephyr", "marked"])
def test_system_turns_and_an_assistant_that_begins(family, make_tokenizer):
    template, end_of_turn = TEMPLATES[family]
    tokenizer = make_tokenizer(template)
    cases = [
        example((S, "Be brief."), (U, "What is this?"), (A, "The answer")),
        example((A, "Welcome, user"), (U, "What is this?"), (A, "The answer")),
        example((S, "assistant"), (A, "assistant"), (U, "x"), (A, "y")),
        example((A, "assistant"), (U, "x"), (A, "y")),
    ]
    for case, encoded in zip(cases, make_encoder(tokenizer, 512)(cases), strict=True):
        assert masked_runs(tokenizer, encoded) == answers(case, end_of_turn)


def test_a_generation_prompt_that_the_whole_text_lacks_is_not_used(make_tokenizer):
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
    template = plain + "{% if add_generation_prompt %}{{ 'Now answer:' }}{% endif %}"
    tokenizer = make_tokenizer(template)
    case = CONVERSATIONS["three"]
    (encoded,) = make_encoder(tokenizer, 512)([case])
    assert masked_runs(tokenizer, encoded) == ["assistant: " + a for a in answers(case, "</s>")]


def test_batching_rows_does_not_change_them(make_tokenizer):
    encode = make_encoder(make_tokenizer(SMOLLM2), 4096)
    cases = list(CONVERSATIONS.values())
    for together, case in zip(encode(cases), cases, strict=True):
        (alone,) = encode([case])
        np.testing.assert_array_equal(together.input_ids, alone.input_ids)
        np.testing.assert_array_equal(together.response_mask, alone.response_mask)
    assert encode([]) == []


def test_a_token_across_the_border_goes_with_its_last_character(make_tokenizer):
    tokenizer = make_tokenizer(MISTRAL)
    (encoded,) = make_encoder(tokenizer, 512)([example((U, "x"), (A, "(yes)"))])
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist())
    first = tokens[int(np.argmax(encoded.response_mask))]
    assert first == "](", f"the corpus should have merged the border into one token, not {first}"


@pytest.mark.parametrize("trim", [True, False])
def test_leading_white_space_of_an_answer_is_response(trim, make_tokenizer):
    tokenizer = make_tokenizer(MISTRAL)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim)
    for content in ["  two spaces", "\n\nlines", " one", "end \n"]:
        case = example((U, "x"), (A, content))
        (encoded,) = make_encoder(tokenizer, 512)([case])
        assert masked_runs(tokenizer, encoded) == [content + "</s>"]


def test_a_sentencepiece_like_tokenizer_keeps_the_word_with_its_space(make_tokenizer):
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Replace("▁", " ")
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(["[INST] What is it? [/INST] The answer is it</s>"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = MISTRAL
    case = example((U, "What is it?"), (A, " The answer is it"))
    (encoded,) = make_encoder(tokenizer, 512)([case])
    text = "".join(masked_runs(tokenizer, encoded))
    assert text.endswith("The answer is it</s>"), "the answer's own words were masked out"


@pytest.mark.parametrize("family", ["smollm2", "marked"])
def test_truncation_keeps_the_first_tokens_and_says_so(family, make_tokenizer):
    tokenizer = make_tokenizer(TEMPLATES[family][0])
    case = CONVERSATIONS["three"]
    (whole,) = make_encoder(tokenizer, 4096)([case])
    assert not whole.truncated
    for length in range(1, whole.n_tokens + 1):
        (cut,) = make_encoder(tokenizer, length)([case])
        np.testing.assert_array_equal(cut.input_ids, whole.input_ids[:length])
        np.testing.assert_array_equal(cut.response_mask, whole.response_mask[:length])
        assert cut.truncated == (length < whole.n_tokens)
        assert cut.n_tokens == length
        lost = not whole.response_mask[:length].any()
        assert cut.reason == ("no response tokens within max_length" if lost else None)


def test_the_first_token_is_never_a_response_token(make_tokenizer):
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    (encoded,) = make_encoder(tokenizer, 64)([example((A, "The answer is 42."))])
    assert not encoded.response_mask[0], "nothing precedes it that could predict it"
    assert encoded.response_mask[1:].all()


def test_rows_that_cannot_be_used_keep_their_place_and_reason(make_tokenizer):
    cases = [
        example((U, "a"), (A, "b"), row=0),
        example(row=1, reason="malformed json"),
        example((U, "a"), (U, "b"), (A, "c"), row=2),
        example((S, "a"), (U, "b"), (A, "c"), row=3),
        example((U, "a"), (A, "b"), row=4),
    ]
    encoded = make_encoder(make_tokenizer(MISTRAL), 64)(cases)
    refused = "chat template refused the turns"
    assert [e.row for e in encoded] == [0, 1, 2, 3, 4]
    assert [e.reason for e in encoded] == [None, "malformed json", refused, refused, None]
    assert [e.n_tokens > 0 for e in encoded] == [True, False, False, False, True]
    np.testing.assert_array_equal(encoded[0].input_ids, encoded[4].input_ids)


def test_a_template_that_rewrites_earlier_turns_is_an_error_that_names_the_turn(make_tokenizer):
    tokenizer = make_tokenizer(THINKING)
    encode = make_encoder(tokenizer, 512)
    (single,) = encode([example((U, "a"), (A, "b"))])
    assert masked_runs(tokenizer, single) == ["<think>\n\n</think>\n\nb<|im_end|>"]
    with pytest.raises(InputError, match=r"pool/x\.jsonl row 5: .*turn 1 .*generation"):
        encode([example((U, "a"), (A, "b"), (U, "c"), (A, "d"), row=5)])


def test_missing_and_broken_templates_are_input_errors(make_tokenizer):
    with pytest.raises(InputError, match=r"no chat template.*chat_template"):
        make_encoder(make_tokenizer(None), 64)
    with pytest.raises(InputError, match="no valid Jinja"):
        make_encoder(make_tokenizer("{% for %}"), 64)([CONVERSATIONS["one"]])
    with pytest.raises(ValueError, match="max_length"):
        make_encoder(make_tokenizer(SMOLLM2), 0)


@pytest.mark.parametrize("conversation", ["one", "three", "unicode"])
def test_a_tokenizer_without_offsets_gives_the_same_mask(conversation):
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = SMOLLM2
    assert not tokenizer.is_fast
    case = CONVERSATIONS[conversation]
    (encoded,) = make_encoder(tokenizer, 4096)([case])
    assert masked_runs(tokenizer, encoded) == answers(case, "<|im_end|>")
    tokenizer.chat_template = MARKED
    with pytest.raises(InputError, match="fast tokenizer"):
        make_encoder(tokenizer, 64)


def test_the_day_never_changes_the_ids(make_tokenizer):
    dated = "{{ 'Today is ' + strftime_now('%d %b %Y') + strftime_now(' %Y-%m-%d') + '\n' }}"
    tokenizer = make_tokenizer(dated + SMOLLM2)
    (encoded,) = make_encoder(tokenizer, 512)([CONVERSATIONS["one"]])
    text = tokenizer.decode(encoded.input_ids.tolist())
    assert text.startswith("Today is 26 Jul 2024 2024-07-26\n"), text[:50]


def test_the_fingerprint_follows_what_changes_the_ids_and_nothing_else(make_tokenizer):
    tokenizer = make_tokenizer(SMOLLM2)
    before = template_fingerprint(tokenizer)
    tokenizer(["a", "b c d e"], padding=True, truncation=True, max_length=3)
    assert template_fingerprint(tokenizer) == before, "depends on how it was last called"
    assert template_fingerprint(make_tokenizer(SMOLLM2)) == before
    assert template_fingerprint(make_tokenizer(LLAMA3)) != before, "the template is left out"
    tokenizer.add_tokens(["question"])
    assert template_fingerprint(tokenizer) != before, "an added token is left out"
    normalized = make_tokenizer(SMOLLM2)
    normalized.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert template_fingerprint(normalized) != before, "the normalizer is left out"
