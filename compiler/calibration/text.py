"""The text that weights are rounded with."""

from __future__ import annotations

from pathlib import Path

from ingot.ops.errors import IngotError

SEQUENCES, LENGTH = 64, 512
"""How many pieces of a text are used, and how many tokens each has: more changes the weights little."""


class CalibrationError(IngotError):
    """What weights should be rounded with is missing or too short."""


def windows(file: Path, tokenizer: Path, context: int) -> list[list[int]]:
    """Pieces of a text file in token ids, evenly spread over it, of equal length. CalibrationError: no file, no tokenizer, too short."""
    if not file.is_file():
        raise CalibrationError(f"--calibrate {file}: there is no such file; give a text like what the model will read")
    if not tokenizer.is_file():
        raise CalibrationError(f"--calibrate needs the model's tokenizer, and {tokenizer} is not there")
    from tokenizers import Tokenizer

    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise CalibrationError(f"--calibrate {file} is not UTF-8 text: {e}") from None
    ids = Tokenizer.from_file(str(tokenizer)).encode(text, add_special_tokens=False).ids
    length = min(LENGTH, context)
    count = min(SEQUENCES, len(ids) // length)
    if count < 8:
        raise CalibrationError(f"--calibrate {file} has {len(ids)} tokens; at least {8 * length} are needed")
    starts = [i * (len(ids) - length) // (count - 1) for i in range(count)]
    return [ids[s : s + length] for s in starts]
