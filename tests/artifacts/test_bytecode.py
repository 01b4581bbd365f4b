"""Libraries without bytecode get it in the store, and those that have it, or will, are left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROBE = "import ingot.serve, sys; import torch, os; print(sys.pycache_prefix, os.environ.get('PYTHONDONTWRITEBYTECODE', '-'), torch.number)"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a torch of one line."""
    (tmp_path / "site" / "torch").mkdir(parents=True)
    (tmp_path / "site" / "torch" / "__init__.py").write_text("number = 7\n")
    return tmp_path / "site"


def probe(site: Path, **env: str) -> str:
    everything = {"INGOT_HOME": str(site.parent / "home"), "PYTHONPATH": str(site)} | env
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run([sys.executable, "-c", PROBE], env=clean | everything, capture_output=True, text=True, check=True).stdout.strip()


def test_bytecode_that_python_may_not_write_goes_to_the_store(site: Path) -> None:
    home = site.parent / "home"
    assert probe(site, PYTHONDONTWRITEBYTECODE="1") == f"{home}/bytecode - 7"
    (cached,) = (home / "bytecode").rglob("torch/*.pyc")
    time = cached.stat().st_mtime_ns
    assert probe(site, PYTHONDONTWRITEBYTECODE="1") == f"{home}/bytecode - 7"
    assert cached.stat().st_mtime_ns == time  # read, not written again
    assert not (site / "torch" / "__pycache__").exists()


def test_what_python_can_do_itself_is_left_to_it(site: Path) -> None:
    assert probe(site) == "None - 7"
    assert (site / "torch" / "__pycache__").exists()
    assert probe(site, PYTHONDONTWRITEBYTECODE="1") == "None 1 7"  # there is bytecode now
    assert probe(site, PYTHONPYCACHEPREFIX="/tmp/of-their-own", PYTHONDONTWRITEBYTECODE="1") == "/tmp/of-their-own 1 7"
    assert not (site.parent / "home").exists()
