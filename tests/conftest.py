"""What every test shares: no network, one torch thread a worker, and the flags that write files: golden graphs, the last nightly's result."""

import datetime
import importlib.metadata
import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core: threads of theirs would wait for each other, spinning, where there are more than cores
    os.environ |= {"OMP_NUM_THREADS": "1", "INGOT_NUM_THREADS": "1"}

from pathlib import Path

import hypothesis
import pytest
import torch

# the same examples in every run, so that a red one means the change; tests under `nightly` look for new ones, and for more of them
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden from what the compiler does now")
    parser.addoption("--record", action="store_true", help="write the result of this run to tests/nightly.json, as `make nightly` does")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    if config.getoption("--record"):
        stats = {k: terminalreporter.stats.get(k, []) for k in ("passed", "failed", "error", "skipped")}
        result = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "selected": " ".join(["-m", repr(config.getoption("-m")), *config.args]),
            "finished": exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED),
            **{k: len(reports) for k, reports in stats.items()},
            "failures": sorted(report.nodeid for k in ("failed", "error") for report in stats[k]),
            "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers")},
        }
        Path(__file__).with_name("nightly.json").write_text(json.dumps(result, indent=1) + "\n")


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
