"""Import torch for serving alone."""

from __future__ import annotations

import sys
from types import ModuleType

_UNUSED = "torch._meta_registrations"
"""Shape rules of operators, in Python, for tracing. They bring torch's decompositions and references along: a quarter of the import's time."""


def import_torch() -> None:
    """Import torch without what only tracing needs. For a process of our own: no graph can be traced in it afterwards."""
    if "torch" not in sys.modules:
        sys.modules[_UNUSED] = ModuleType(_UNUSED)
    import torch  # noqa: F401
