"""Adapters: methods of transformers' modules that compute their attention or recurrence themselves, said through the dialect.

An adapter replaces one method of one class while a model is traced; it is written against the class's own attributes, and the
oracle compares the whole. A model needs one only where neither transformers' interfaces nor a swap reaches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ADAPTERS: dict[tuple[str, str], Callable[..., Any]] = {}
"""("package.Class" below transformers.models, method) → the method that stands in for it."""


def adapts(*classes: str, method: str = "forward") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as `method` of the named classes."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        ADAPTERS.update(((name, method), function) for name in classes)
        return function

    return register
