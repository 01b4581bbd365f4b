"""Importing transformers without what a traced model never asks of it, which is a third of the time that its import takes."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

UNUSED = ("accelerate", "pandas", "scipy", "sklearn", "torchvision")
"""Packages that transformers imports where they are installed: for losses, images, assisted decoding and checkpoints on many devices."""


@contextlib.contextmanager
def lean() -> Iterator[None]:
    """What is imported within takes `UNUSED` packages that nobody has imported yet for not installed; transformers finds its models once.

    A model's own code is imported when it is built, later, and finds all that is installed. What all models share has been
    imported without: this is for a process that does nothing with transformers but trace.
    """
    hidden = [name for name in UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None is how Python itself says that there is no such module
    try:
        _find_models_once()
        yield
    finally:
        from transformers.utils import import_utils

        for name in hidden:
            sys.modules.pop(name, None)
            getattr(import_utils, f"is_{name}_available").cache_clear()


def _find_models_once() -> None:
    """Import `transformers.models`, whose files transformers has read for what they define, and would read again: its cache is too small for them."""
    from transformers.utils import import_utils

    found = import_utils.create_import_structure_from_path
    import_utils.create_import_structure_from_path = lambda path: found(Path(path).parent)  # of a file: what was found in its folder
    try:
        importlib.import_module("transformers.models")
    finally:
        import_utils.create_import_structure_from_path = found
