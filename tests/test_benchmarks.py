"""What the benchmark scripts make of their results: the table beside vLLM, the picture."""

import json
import runpy
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
POINT = {"ms": 1.5, "floor_ms": 0.5, "fraction_of_floor": 1 / 3, "tokens_per_second": 1.0}
RESULTS = {
    "device": "NVIDIA H200",
    "models": {
        "llama-3.1-8b": {
            "compile": {"measured": {"process_seconds": 61.25}},
            "latency": {"decode": [{"batch": 1, **POINT}, {"batch": 16, **POINT, "ms": 2.0}, {"batch": 64, "skipped": "no"}],
                        "prefill": [{"tokens": 1024, **POINT, "ms": 123.4}]},
            "throughput": {"output_tokens_per_second": 9000.4, "floor_output_tokens_per_second": 13000.0},
            "startup": {"seconds": {"ready": 3.0, "first_token": 3.1}},
        },
        "other": {"latency": {"decode": [{"batch": 1, **POINT}], "prefill": []}},
    },
}  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "2026-01-02-nvidia-h200.json"
    path.write_text(json.dumps(RESULTS))
    return path


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a script in this process; what it prints."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(name: str, *args: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_the_table_tells_each_figure_beside_floor_and_vllm(results: Path, script: Callable[..., str]) -> None:
    rows = {cells[1].strip(): [c.strip() for c in cells[2:-1]] for cells in (line.split("|") for line in script("tables.py", "--show", results).splitlines())}
    assert rows[""] == ["llama-3.1-8b", "floor", "vLLM", "other", "floor", "vLLM"]
    assert rows["decode, batch 1, ms"] == ["1.50", "0.50", "4.65", "1.50", "0.50", ""]
    assert rows["decode, batch 16, ms"] == ["2.00", "0.50", "4.92", "", "", ""]
    assert "decode, batch 64, ms" not in rows
    assert rows["prefill 1024 tokens, ms"] == ["123", "0.50", "27.4", "", "", ""]
    assert rows["mixed load, output tokens/s"] == ["9,000", "13,000", "9,940", "", "", ""]
    assert rows["process start to first token, s"] == ["3.10", "", "61.0", "", "", ""]
    assert rows["compile, every kernel measured, s"] == ["61.2", "", "", "", "", ""]


def test_vllm_is_left_out_on_another_device(results: Path, script: Callable[..., str]) -> None:
    results.write_text(json.dumps(RESULTS | {"device": "NVIDIA H100"}))
    assert "4.65" not in script("tables.py", "--show", results)


def test_what_is_there_is_not_run_again(results: Path, script: Callable[..., str]) -> None:
    before = results.read_text()
    assert "llama-3.1-8b" in script("tables.py", "configs/llama-3.1-8b", "--results", results)
    assert results.read_text() == before


def test_the_picture_has_a_panel_a_model_and_a_dot_a_point(results: Path, tmp_path: Path, script: Callable[..., str]) -> None:
    script("plot.py", results, "-o", tmp_path / "decode.svg")
    svg = ET.parse(tmp_path / "decode.svg").getroot()
    texts = [t.text for t in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"llama-3.1-8b", "other", "floor", "Ingot", "vLLM", "NVIDIA H200, 2026-01-02"} <= set(texts)
    lines = [(g.get("class", ""), list(g.iter("{http://www.w3.org/2000/svg}circle"))) for g in svg.iter("{http://www.w3.org/2000/svg}g")]
    dots = [(of, len(found)) for of, found in lines if found]
    # two steps and a prompt of ours; of vLLM's five and two, the floors of as many are known: times, then shares
    assert dots[:5] == [("ours", 3), ("ours floor", 3), ("theirs", 7), ("ours", 3), ("theirs", 3)]
    assert dots[5:] == [("ours", 1), ("ours floor", 1), ("ours", 1)]
    low = {of: max(float(d.get("cy", 0)) for d in found) for of, found in lines[:3]}
    assert max(low, key=lambda of: low[of]) == "ours floor"  # nothing is below it


def test_a_picture_says_so_when_vllm_ran_elsewhere(results: Path, tmp_path: Path, script: Callable[..., str]) -> None:
    results.write_text(json.dumps(RESULTS | {"device": "NVIDIA H100"}))
    script("plot.py", results, "-o", tmp_path / "decode.svg")
    svg = (tmp_path / "decode.svg").read_text()
    assert all(f">{label}<" in svg for label in ("Ingot, on H100", "floor of the H100", "vLLM, on H200", "floor of the H200"))


def test_http_is_measured_without_a_model(tmp_path: Path) -> None:
    """The real engine and server; the executor takes its time and computes nothing."""
    out = tmp_path / "http.json"
    sizes = ["--streams=6", "--tokens=20", "--prompt-tokens=5", "--rounds=1", "--clients=1", "--api-workers=1"]
    command = [sys.executable, str(BENCHMARKS / "http_streams.py"), "--null-step-ms=5", *sizes, "-o", str(out)]
    subprocess.run(command, capture_output=True, check=True, timeout=120)
    result = json.loads(out.read_text())
    assert result["model"].startswith("none")
    assert 0 < result["generate_tokens_per_second"] < 6 / 0.005
    (http,) = result["http"]
    assert 0 < http["tokens_per_second"] < 6 / 0.005
    assert http["cpu_us_per_token"].keys() == http["cpu_us_per_request"].keys() == {"engine", "api", "clients"}
    assert all(us > 0 for us in http["cpu_us_per_request"].values())


def test_vllms_figures_name_their_source() -> None:
    data = json.loads((BENCHMARKS / "data" / "vllm-0.26.0-h200.json").read_text())
    assert data["source"] and data["device"]
