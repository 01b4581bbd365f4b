"""What every test shares: no network, one torch thread a worker, and the flag that rewrites golden files."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden from what the compiler does now")


@pytest.fixture(scope="session")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a run, the same for all workers, so that nothing is compiled twice: for tests that do not care what else is in it."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "home"


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`gpu` tests are deselected without a device, `nightly` ones unless asked for with -m."""
    asked = config.getoption("-m")
    left_out = [i for i in items if (i.get_closest_marker("gpu") and not torch.cuda.is_available()) or (i.get_closest_marker("nightly") and not asked)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [i for i in items if i not in left_out]
