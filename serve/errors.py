"""What can be wrong with how Ingot was called, or with the engine that was to serve."""

from __future__ import annotations

from ingot.ops.errors import IngotError


class ResolveError(IngotError):
    """The name on the command line is no artifact and cannot be made one."""


class UsageError(IngotError):
    """Arguments that contradict each other, the model or the artifact."""


class EngineLost(IngotError):
    """The engine's process ended, or could not load the artifact."""
