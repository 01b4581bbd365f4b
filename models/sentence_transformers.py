"""What the files of sentence-transformers beside a checkpoint say: how its embeddings are made from hidden states.

`modules.json` lists the steps; `1_Pooling/config.json` is the pooling's; `sentence_bert_config.json` has the longest text
(sbert.net, "Creating Custom Models").
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ingot.ops.errors import IngotError

FILES = ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json")
_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last"}


class SentenceTransformersError(IngotError):
    """The files ask for something that an embedding here cannot be, or cannot be read."""


@dataclass(frozen=True)
class EmbeddingSettings:
    """Pooling ("mean", "cls" or "last"), whether vectors are scaled to length 1, and the most tokens of a text, if a file says so."""

    pooling: str = "mean"
    normalize: bool = True
    max_seq_length: int | None = None


def read(folder: Path) -> EmbeddingSettings:
    """The settings in a model's folder; without `modules.json` the defaults above, which are those of embedding servers."""
    if not (folder / "modules.json").is_file():
        return EmbeddingSettings()
    steps = [(str(m.get("type", "")).rpartition(".")[2], str(m.get("path", ""))) for m in _json(folder / "modules.json", list)]
    known = {"Transformer", "Pooling", "Normalize"}
    if other := [kind for kind, _ in steps if kind not in known]:
        raise SentenceTransformersError(f"{folder}/modules.json: {', '.join(other)} is not supported; embeddings are pooled hidden states, normalized or not")
    pooling = next((_pooling(folder / path / "config.json") for kind, path in steps if kind == "Pooling"), "mean")
    limits = folder / "sentence_bert_config.json"
    longest = _json(limits, dict).get("max_seq_length") if limits.is_file() else None
    return EmbeddingSettings(pooling, any(kind == "Normalize" for kind, _ in steps), None if longest is None else int(longest))


def _pooling(file: Path) -> str:
    config = _json(file, dict)
    modes = [n for n, on in config.items() if n.startswith("pooling_mode_") and on]
    if "pooling_mode" in config:
        modes = [n for n, pooling in _POOLINGS.items() if pooling == config["pooling_mode"] or n == f"pooling_mode_{config['pooling_mode']}"]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise SentenceTransformersError(
            f"{file}: pooling by {', '.join(modes) or 'nothing that is known'} is not supported; {', '.join(_POOLINGS)} are, one at a time"
        )
    return _POOLINGS[modes[0]]


def _json(file: Path, kind: type) -> Any:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise SentenceTransformersError(f"{file} cannot be read: {e}") from None
    if not isinstance(value, kind):
        raise SentenceTransformersError(f"{file} should hold a JSON {'list' if kind is list else 'object'}")
    return value
