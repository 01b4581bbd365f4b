"""Tokens and text, against tokenizers; chat templates, against transformers."""

import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers.utils.chat_template_utils import render_jinja_template

from ingot.runtime.request import RequestError
from ingot.runtime.tokenizer import Tokenizer, TokenizerError

TEXT = "The naïve café — 日本語のテキスト, 😀👩‍👩‍👧 and Ω≈ç√; plain words follow: low lower lowest\n\n\ttabs"


def byte_level() -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["Ġl", "Ġlo", "Ġlow", "er"]
    vocab = {t: i for i, t in enumerate([*alphabet, *words])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("Ġ", "l"), ("Ġl", "o"), ("Ġlo", "w"), ("e", "r")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_fallback() -> tokenizers.Tokenizer:
    """As SentencePiece's converted models (Llama 2, Gemma): ▁ for a space, bytes for unknown characters."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *sorted(set("▁Thenaiv,plwordsfc:;\n"))]
    backend = tokenizers.Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return backend


def metaspace() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(set(TEXT) | {"▁"}))}, []))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def word_piece() -> tokenizers.Tokenizer:
    words = {w: i for i, w in enumerate(["[UNK]", "low", "##er", "##est", "plain", "words"])}
    backend = tokenizers.Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return backend


KINDS = {"byte level": byte_level, "byte fallback": byte_fallback, "metaspace": metaspace, "word piece": word_piece}


def save(folder: Path, backend: tokenizers.Tokenizer, config: dict | None = None, template: str | None = None) -> Tokenizer:
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return Tokenizer(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_tokens_make_the_text(tmp_path, kind):
    tokenizer = save(tmp_path, KINDS[kind]())
    for text in (TEXT, "low lower lowest plain words", "a"):
        ids = tokenizer.encode(text)
        joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
        assert joined.removeprefix(" ") == tokenizer.decode(ids).removeprefix(" ")
        for token_id in ids:
            whole = tokenizer.texts[token_id]
            assert whole is None or whole.encode() == tokenizer.token_bytes(token_id)
        assert any(tokenizer.texts[t] is not None for t in ids)
        if kind != "word piece":
            assert joined.removeprefix(" ") == text


def test_special_tokens_are_added_and_not_shown(tmp_path):
    backend = byte_level()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens(["<think>", "two words é"])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    tokenizer = save(tmp_path, backend)
    ids = tokenizer.encode("low<think>two words é</s>")
    assert ids[0] == backend.token_to_id("<s>")
    assert ids[1:] == tokenizer.encode("low<think>two words é</s>", add_special_tokens=False)
    assert tokenizer.decode(ids) == b"".join(map(tokenizer.token_bytes, ids)).decode() == "low<think>two words é"
    assert tokenizer.token_bytes(ids[-1], skip_special_tokens=False) == b"</s>"
    assert tokenizer.vocab_size == backend.get_vocab_size()
    assert tokenizer.token_bytes(100_000) == b""  # a vocabulary padded beyond the tokenizer's


@pytest.mark.parametrize("kind", ["byte level", "byte fallback", "metaspace"])
def test_added_tokens_are_decoded_as_the_others(tmp_path, kind):
    """Gemma's runs of spaces are added tokens."""
    backend = KINDS[kind]()
    backend.add_tokens(["▁▁", "Ġq", "<0x41>", "naïve é"])
    tokenizer = save(tmp_path, backend)
    for token in ("▁▁", "Ġq", "<0x41>", "naïve é"):
        ids = [tokenizer.encode("a")[-1], backend.token_to_id(token)]
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() == tokenizer.decode(ids)


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    assert save(tmp_path, backend).decode(save(tmp_path, backend).encode("a longer text")) == "a longer text"


def test_files_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer.json is missing"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"decoder": 3}')
    with pytest.raises(TokenizerError, match=str(tmp_path)):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=str(tmp_path)):
        save(tmp_path, byte_level())
    (tmp_path / "tokenizer_config.json").unlink()
    backend = byte_level()
    backend.decoder = decoders.CTC()
    with pytest.raises(TokenizerError, match="the decoder CTC cannot be applied token by token"):
        save(tmp_path, backend)
    backend.decoder = decoders.Sequence([decoders.Replace(tokenizers.Regex("a+"), "b"), decoders.Fuse()])
    with pytest.raises(TokenizerError, match="Replace with a regular expression"):
        save(tmp_path, backend)


MESSAGES = [
    {"role": "system", "content": "Be <brief> & 'exact'."},
    {"role": "user", "content": "What is 1 < 2?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "compare", "arguments": {"a": 1, "b": "ü"}}}]},
    {"role": "tool", "content": "true"},
    {"role": "user", "content": "  And now? "},
]
TOOLS = [{"type": "function", "function": {"name": "compare", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}]
TEMPLATE = """
{{- bos_token }}
{%- set ns = namespace(last=none) %}
{%- if tools %}
    {{- '<tools>' + (tools | tojson(indent=2)) }}
{%- endif %}
{% for message in messages %}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
<|{{ message['role'] }}|>
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}{{ call.function.arguments | tojson }}{% endfor %}
    {%- else %}
        {%- generation %}{{ message.content | trim }}{% endgeneration %}
    {%- endif %}
    {%- set ns.last = message.role %}
{% endfor %}
{%- if add_generation_prompt and ns.last == 'user' %}<|assistant|>{{ eos_token }}{{ mode }}{% endif %}
{{- strftime_now('%Y') | length }}"""


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_render_as_in_transformers(tmp_path, tools, prompt):
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None, "add_bos_token": True}
    tokenizer = save(tmp_path, byte_level(), config, TEMPLATE)
    assert tokenizer.has_chat_template
    found = tokenizer.apply_chat_template(MESSAGES, tools, prompt, mode="fast")
    [expected], _ = render_jinja_template(
        [MESSAGES], tools=tools, chat_template=TEMPLATE, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>", mode="fast"
    )
    assert found == expected
    assert ("</s>fast" in found) == prompt


def test_a_template_of_the_config_may_have_one_for_tools(tmp_path):
    config = {
        "chat_template": [{"name": "default", "template": "plain {{ messages | length }}"}, {"name": "tool_use", "template": "tools {{ tools | length }}"}]
    }
    tokenizer = save(tmp_path, byte_level(), config)
    assert tokenizer.apply_chat_template(MESSAGES) == "plain 5"
    assert tokenizer.apply_chat_template(MESSAGES, TOOLS) == "tools 1"
    assert save(tmp_path, byte_level(), {"chat_template": "only {{ tools }}"}).apply_chat_template(MESSAGES, []) == "only []"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the model has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + messages[2].content }}", "the chat template refuses them"),
        ("{{ messages.__class__.__mro__ }}", "the chat template refuses them"),
        ("{{ messages.append(1) }}", "the chat template refuses them"),
    ],
)
def test_messages_that_a_template_refuses(tmp_path, template, message):
    tokenizer = save(tmp_path, byte_level(), template=template)
    with pytest.raises(RequestError, match=f"^messages: .*{message}"):
        tokenizer.apply_chat_template(MESSAGES)


def test_a_template_that_cannot_be_read(tmp_path):
    with pytest.raises(TokenizerError, match="chat template cannot be read"):
        save(tmp_path, byte_level(), template="{% for %}").apply_chat_template(MESSAGES)


@pytest.mark.parametrize(("kind", "prefix"), [("byte level", ""), ("byte fallback", " ")])
def test_random_texts_survive(tmp_path, kind, prefix):
    rng = random.Random(0)
    tokenizer = save(tmp_path, KINDS[kind]())
    for _ in range(60):
        text = "".join(rng.choice("abc low ,é語😀\n\x00") for _ in range(rng.randint(1, 30)))
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))).decode() == prefix + text
