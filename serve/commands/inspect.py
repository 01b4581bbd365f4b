"""ingot inspect: what an artifact is, what runs in it, and why."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from ingot.artifacts.artifact import Artifact
from ingot.artifacts.difference import differences
from ingot.artifacts.gate_record import verdicts
from ingot.artifacts.plan import Entry
from ingot.artifacts.settings import settings
from ingot.artifacts.store import Store


def inspect_command(
    artifacts: Annotated[list[str], typer.Argument(metavar="ARTIFACT...", help="An artifact's folder or key; two with --why.")],
    why: Annotated[bool, typer.Option("--why", help="Say what differs between two artifacts, input by input of their keys.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Show each product with weights: format, kernel, bytes, error of the numeric gate.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show an artifact: model, target, options, KV cache, variants, kernels and why they were chosen, sizes."""
    if len(artifacts) != (2 if why else 1):
        raise typer.BadParameter("give two artifacts with --why, and one without", param_hint="ARTIFACT")
    store = Store(settings().home)
    if why:
        found = differences(*(store.open(a) for a in artifacts))
        print(json.dumps(found) if as_json else _told(found))
        return
    description = describe(store.open(artifacts[0]))
    if as_json:
        print(json.dumps(description))
    elif layers:
        _print_layers(description)
    else:
        _print(description)


def _told(found: dict[str, list[str]]) -> str:
    return "\n".join(f"{name}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{name}:", *lines]) for name, lines in found.items()) or "nothing differs"


def describe(artifact: Artifact) -> dict[str, Any]:
    """Everything `inspect` shows, as JSON types; sizes are bytes."""
    manifest = artifact.manifest
    described = msgspec.to_builtins(manifest)
    kernels, gate = {k.name: k for k in manifest.kernels}, verdicts(artifact)
    variants = []
    plans = {name: artifact.plan(name) for name in manifest.variants}
    for name, plan in plans.items():
        sizes = {field: getattr(plan, field) for field in ("max_tokens", "max_seqs", "max_num_new", "max_rows", "capture", "arena_bytes")}
        entries = [
            {"node": e.node, "target": e.target, "backend": e.backend, "kernel": e.kernel, "reason": e.reason}
            | ({"gate": gate[e.kernel], "family": kernels[e.kernel].family} if e.kernel in kernels else {})
            for e in plan.entries
        ]
        variants.append({"name": name, **sizes, "backends": dict(Counter(e.backend for e in plan.entries)), "entries": entries})
    return {
        **{k: described[k] for k in ("key", "digest", "ingot_version", "model", "options", "kv_layout", "groups", "key_inputs", "entry_point", "embedding")},
        "path": str(artifact.root),
        "target": {**described["target"], "name": str(manifest.target)},
        "kv_bytes_per_token": sum(g.bytes_per_unit // g.page_size for g in manifest.groups if g.page_size),
        "slot_bytes_per_sequence": sum(g.bytes_per_unit for g in manifest.groups if not g.page_size),
        "variants": variants,
        "layers": _layers(manifest.report, next(iter(plans.values())).entries if plans else (), gate),
        "kernels": [{**k, "gate": gate[k["name"]], "file_bytes": artifact.path(k["file"]).stat().st_size} for k in described["kernels"]],
        "weights": {
            "tensors": len(manifest.weights),
            "bytes": sum(w.nbytes for w in manifest.weights),
            "seeded": sum(w.offset < 0 for w in manifest.weights),
        },
        "size_bytes": sum(f.stat().st_size for f in Path(artifact.root).rglob("*") if f.is_file()),
        "report": manifest.report,
    }


def _layers(report: dict[str, Any], entries: Sequence[Entry], gate: Mapping[str, str]) -> list[dict[str, Any]]:
    """Each weight that rows are multiplied by, and the kernel that reads it in the smallest steps."""
    readers = {(entry.node, name): entry for entry in entries for name in entry.names()}
    found = []
    for layer in report.get("layers", []):
        reader = readers[layer["node"], layer["codes"]]
        found.append({**layer, "backend": reader.backend, "kernel": reader.kernel or "reference", "gate": gate.get(reader.kernel, "")})
    return found


def _print_layers(d: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 220)
    table = Table("weight", "format", "rows of x", "bytes", "kernel", "gate", title=f"{d['model']['name']}, {d['variants'][0]['name']}", title_justify="left")
    for layer in d["layers"]:
        table.add_row(layer["weight"], layer["format"], layer["activation"], f"{layer['bytes']:,}", layer["kernel"], layer["gate"])
    console.print(table)
    for name, reason in d["report"].get("dequantized", {}).items():
        console.print(f"{name}: quantized in the checkpoint, and dequantized here: {reason}")


def _captured(buckets: list[int]) -> str:
    return f", CUDA graphs at T = {', '.join(map(str, buckets))}" if buckets else ""


def _print(d: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 180)
    model, report = d["model"], d["report"]
    size = f"{model['num_parameters'] / 1e6:,.1f} M parameters"
    facts = {
        "model": f"{model['name']} ({model['architecture']}, {size}, {model['dtype']}, context {model['max_model_len']:,})",
        "entry": d["entry_point"] + "".join(f", {k}={v}" for k, v in (d["embedding"] or {}).items()),
        "target": d["target"]["name"],
        "options": ", ".join(f"{k}={v}" for k, v in d["options"].items()),
        "KV cache": f"{d['kv_bytes_per_token']:,} bytes a token, {d['slot_bytes_per_sequence']:,} a sequence; {d['kv_layout']}",
        "groups": "; ".join(f"{g['name']} ({g['kind']}, page of {g['page_size']} tokens, {g['bytes_per_unit']:,} bytes)" for g in d["groups"]),
        "weights": f"{d['weights']['tensors']} tensors, {d['weights']['bytes']:,} bytes, {d['weights']['seeded']} made from a seed",
        "nodes": " → ".join(f"{name} {n}" for name, n in report["nodes"]),
        "size": f"{d['size_bytes']:,} bytes",
        "key": d["key"],
        "digest": d["digest"],
        "path": d["path"],
    }
    for name, value in facts.items():
        console.print(f"[bold]{name:9}[/] {value}")
    for variant in d["variants"]:
        counts = ", ".join(f"{n} {backend}" for backend, n in sorted(variant["backends"].items()))
        title = f"{variant['name']}: T ≤ {variant['max_tokens']}, S ≤ {variant['max_seqs']}{_captured(variant['capture'])}; entries: {counts}"
        table = Table("calls", "op", "backend", "kernel", "chosen because", "gate", title=title, title_justify="left")
        grouped = Counter((e["target"], e["backend"], e["kernel"], e["reason"], e.get("gate", "")) for e in variant["entries"])
        for (target, backend, kernel, reason, gate), calls in grouped.items():
            table.add_row(str(calls), target, backend, kernel, reason, gate)
        console.print(table)
