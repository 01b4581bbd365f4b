"""A picture of the figures that `tables.py` wrote: the time of a decode step by batch size, Ingot between its floor and vLLM, a panel a model.

python benchmarks/plot.py benchmarks/results/FILE.json -o benchmarks/plots/decode.svg
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from tables import VLLM

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 300, 230, 46, 34, 44
SERIES = {"floor": ("#888888", "4 3"), "Ingot": ("#1f6feb", ""), "vLLM": ("#e36209", "")}
Points = dict[int, float]


def series(results: dict[str, Any], vllm: dict[str, Any]) -> dict[str, dict[str, Points]]:
    """Model → name → batch size → milliseconds."""
    found = {}
    for model, parts in results["models"].items():
        points = [p for p in parts.get("latency", {}).get("decode", []) if "ms" in p]
        if points:
            theirs = vllm["models"].get(model, {}).get("decode_ms", {})
            found[model] = {
                "floor": {p["batch"]: p["floor_ms"] for p in points},
                "Ingot": {p["batch"]: p["ms"] for p in points},
                "vLLM": {int(b): ms for b, ms in theirs.items()},
            }
    return found


def draw(panels: dict[str, dict[str, Points]], title: str, labels: dict[str, str]) -> str:
    """The SVG: both axes logarithmic, the same time axis in every panel. `labels`: what the legend says for a series, if not its name."""
    values = [ms for lines in panels.values() for points in lines.values() for ms in points.values()]
    low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    batches = sorted({b for lines in panels.values() for points in lines.values() for b in points})
    left, right = math.log2(batches[0]), math.log2(batches[-1])

    def x(panel: int, batch: int) -> float:
        return panel * WIDTH + LEFT + (math.log2(batch) - left) / max(right - left, 1) * (WIDTH - LEFT - 14)

    def y(ms: float) -> float:
        return TOP + (high - math.log2(ms)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    width = WIDTH * len(panels)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT + 22}" font-family="sans-serif" font-size="10" fill="#24292f">',
           f'<title>{escape(title)}</title><rect width="100%" height="100%" fill="white"/>']  # fmt: skip
    for panel, (model, lines) in enumerate(panels.items()):
        out.append(f'<text x="{panel * WIDTH + LEFT}" y="20" font-size="12" font-weight="bold">{escape(model)}</text>')
        for power in range(low, high + 1):
            out.append(f'<path d="M{x(panel, batches[0]):.1f} {y(2**power):.1f}H{x(panel, batches[-1]):.1f}" stroke="#e1e4e8"/>')
            out.append(f'<text x="{panel * WIDTH + LEFT - 5}" y="{y(2**power) + 3:.1f}" text-anchor="end">{2.0**power:g}</text>')
        for batch in batches:
            out.append(f'<text x="{x(panel, batch):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{batch}</text>')
        for name, points in lines.items():
            color, dashes = SERIES[name]
            path = "L".join(f"{x(panel, b):.1f} {y(ms):.1f}" for b, ms in sorted(points.items()))
            if path:
                out.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="1.8" stroke-dasharray="{dashes}"/>')
            out += [f'<circle cx="{x(panel, b):.1f}" cy="{y(ms):.1f}" r="2.4" fill="{color}"/>' for b, ms in points.items()]
        out.append(f'<text x="{panel * WIDTH + (WIDTH + LEFT) / 2:.0f}" y="{HEIGHT - 12}" text-anchor="middle">batch size</text>')
    out.append(f'<text x="12" y="{HEIGHT / 2:.0f}" transform="rotate(-90 12 {HEIGHT / 2:.0f})" text-anchor="middle">ms a decode step</text>')
    for i, (name, (color, dashes)) in enumerate(SERIES.items()):
        at = LEFT + 90 * i
        out.append(f'<path d="M{at} {HEIGHT + 8}h22" stroke="{color}" stroke-width="1.8" stroke-dasharray="{dashes}"/>')
        out.append(f'<text x="{at + 28}" y="{HEIGHT + 12}">{escape(labels.get(name, name))}</text>')
    out.append(f'<text x="{width - 14}" y="{HEIGHT + 12}" text-anchor="end">{escape(title)}</text></svg>')
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    vllm = json.loads(VLLM.read_text())
    panels = series(results, vllm)
    labels = {} if results["device"] == vllm["device"] else {"vLLM": f"vLLM, on {vllm['device']}"}
    if not panels:
        raise SystemExit(f"{args.results} has no latencies: run benchmarks/tables.py with --parts latency")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(draw(panels, f"{results['device']}, {args.results.stem[:10]}", labels))


if __name__ == "__main__":
    main()
