"""A picture of the latencies that `tables.py` wrote, a column a model: decode steps by batch size and prompts by length, Ingot and vLLM each above
the floor of the card that it ran on; below, how much of its floor each reaches, which is what compares engines on different cards.

python benchmarks/plot.py benchmarks/results/FILE.json -o benchmarks/results/FILE.svg
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from tables import VLLM

WIDTH, LEFT, RIGHT, TOP, TIMES, GAP, SHARES, BOTTOM = 332, 52, 16, 34, 190, 26, 90, 66
BETWEEN = 1.7
"""Octaves between the axis of batch sizes and that of lengths."""
AXES = {"decode": ("batch", "decode, batch size"), "prefill": ("tokens", "prompt, tokens")}
OCTAVES = Callable[[str, int], float]
STYLE = """
path { fill: none; stroke: currentColor; stroke-width: 1.8 } circle { fill: currentColor } .floor path { stroke-dasharray: 4 3; stroke-width: 1.2 }
text { fill: #24292f } .page { fill: #fff } .grid { stroke: #d8dee4; stroke-width: 1 } .ours { color: #0969da } .theirs { color: #bc4c00 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .page { fill: #0d1117 } .grid { stroke: #30363d } .ours { color: #58a6ff } .theirs { color: #f0883e }
}
"""
Lines = dict[str, dict[str, dict[int, float]]]
"""Name → "decode" or "prefill" → batch size or tokens → milliseconds."""
CLASSES = {"Ingot": "ours", "floor": "ours floor", "vLLM": "theirs", "vLLM's floor": "theirs floor"}


def series(results: dict[str, Any], vllm: dict[str, Any]) -> dict[str, Lines]:
    """The lines of each model. vLLM has a floor of its own where it ran on another card."""
    found = {}
    for model, parts in results["models"].items():
        points = {kind: [p for p in parts.get("latency", {}).get(kind, []) if "ms" in p] for kind in AXES}
        theirs = vllm["models"].get(model, {})
        if not points["decode"]:
            continue
        lines: Lines = {
            name: {kind: {p[AXES[kind][0]]: p[key] for p in points[kind]} for kind in AXES} for name, key in (("Ingot", "ms"), ("floor", "floor_ms"))
        }
        for name, key in (("vLLM", "ms"), ("vLLM's floor", "floor_ms")):
            if name == "vLLM" or results["device"] != vllm["device"]:
                lines[name] = {kind: {int(n): ms for n, ms in theirs.get(f"{kind}_{key}", {}).items()} for kind in AXES}
        found[model] = lines
    return found


def shares(lines: Lines) -> Lines:
    """How much of its floor each engine reaches."""
    theirs = lines.get("vLLM's floor", lines["floor"])
    return {
        name: {kind: {n: floors[kind][n] / ms for n, ms in points.items() if n in floors[kind]} for kind, points in lines[name].items()}
        for name, floors in (("Ingot", lines["floor"]), ("vLLM", theirs))
    }


def draw(panels: dict[str, Lines], title: str, labels: dict[str, str]) -> str:
    """The SVG, readable on light and dark pages: logarithmic axes, the same in every panel; shares of the floor from 0 to 100%."""
    every = [(kind, n, ms) for lines in panels.values() for sections in lines.values() for kind, points in sections.items() for n, ms in points.items()]
    low, high = math.floor(math.log2(min(ms for *_, ms in every))), math.ceil(math.log2(max(ms for *_, ms in every)))
    ticks = {kind: sorted({n for k, n, _ in every if k == kind}) for kind in AXES}
    octave, end = _octaves(ticks)
    width, height = WIDTH * len(panels), TOP + TIMES + GAP + SHARES + BOTTOM

    def y_time(ms: float) -> float:
        return TOP + (high - math.log2(ms)) / (high - low) * TIMES

    def y_share(share: float) -> float:
        return TOP + TIMES + GAP + (1 - share) * SHARES

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="10">',
           f'<title>{escape(title)}</title><style>{STYLE}</style><rect class="page" width="100%" height="100%"/>']  # fmt: skip
    for column, (model, lines) in enumerate(panels.items()):
        begin = column * WIDTH + LEFT

        def x(kind: str, n: int, begin: int = begin) -> float:
            return begin + octave(kind, n) / end * (WIDTH - LEFT - RIGHT)

        out.append(f'<text x="{begin}" y="20" font-size="12" font-weight="bold">{escape(model)}</text>')
        marks = [(y_time(2**p), f"{2.0**p:g}" if p % 2 == 0 else "") for p in range(low, high + 1)]
        marks += [(y_share(percent / 100), f"{percent}%") for percent in (0, 50, 100)]
        for y, label in marks:
            for kind, numbers in ((k, t) for k, t in ticks.items() if t):
                out.append(f'<path class="grid" d="M{x(kind, numbers[0]):.1f} {y:.1f}H{x(kind, numbers[-1]):.1f}"/>')
            out.append(f'<text x="{begin - 6}" y="{y + 3:.1f}" text-anchor="end">{label}</text>')
        for kind, numbers in ((k, t) for k, t in ticks.items() if t):
            out += [f'<text x="{x(kind, n):.1f}" y="{height - BOTTOM + 14}" text-anchor="middle">{n}</text>' for n in numbers]
            middle = (x(kind, numbers[0]) + x(kind, numbers[-1])) / 2
            out.append(f'<text x="{middle:.1f}" y="{height - BOTTOM + 28}" text-anchor="middle">{AXES[kind][1]}</text>')
        for found, y_of in ((lines, y_time), (shares(lines), y_share)):
            out += [_line(name, [[(x(kind, n), y_of(v)) for n, v in sorted(p.items())] for kind, p in sections.items()]) for name, sections in found.items()]
    for y, label in ((TOP + TIMES / 2, "milliseconds"), (y_share(0.5), "of the floor")):
        out.append(f'<text x="11" y="{y:.0f}" transform="rotate(-90 11 {y:.0f})" text-anchor="middle">{label}</text>')
    at = float(LEFT)
    for name in next(iter(panels.values())):
        label = labels.get(name, name)
        out.append(_line(name, [[(at, height - 15), (at + 22, height - 15)]], dots=False))
        out.append(f'<text x="{at + 27:.0f}" y="{height - 11}">{escape(label)}</text>')
        at += 50 + 5.5 * len(label)
    out.append(f'<text x="{width - RIGHT}" y="{height - 11}" text-anchor="end">{escape(title)}</text></svg>')
    return "\n".join(out) + "\n"


def _octaves(ticks: dict[str, list[int]]) -> tuple[OCTAVES, float]:
    """Where a number of an axis stands, in octaves from the left, the axes one after the other; and how many octaves there are."""
    start, end = {}, 0.0
    for kind, numbers in ticks.items():
        if numbers:
            start[kind] = end + (BETWEEN if end else 0.0)
            end = start[kind] + math.log2(numbers[-1] / numbers[0])
    return lambda kind, n: start[kind] + math.log2(n / ticks[kind][0]), max(end, 1.0)


def _line(name: str, pieces: list[list[tuple[float, float]]], dots: bool = True) -> str:
    """Pieces of a line, with a dot a point."""
    paths = [f'<path d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in piece)}"/>' for piece in pieces if len(piece) > 1]
    circles = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for piece in pieces for x, y in piece if dots]
    return f'<g class="{CLASSES[name]}">{"".join(paths + circles)}</g>'


def _card(device: str) -> str:
    return device.removeprefix("NVIDIA ").split()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    results = json.loads(args.results.read_text())
    vllm = json.loads(VLLM.read_text())
    panels = series(results, vllm)
    labels = {}
    if results["device"] != vllm["device"]:
        ours, theirs = _card(results["device"]), _card(vllm["device"])
        labels = {"Ingot": f"Ingot, on {ours}", "floor": f"floor of the {ours}", "vLLM": f"vLLM, on {theirs}", "vLLM's floor": f"floor of the {theirs}"}
    if not panels:
        raise SystemExit(f"{args.results} has no latencies: run benchmarks/tables.py with --parts latency")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(draw(panels, f"{results['device']}, {args.results.stem[:10]}", labels))


if __name__ == "__main__":
    main()
