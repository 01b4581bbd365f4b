"""Where a model comes from: a local folder, a hub id, or the bundled model."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ingot.ops.errors import IngotError

from . import sentence_transformers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BUNDLED = Path(__file__).parent / "bundled"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model", "tekken.json",
)  # fmt: skip
_CONFIG_FILES = ("config.json", "generation_config.json", *sentence_transformers.FILES)
_WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json")


class SourceError(IngotError):
    """The model cannot be found, or is of a kind that transformers does not define."""


@dataclass(frozen=True)
class ModelSource:
    """A model's folder and what its small files say. There may be no weights: `config.json` alone is a model with dummy weights."""

    name: str  # the folder's name, or the hub id's last part
    folder: Path
    config: PretrainedConfig
    generation_config: dict[str, Any]
    tokenizer_files: tuple[Path, ...]
    eos_token_ids: tuple[int, ...]


def resolve(name: str | None, *, trust_remote_code: bool = False, weights: bool = True) -> ModelSource:
    """The model called `name`: a folder, a hub id ("org/model"), or None or "bundled".

    A hub id is downloaded once (configuration, tokenizer, and safetensors unless `weights` is false) to Hugging Face's own cache, which
    `HF_HOME` moves; with `HF_HUB_OFFLINE` only that cache is asked. No code of the repository runs unless `trust_remote_code`.
    SourceError: there is no such model, it has no config.json, or transformers does not define its model_type.
    """
    if name is None or name == "bundled":
        return _from_folder("bundled", BUNDLED, trust_remote_code)
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_folder(path.resolve().name, path, trust_remote_code)
    if path.exists():
        raise SourceError(f"{name} is a file; name the folder that holds config.json")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise SourceError(f"there is no folder {name}; a model is a folder with a config.json, a hub id such as Qwen/Qwen3-0.6B, or bundled")
    return _from_folder(name.split("/")[1], _download(name, trust_remote_code, weights), trust_remote_code)


def _download(repo: str, trust_remote_code: bool, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = [*_CONFIG_FILES, *TOKENIZER_FILES, *(_WEIGHT_FILES if weights else ()), *(("*.py",) if trust_remote_code else ())]
    by_hand = f"download it where there is a network, with `hf download {repo}`, and name the folder"
    try:
        return Path(snapshot_download(repo, allow_patterns=wanted, ignore_patterns="[!1]*/*"))  # of folders, 1_Pooling alone
    except HFValidationError as e:
        raise SourceError(f"{repo} is neither a folder nor a hub id: {e}") from None
    except GatedRepoError:
        raise SourceError(f"{repo} is gated: accept its terms on its page on the hub, then log in with `hf auth login`") from None
    except RepositoryNotFoundError:
        raise SourceError(f"{repo} is not on the hub, or is private: check the spelling, or log in with `hf auth login`") from None
    except LocalEntryNotFoundError:
        raise SourceError(f"{repo} is neither a folder nor in the local cache, and the hub cannot be reached; {by_hand}") from None
    except OSError as e:
        raise SourceError(f"{repo} could not be downloaded ({e}); try again, or {by_hand}") from None


def _from_folder(name: str, folder: Path, trust_remote_code: bool) -> ModelSource:
    file = folder / "config.json"
    if not file.is_file():
        raise SourceError(f"{folder} has no config.json; a model's folder holds the files that `save_pretrained` writes")
    config = read_config(file, trust_remote_code)
    generation_file = folder / "generation_config.json"
    generation = _json(generation_file) if generation_file.is_file() else {}
    eos = generation.get("eos_token_id", getattr(config.get_text_config(), "eos_token_id", None))
    return ModelSource(
        name=name,
        folder=folder,
        config=config,
        generation_config=generation,
        tokenizer_files=tuple(folder / f for f in TOKENIZER_FILES if (folder / f).is_file()),
        eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
    )


def read_config(file: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config in a config.json. SourceError when it describes no model that transformers defines."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    raw = _json(file)
    kind = raw.get("model_type")
    if kind in CONFIG_MAPPING or ("auto_map" in raw and trust_remote_code):
        try:
            return AutoConfig.from_pretrained(file.parent, trust_remote_code=trust_remote_code)
        except (StrictDataclassError, ValueError, TypeError, KeyError, ArithmeticError) as e:
            raise SourceError(f"{file} does not describe a {kind} model: {e}") from None
    if "auto_map" in raw:
        raise SourceError(f"{file.parent} brings its own modeling code ({raw['auto_map']}): read it, then pass --trust-remote-code to run it")
    if kind is None:
        raise SourceError(f"{file} has no model_type; transformers needs one to choose a model class")
    near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise SourceError(f"{file}: transformers defines no model_type {kind!r}{hint} (a newer transformers may)")


class _Vocabulary(msgspec.Struct):
    vocab: dict[str, int] | list[Any]  # a list: of [token, score]


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _TokenizerFile(msgspec.Struct):
    model: _Vocabulary
    added_tokens: list[_AddedToken] = []


def check_vocabulary(source: ModelSource) -> None:
    """SourceError when tokenizer.json has tokens that the model has no embedding for, or cannot be read."""
    size = getattr(source.config.get_text_config(decoder=True), "vocab_size", None)
    for file in source.tokenizer_files:
        if file.name != "tokenizer.json" or size is None:
            continue
        try:
            tokenizer = msgspec.json.decode(file.read_bytes(), type=_TokenizerFile)
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            raise SourceError(f"{file} is no tokenizer ({e}); download it again") from None
        vocab = tokenizer.model.vocab
        ids = dict(vocab) if isinstance(vocab, dict) else {f"number {len(vocab) - 1}": len(vocab) - 1}
        ids |= {t.content: t.id for t in tokenizer.added_tokens}
        if beyond := sorted((i, t) for t, i in ids.items() if i >= size):
            tokens = ", ".join(f"{t!r} ({i})" for i, t in beyond[:4]) + (f" and {len(beyond) - 4} more" if len(beyond) > 4 else "")
            raise SourceError(f"{file} has tokens that the model's vocabulary of {size} does not: {tokens}; "
                              "use the tokenizer that belongs to this checkpoint, or take these tokens out of it")  # fmt: skip


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise SourceError(f"{file} is not JSON: {e}") from None
    if not isinstance(value, dict):
        raise SourceError(f"{file} should hold a JSON object")
    return value
