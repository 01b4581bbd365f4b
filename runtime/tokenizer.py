"""Text ↔ token ids and chat templates, from an artifact's `tokenizer/` folder, without transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from ingot.ops.errors import IngotError

from .request import RequestError


class TokenizerError(IngotError):
    """The tokenizer's files are missing or say something that cannot be followed."""


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _File(msgspec.Struct):
    """The part of tokenizer.json that says how tokens become text."""

    decoder: dict[str, Any] | None = None
    added_tokens: list[_AddedToken] = []


class Texts(dict[int, str | None]):
    """The text that each token adds between whole characters, None when it has parts of some; found when it is asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> str | None:
        try:
            text: str | None = self._tokenizer.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            text = None
        self[token_id] = text
        return text


class Tokenizer:
    """tokenizer.json, with the special tokens and the chat template beside it.

    `folder` holds tokenizer.json and, if the model has them, tokenizer_config.json and chat_template.jinja. TokenizerError
    if the first is missing or one of them cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{path} is missing: the model has no fast tokenizer; give prompts as token ids")
        content = path.read_bytes()
        try:
            self._file = msgspec.json.decode(content, type=_File)
            self._backend = tokenizers.Tokenizer.from_buffer(content)
            self.config = json.loads((folder / "tokenizer_config.json").read_bytes()) if (folder / "tokenizer_config.json").is_file() else {}
        except ValueError as e:  # what msgspec, tokenizers and json raise for a malformed file
            raise TokenizerError(f"{folder}: {e}; compile the model again from a tokenizer that loads") from e
        self._backend.no_truncation()
        self._backend.no_padding()
        template = folder / "chat_template.jinja"
        self._template = template.read_text() if template.is_file() else self.config.get("chat_template")
        self._special = frozenset(t.id for t in self._file.added_tokens if t.special)
        self._bytes: dict[int, bytes] = {}
        self.texts = Texts(self)
        self._to_bytes = _decoder(self._file.decoder)

    @property
    def vocab_size(self) -> int:
        """Token ids, added tokens included; a model's vocabulary may be padded beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True, max_length: int | None = None) -> list[int]:
        """Token ids of `text`; special tokens are added as tokenizer.json says, which a chat template's text has already.

        With `max_length`, the text's end is cut so that so many remain, special tokens included.
        """
        encoding = self._backend.encode(text, add_special_tokens=add_special_tokens and max_length is None)
        if max_length is not None:
            encoding.truncate(max(max_length - self._backend.num_special_tokens_to_add(False) * add_special_tokens, 0))
            encoding = self._backend.post_process(encoding, add_special_tokens=add_special_tokens)
        return encoding.ids

    def spellings(self, word: str) -> list[list[int]]:
        """Token ids of `word` where a text begins with it and, where these differ in their first token but not in number, after a space (vLLM's bad_words)."""
        first, after_space = (self.encode(space + word.lstrip(), add_special_tokens=False) for space in ("", " "))
        return [first, after_space] if after_space[:1] != first[:1] and len(after_space) == len(first) else [first]

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence. For text that grows there is `Detokenizer`."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes:
        """The UTF-8 bytes, perhaps part of a character, that a token adds to a text; none of a special token or an unknown id."""
        if skip_special_tokens and token_id in self._special:
            return b""
        known = self._bytes.get(token_id)
        if known is None:
            token = self._backend.id_to_token(token_id)
            known = b"" if token is None else self._to_bytes(token)
            self._bytes[token_id] = known
        return known

    @property
    def has_chat_template(self) -> bool:
        return bool(self._template)

    def apply_chat_template(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, add_generation_prompt: bool = True,
                            **variables: Any) -> str:  # fmt: skip
        """The conversation as the model was trained to read it; encode it with `add_special_tokens=False`.

        RequestError when the template refuses the messages, or the model has none.
        """
        import jinja2

        if not self.has_chat_template:
            raise RequestError("messages: the model has no chat template; use plain completions")
        template = self._templates.get("tool_use") if tools else None
        template = template or self._templates.get("default")
        if template is None:
            raise RequestError(f"messages: the model's chat templates are {', '.join(self._templates)}, and none is for a conversation without tools")
        variables = {"documents": None} | self._special_tokens | variables
        try:
            return template.render(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables)
        except (jinja2.TemplateError, TypeError, ValueError) as e:  # a template computes with whatever the messages hold
            raise RequestError(f"messages: the chat template refuses them: {e}") from e

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        """`bos_token` and its kind: what templates refer to."""
        values = {k: v for k, v in self.config.items() if k.endswith("_token")} | dict(self.config.get("model_specific_special_tokens") or {})
        return {k: v["content"] if isinstance(v, dict) else v for k, v in values.items() if isinstance(v, (str, dict))}

    @cached_property
    def _templates(self) -> dict[str, Any]:
        """Compiled templates by name, in a sandbox that renders as transformers does."""
        import jinja2.ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> None:
            raise jinja2.TemplateError(message)

        def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
            return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

        class Generation(jinja2.ext.Extension):
            """`{% generation %}` marks what an assistant said, for training; here it changes nothing."""

            tags = {"generation"}

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = tojson
        environment.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form))
        texts = {t["name"]: t["template"] for t in self._template} if isinstance(self._template, list) else {"default": str(self._template)}
        try:
            return {name: environment.from_string(text) for name, text in texts.items()}
        except jinja2.TemplateError as e:
            raise TokenizerError(f"the model's chat template cannot be read: {e}") from e


def _decoder(spec: dict[str, Any] | None) -> Any:
    """The function from a token's string to its bytes that tokenizer.json's decoder amounts to.

    Decoders that look at neighbours do so only at the ends of a text (Strip, Fuse); those ends do not exist in a stream.
    """
    kind = None if spec is None else spec["type"]
    if spec is None:
        return lambda token: b" " + token.encode()
    if kind == "ByteLevel":
        return lambda token: bytes(_BYTE_OF[c] for c in token) if all(c in _BYTE_OF for c in token) else token.encode()
    if kind == "WordPiece":
        prefix = spec["prefix"]
        return lambda token: token.removeprefix(prefix).encode() if token.startswith(prefix) else b" " + token.encode()
    if kind == "BPEDecoder":
        return lambda token: token.replace(spec["suffix"], " ").encode()
    steps = spec["decoders"] if kind == "Sequence" else [spec]
    if any(s["type"] == "ByteLevel" for s in steps):
        return _decoder({"type": "ByteLevel"})
    unknown = [s["type"] for s in steps if s["type"] not in ("Replace", "Metaspace", "ByteFallback", "Fuse", "Strip")]
    if unknown or any(s["type"] == "Replace" and "String" not in s["pattern"] for s in steps):
        raise TokenizerError(f"tokenizer.json: the decoder {', '.join(unknown) or 'Replace with a regular expression'} cannot be applied token by token")
    replacements = [(s["pattern"]["String"], s["content"]) if s["type"] == "Replace" else (s["replacement"], " ") for s in steps
                    if s["type"] in ("Replace", "Metaspace")]  # fmt: skip
    byte_fallback = any(s["type"] == "ByteFallback" for s in steps)

    def to_bytes(token: str) -> bytes:
        if byte_fallback and len(token) == 6 and token.startswith("<0x"):
            return bytes.fromhex(token[3:5])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return to_bytes


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()
