"""An ONNX file as a model: its tokenizer and settings lie beside it, or in the folder above, as exporters and hubs put them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..source import TOKENIZER_FILES, ModelSource
from .file import OnnxFile, OnnxFileError
from .frontend import OnnxEncoder


class OnnxConfig(PreTrainedConfig):
    """What an artifact's config.json says of a model that came from an ONNX file. `max_position_embeddings`: the most tokens of a text."""

    model_type = "onnx"
    producer: str = ""
    vocab_size: int = 0
    max_position_embeddings: int = 0


def resolve(path: Path) -> tuple[ModelSource, OnnxEncoder]:
    """The model in an ONNX file. OnnxFileError when it is damaged, or is no encoder whose texts can be packed."""
    file = OnnxFile.open(path)
    encoder = OnnxEncoder(file)
    beside = path.resolve().parent
    folder = next((f for f in (beside, beside.parent) if (f / "tokenizer.json").is_file()), beside)
    longest = encoder.max_positions or _positions(folder)
    if longest is None:
        raise OnnxFileError(
            f"{path} has no table of positions, and there is no config.json beside it whose max_position_embeddings says how long a text may be"
        )
    producer = f"{file.model.producer_name} {file.model.producer_version}".strip()
    config = OnnxConfig(producer=producer, vocab_size=encoder.vocab_size, max_position_embeddings=longest, architectures=["OnnxEncoder"])
    name = folder.name if path.stem in ("model", "encoder") else path.stem
    tokenizer = tuple(folder / f for f in TOKENIZER_FILES if (folder / f).is_file())
    return ModelSource(name, folder, config, {}, tokenizer, ()), encoder


def _positions(folder: Path) -> int | None:
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise OnnxFileError(f"{file} is not JSON: {e}") from None
    return config.get("max_position_embeddings") if isinstance(config, dict) else None
