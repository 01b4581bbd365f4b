"""Where the time of a decode step goes: on the device and on the host, with steps one after another and overlapped. JSON, and a plot as SVG.

    python benchmarks/step_profile.py CONFIG_DIR_OR_MODEL [--batch 1,16,64,256] [-o FILE.json] [--svg FILE.svg]

Per batch size, over steps in which every sequence decodes a sampled token, through the public engine:
  step_us   from step to step, mean
  host_us   the host's part of a step, without its wait for the device, median
  idle_us   the device, from the end of a step to the beginning of the next one (CUDA events; median, and the 90th percentile)
  gaps_us   the device, from a step's last copy to the first kernel of the next plan: all that is idle between copies and kernels (profiler, median)
The plot shows a few steps: what the device computes and copies (torch's profiler, which slows the host down a little), and where it is idle.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from ingot.compiler.build import CompileOptions, compile_model
from ingot.runtime import LLM, SamplingParams
from ingot.runtime.batch import Sampled, StepBatch
from ingot.runtime.engine import Engine
from ingot.runtime.request import Request

PROMPT, WARM, STEPS, SHOWN = 128, 16, 100, 4


class Watched:
    """An executor with a clock at its waits, and CUDA events around its steps if they are asked for: they cost the host some time."""

    def __init__(self, executor: Any, with_events: bool) -> None:
        self._executor, self._with_events = executor, with_events
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.waited = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def launch(self, batch: StepBatch) -> WatchedStep:
        if not self._with_events:
            return WatchedStep(self, self._executor.launch(batch))
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step = self._executor.launch(batch)
        end.record()
        self.events.append((begin, end))
        return WatchedStep(self, step)


class WatchedStep:
    """A step on its way; the wait for it is timed."""

    def __init__(self, watched: Watched, step: Any) -> None:
        self._watched, self._step = watched, step

    def result(self) -> Sampled:
        begin = time.perf_counter()
        sampled = self._step.result()
        self._watched.waited += time.perf_counter() - begin
        return sampled


def steps(engine: Engine, with_events: bool) -> tuple[list[float], list[float], list[float]]:
    """Seconds of each step, of the host's part of it, and of what the device idled before it."""
    plain = engine.executor
    watched = Watched(plain, with_events)
    engine.executor = watched
    whole, host = [], []
    for _ in range(WARM + STEPS):
        watched.waited, begin = 0.0, time.perf_counter()
        engine.step()
        whole.append(time.perf_counter() - begin)
        host.append(whole[-1] - watched.waited)
    torch.cuda.synchronize()
    engine.executor = plain
    idle = [max(0.0, a[1].elapsed_time(b[0]) / 1e3) for a, b in zip(watched.events, watched.events[1:], strict=False)]
    return whole[WARM:], host[WARM:], sorted(idle[WARM:])


def decoding(engine: Engine, batch: int, tokens: int, temperature: float) -> None:
    """Fill the engine with sequences that decode for `tokens` steps more, prompts computed."""
    rng = np.random.default_rng(0)
    for i in range(batch):
        params = SamplingParams(max_tokens=tokens, temperature=temperature, ignore_eos=True, seed=i)
        engine.add(Request(f"r{i}", rng.integers(0, engine.vocab_size, PROMPT).tolist(), params))
    begun: set[str] = set()
    while len(begun) < batch:
        begun |= {d.request_id for d in engine.step()}


def measure(llm: LLM, batch: int, temperature: float) -> dict[str, Any]:
    engine = llm.engine
    decoding(engine, batch, 2 * (WARM + STEPS) + 32, temperature)
    whole, host, _ = steps(engine, with_events=False)
    _, _, idle = steps(engine, with_events=True)
    end(engine)
    return {
        "step_us": round(statistics.mean(whole) * 1e6, 1),
        "host_us": round(statistics.median(host) * 1e6, 1),
        "idle_us": round(statistics.median(idle) * 1e6, 1),
        "idle_us_p90": round(idle[len(idle) * 9 // 10] * 1e6, 1),
    }


def timeline(llm: LLM, batch: int, temperature: float) -> dict[str, Any]:
    """Of some steps. Once torch's profiler has run, every later call of CUDA in the process is slower: nothing may be timed after this."""
    engine = llm.engine
    decoding(engine, batch, 32, temperature)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(8):
            engine.step()
        torch.cuda.synchronize()
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    copies = [i for i, span in enumerate(spans) if "HtoD" in span[2]]
    starts, first = copies[2 : 3 + SHOWN], 2 + len(engine.cache.groups)  # after a copy in: input ids, page tables, the plan
    gaps = [sum(max(0.0, spans[j + 1][0] - spans[j][1]) for j in range(i - 1, i + first - 1)) for i in copies[2:]]
    end(engine)
    return {
        "gaps_us": round(statistics.median(gaps), 1),
        "timeline": [[round(a - spans[starts[0]][0], 2), round(b - spans[starts[0]][0], 2), "copy" if n.startswith("Mem") else "kernel"]
                     for a, b, n in spans[starts[0] : starts[-1]]],
    }  # fmt: skip


def end(engine: Engine) -> None:
    for request_id in list(engine._requests):
        engine.abort(request_id)
    while engine.has_work:
        engine.step()


def plot(points: list[dict[str, Any]], title: str) -> str:
    """A bar per point: kernels dark, copies light, what is white is idle. All bars have the same scale within a batch size."""
    width, height, left = 1100, 34, 210
    longest = {b: max(p["timeline"][-1][1] for p in points if p["batch"] == b) for b in {p["batch"] for p in points}}
    parts = [f'<text x="8" y="20" font-weight="bold">{title}</text>']
    for i, p in enumerate(points):
        y, scale = 40 + i * (height + 12), (width - left - 10) / longest[p["batch"]]
        label = f"batch {p['batch']}, {'overlapped' if p['overlap'] else 'one by one'}"
        parts.append(
            f'<text x="8" y="{y + 14}">{label}</text><text x="8" y="{y + 29}" fill="#666">{p["step_us"]:.0f} µs a step, idle {p["idle_us"]:.0f}</text>'
        )
        parts.append(f'<rect x="{left}" y="{y}" width="{p["timeline"][-1][1] * scale:.1f}" height="{height}" fill="#fff" stroke="#bbb"/>')
        for begin, end, kind in _merged(p["timeline"], 0.7 / scale):
            color = "#2b5c8a" if kind == "kernel" else "#e8963c"
            parts.append(f'<rect x="{left + begin * scale:.2f}" y="{y}" width="{max((end - begin) * scale, 0.3):.2f}" height="{height}" fill="{color}"/>')
    total = 40 + len(points) * (height + 12)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{total}" font-family="sans-serif" font-size="12">\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _merged(timeline: list[list[Any]], gap: float) -> list[list[Any]]:
    """Spans of one kind that are closer than `gap` microseconds as one: what is thinner than a pixel cannot be seen."""
    merged: list[list[Any]] = []
    for begin, end, kind in timeline:
        if merged and merged[-1][2] == kind and begin - merged[-1][1] < gap:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([begin, end, kind])
    return merged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch", default="1,16,64,256")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--svg", type=Path)
    args = parser.parse_args()
    built = compile_model(args.model, CompileOptions(dummy_weights=args.model != "bundled"))
    points: list[dict[str, Any]] = [{"overlap": overlap, "batch": int(batch)} for overlap in (True, False) for batch in args.batch.split(",")]
    for look in (measure, timeline):
        for overlap in (True, False):
            llm = LLM(built.path, overlap=overlap, enable_prefix_caching=False, gpu_memory_utilization=0.4)
            for point in points:
                if point["overlap"] is overlap:
                    point |= look(llm, point["batch"], args.temperature)
                    print({k: v for k, v in point.items() if k != "timeline"}, flush=True)
            del llm
            torch.cuda.empty_cache()
    points.sort(key=lambda p: (p["batch"], p["overlap"]))
    device = torch.cuda.get_device_name()
    if args.output is not None:
        shown = [{k: v for k, v in p.items() if k != "timeline"} for p in points]
        report = {"model": Path(args.model).name, "device": device, "temperature": args.temperature, "points": shown}
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    if args.svg is not None:
        args.svg.write_text(plot(points, f"{Path(args.model).name} on one {device}: {SHOWN} decode steps"))


if __name__ == "__main__":
    main()
