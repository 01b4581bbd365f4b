"""The admission oracle: does a model's graph compute what the model computes, when it is served?

A tiny model with random weights is traced, and its graph runs as an engine would run it: two sequences packed, prompts in
chunks of odd sizes, single tokens, a padding row, pages scattered over caches that start as noise, state kept only inside the
ops. Its logits must equal those of transformers' own model on each sequence alone.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch
import transformers

from ingot.ops import Graph

from . import encoder_oracle, tiny
from .frontend import TraceError, architecture, build, entry_point, run_model, trace
from .refusals import REASONS

TOLERANCE = 5e-4
"""Largest error of a logit, relative to the largest logit; everything is float32."""
PAGE_SIZE = 4
TIMEOUT = 180  # seconds for one architecture in `run`
RECORDS = {"forward": Path(__file__).with_name("admitted.json"), "embed": Path(__file__).with_name("admitted_encoders.json")}
"""Verdicts that ship with the code, by entry point."""
PAGE = Path(__file__).with_name("ARCHITECTURES.md")

_STEPS = ((9, 6), (5, 1), (0, 1), (1, 3), (1, 0), (1, 1))
"""New tokens of each of the two sequences, step by step: chunks that straddle pages, single tokens, a sequence alone."""
_PADDED = 3  # the step that carries a padding row too


@dataclass(frozen=True)
class Verdict:
    """What the oracle found. `error` is relative, None when the model never ran; `reason` is empty for an admitted model."""

    architecture: str
    model_type: str
    admitted: bool
    reason: str
    error: float | None = None
    entry_point: str = "forward"


def admit(model: str | transformers.PreTrainedConfig, rewrite: Callable[[Graph], Graph] | None = None) -> Verdict:
    """Try one model: a model type or architecture (its tiny config), an encoder's base model, or a config small enough to run.

    `rewrite` is applied to the graph before it runs; a lowering must pass too. A TraceError becomes a verdict; an error of
    the modeling code itself is raised.
    """
    config = tiny.of(model) if isinstance(model, str) else model
    name = architecture(config)
    reference = build(config, torch.float32, "cpu")
    randomize(reference)
    try:
        graph = trace(config, dtype=torch.float32, page_size=PAGE_SIZE)
    except TraceError as e:
        return Verdict(name, config.model_type, False, str(e), entry_point=entry_point(config))
    judge, result = (encoder_oracle.compare, "embeddings of packed texts") if graph.entry_point == "embed" else (compare, "served logits")
    error = judge(graph if rewrite is None else rewrite(graph), reference)
    admitted = error < TOLERANCE
    return Verdict(name, config.model_type, admitted, "" if admitted else f"{result} differ from transformers' by {error:.1e}", error, graph.entry_point)


def randomize(model: torch.nn.Module) -> None:
    """Weights with which every block matters: N(0, 1/fan_in) matrices, perturbed norms, biases and decay rates."""
    generator = torch.Generator().manual_seed(1)

    def noise(p: torch.Tensor) -> torch.Tensor:
        return torch.randn(p.shape, generator=generator)

    with torch.no_grad():
        for name, p in model.named_parameters():
            last = name.rpartition(".")[2]
            if not p.is_floating_point():
                continue
            if last in ("A_log", "dt_bias", "D", "time_decay", "time_first"):
                p.add_(0.02 * noise(p))
            elif p.dim() >= 2:
                p.copy_(noise(p) / (1 if "embed" in name or "wte" in name else p.shape[-1] ** 0.5))
            else:
                p.add_(0.2 * noise(p))
        for name, b in model.named_buffers():
            if "correction_bias" in name:
                b.add_(0.05 * noise(b))


def compare(graph: Graph, reference: transformers.PreTrainedModel) -> float:
    """The relative error of the graph's logits, run as `_STEPS` says, with the weights of `reference`."""
    generator = torch.Generator().manual_seed(2)
    totals = [sum(step[i] for step in _STEPS) for i in range(2)]
    prompts = [torch.randint(3, reference.config.get_text_config().vocab_size, (n,), generator=generator, dtype=torch.int32) for n in totals]
    with torch.no_grad():
        expected = [run_model(reference, p[None], torch.arange(len(p), dtype=torch.int32)[None])[0].float() for p in prompts]
        session = _Session(graph, reference, totals, generator)
        errors = []
        for index, new in enumerate(_STEPS):
            logits, owners = session.step(prompts, new, padded=index == _PADDED)
            wanted = torch.stack([expected[s][position] for s, position in owners])
            errors.append(float((logits.float() - wanted).abs().max() / torch.cat(expected).abs().max()))
    # NaN compares as smaller than anything, and must not
    return max(errors) if all(e == e for e in errors) else float("inf")


class _Session:
    """Two sequences being served: the graph, its weights, its states, and who owns which page and slot."""

    def __init__(self, graph: Graph, reference: torch.nn.Module, totals: list[int], generator: torch.Generator) -> None:
        tensors = reference.state_dict(keep_vars=True)
        self.graph = graph
        self.cached = [0, 0]
        self.generator = generator
        self.fixed = {name: w.recipe.run(tensors, graph.constants).detach() for name, w in graph.weights.items()}
        columns = -(-max(totals) // PAGE_SIZE) + 1
        pages = 2 * columns + 3
        self.tables = {}
        for group in {s.group for s in graph.states.values() if s.kind == "page"}:
            owned = torch.randperm(pages - 1, generator=generator)[: 2 * columns] + 1
            self.tables[group] = owned.reshape(2, columns).int()
        self.slots = [3, 1]
        self.states = {name: torch.randn((pages if s.kind == "page" else 5, *s.shape), generator=generator).to(s.dtype) for name, s in graph.states.items()}

    def step(self, prompts: list[torch.Tensor], new: tuple[int, ...], padded: bool) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """Run one step; logits [R, V] and, for each row, its (sequence, position)."""
        rows = [s for s in (1, 0) if new[s]]  # the order in a batch is not the order of arrival
        ids: list[torch.Tensor] = []
        positions: list[int] = []
        starts, lengths = [0], list[int]()
        owners: list[tuple[int, int]] = []
        for s in rows:
            begin, end = self.cached[s], self.cached[s] + new[s]
            ids.append(prompts[s][begin:end])
            positions += range(begin, end)
            owners += [(s, p) for p in range(begin, end)]
            starts.append(starts[-1] + new[s])
            lengths.append(end)
            self.cached[s] = end
        if padded:  # a row without a sequence, over one token that belongs to nobody
            ids.append(torch.tensor([7], dtype=torch.int32))
            positions.append(0)
            starts.append(starts[-1] + 1)
            lengths.append(0)
        # some rows only, in the order of the batch: as an engine asks for the ends of prompts
        chosen = [i for i in range(len(owners)) if len(owners) < 4 or i % 3 != 1]
        inputs = {
            "input_ids": torch.cat(ids),
            "positions": _int32(positions),
            "cu_seqlens_q": _int32(starts),
            "seq_lens": _int32(lengths),
            "logits_rows": _int32(chosen),
            "state_slots": _int32([self.slots[s] for s in rows] + [-1] * padded),
        }
        for group, table in self.tables.items():
            inputs[f"page_table_{group}"] = torch.cat([table[rows], torch.zeros(int(padded), table.shape[1], dtype=torch.int32)])
            slots = [int(table[s, p // PAGE_SIZE]) * PAGE_SIZE + p % PAGE_SIZE for s, p in owners]
            inputs[f"slot_mapping_{group}"] = _int32(slots + [-1] * padded)
        needed = {n: v for n, v in inputs.items() if n in self.graph.inputs}
        (logits,), self.states = self.graph.run({**self.fixed, **self.states, **needed})
        return logits, [owners[i] for i in chosen]


def _int32(values: Iterable[int]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def load(entry_point: str = "forward") -> list[Verdict]:
    """The verdicts that shipped with the code: on causal language models (`forward`) or encoders (`embed`)."""
    return [Verdict(**entry, entry_point=entry_point) for entry in json.loads(RECORDS[entry_point].read_text())]


def save(verdicts: Iterable[Verdict]) -> None:
    """Merge verdicts into the records, sorted by architecture, and write the page that shows them."""
    verdicts = list(verdicts)
    for entry, record in RECORDS.items():
        known = {v.architecture: v for v in load(entry)}
        known |= {v.architecture: v for v in verdicts if v.entry_point == entry}
        entries = [{k: x for k, x in asdict(known[a]).items() if k not in ("error", "entry_point")} for a in sorted(known)]
        record.write_text(json.dumps(entries, indent=1) + "\n")
    PAGE.write_text(page(load(), load("embed")))


def page(decoders: list[Verdict], encoders: list[Verdict]) -> str:
    """The table of every architecture, in Markdown."""
    admitted = [v for v in decoders if v.admitted]
    lines = [
        "# Architectures",
        "",
        f"{len(admitted)} of the {len(decoders)} causal-language-model classes of transformers {transformers.__version__} are admitted: their graph, run "
        "packed, ragged and in chunks on paged caches, equals the original on each sequence alone. `ingot models --run --save` measures again and writes this "
        "page.",
        *_table("admitted", admitted),
        *_table("refused", [v for v in decoders if not v.admitted]),
        "",
        f"{sum(v.admitted for v in encoders)} of the {len(encoders)} encoders serve embeddings of packed texts, compared in the same way:",
        *_table("encoder", [v for v in encoders if v.admitted]),
    ]
    return "\n".join(lines) + "\n"


def _table(title: str, verdicts: list[Verdict]) -> list[str]:
    reasons = any(v.reason for v in verdicts)
    rows = [f"| {v.architecture} | `{v.model_type}` |" + f" {' '.join(v.reason.split()).replace('|', chr(92) + '|')} |" * reasons for v in verdicts]
    return ["", f"| {title} | model type |" + " why not |" * reasons, "|---|---|" + "---|" * reasons, *rows]


def run(names: Iterable[str] | None = None) -> list[Verdict]:
    """Try architectures (default: all), each in a process of its own: a model may loop, crash or exhaust memory. UnknownModel for a wrong name.

    A name is a causal language model's model type or architecture, or the base model of an encoder.
    """
    encoders = tiny.encoder_architectures()
    wanted = [*tiny.names(), *encoders] if names is None else list(names)
    models = {n: (n, encoders[n]) if n in encoders else (tiny.architecture_of(tiny.model_type_of(n)), tiny.model_type_of(n)) for n in wanted}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once, before it forks
    with tempfile.TemporaryDirectory(prefix="ingot-oracle-") as folder:
        return [_run_one(context, name, *models[name], Path(folder)) for name in wanted]


def _run_one(context: ForkServerContext, name: str, architecture: str, model_type: str, folder: Path) -> Verdict:
    verdict = _verdict(context, name, architecture, model_type, folder)
    return verdict if verdict.admitted else replace(verdict, reason=REASONS.get(architecture, verdict.reason))


def _verdict(context: ForkServerContext, name: str, architecture: str, model_type: str, folder: Path) -> Verdict:
    entry = "embed" if name in tiny.encoder_architectures() else "forward"
    process = context.Process(target=_child, args=(name, str(folder)))
    process.start()
    process.join(TIMEOUT)
    if process.is_alive():
        process.kill()
        process.join()
        return Verdict(architecture, model_type, False, f"no verdict after {TIMEOUT} seconds", entry_point=entry)
    if process.exitcode == 0:
        return Verdict(**json.loads((folder / "verdict.json").read_text()))
    reason = _last_error((folder / "stderr.txt").read_text()) or f"the process ended with status {process.exitcode}"
    return Verdict(architecture, model_type, False, reason, entry_point=entry)


def _child(name: str, folder: str) -> None:
    """The verdict goes to a file; so does the traceback of whatever the modeling code raises."""
    os.dup2(os.open(Path(folder, "stderr.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    Path(folder, "verdict.json").write_text(json.dumps(asdict(admit(name))))


def _last_error(stderr: str) -> str:
    """The line that names the exception in a traceback."""
    lines = [line for line in stderr.partition("Traceback")[2].splitlines() if line and not line.startswith(" ") and ":" in line]
    return lines[-1][:300] if lines else ""
