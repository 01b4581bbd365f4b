"""Bytecode for libraries that came without it, kept in the store: importing torch then takes a second instead of three.

Installers need not compile what they install, and where the installation is read-only, or PYTHONDONTWRITEBYTECODE is set as
container images like to, Python compiles every library again in every process.
"""

from __future__ import annotations

import importlib.util
import os
import sys

from .settings import settings


def use_bytecode_cache() -> None:
    """Have this process and its children read and write bytecode under `INGOT_HOME`, if torch has none and would get none."""
    if sys.pycache_prefix is not None or not _is_missing("torch"):
        return
    folder = str(settings().home / "bytecode")
    sys.pycache_prefix, sys.dont_write_bytecode = folder, False
    os.environ["PYTHONPYCACHEPREFIX"] = folder
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def _is_missing(package: str) -> bool:
    """Whether a package's bytecode is not there and will not be when it is imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None or spec.cached is None:
        return False
    return not os.path.exists(spec.cached) and (sys.dont_write_bytecode or not os.access(os.path.dirname(spec.origin), os.W_OK))
