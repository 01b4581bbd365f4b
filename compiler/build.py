"""`ingot compile`: a model in, an artifact out."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch

import ingot.ops.library  # noqa: F401  (registers the library claims)
from ingot.artifacts.artifact import ArtifactWriter
from ingot.artifacts.check import CHECKS
from ingot.artifacts.difference import INPUTS
from ingot.artifacts.gate_record import DEFERRED, passed
from ingot.artifacts.manifest import Embedding, Group, ModelInfo, Options, State
from ingot.artifacts.plan import Variant
from ingot.artifacts.settings import settings
from ingot.artifacts.store import Store, check_output
from ingot.models import oracle, source
from ingot.models.checkpoint import Checkpoint
from ingot.models.frontend import architecture, entry_point, shortened, trace
from ingot.models.quantization import method_of
from ingot.ops import OPS, Graph
from ingot.ops.errors import IngotError
from ingot.ops.garbage import uncollected
from ingot.ops.target import Target, here, resolve

from . import embedding
from .calibration import calibrate, windows
from .call import dtype_name
from .codegen.emit import Emitter
from .inputs import Inputs, inputs_of, sha256
from .outline import Outline
from .pipeline import Pass, count, lower, lower_further, passes_for
from .plan import plan
from .quantization import Request, choose_as, choose_online, dequantized, expert_formats, layers, num_elements, quantize_weights, with_activations
from .sampling import sampling_programs
from .select import Program, select, wanted_sources
from .tuning import Table, table_for
from .variants import VariantSpec, embed_variants, page_size, variants
from .warm_up import warm_up
from .weights import bind, described, pack

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
KV_DTYPES = DTYPES | {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
MAX_NUM_SEQS = 4096
"""Of a step. On a GPU every 32 more of them have a plan and a graph of their own."""
MAX_NUM_BATCHED_TOKENS = 1 << 20
"""Of a step. Longer prompts are computed in chunks."""


class CompileError(IngotError):
    """The options contradict each other or the model."""


@dataclass(frozen=True)
class CompileOptions:
    """The flags of `ingot compile`. None: decided from the target."""

    target: str = "auto"
    dtype: str = "auto"
    quantize: str = "none"
    quantize_exclude: str = ""
    calibrate: str = ""
    kv_cache_dtype: str = "auto"
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    deterministic: bool = False
    dummy_weights: bool = False
    trust_remote_code: bool = False
    defer_gate: bool = False
    tune: bool = False  # measure all candidates, whatever the tuning table says


@dataclass(frozen=True)
class BuildReport:
    """Where the artifact is, whether it was there before, and what compiling it did."""

    path: Path
    key: str
    hit: bool
    report: dict[str, Any]


Progress = Callable[[str, float], None]
"""Called with a stage's name and the fraction of it that is done."""


def compile_model(model: str, options: CompileOptions, *, output: Path | None = None, progress: Progress = lambda stage, done: None) -> BuildReport:
    """Compile `model` (a folder, a hub id, or "bundled") unless the store has it already; with `output`, copy the artifact there.

    Raises IngotError subclasses for anything that the user can mend, before the long work starts where it can be known.
    """
    start = time.perf_counter()
    job = _prepare(model, options)
    if output is not None:
        check_output(output, job.inputs.key)
    store = Store(settings().home)
    found = store.find(job.inputs.key)
    if found is None:
        with store.building(job.inputs.key, waiting=lambda: progress("waiting for another compiler of the same model", 0.0)) as writer:
            if writer is not None:  # None: the other compiler finished it
                job.build(writer, store, progress, start)
    artifact = store.open(job.inputs.key)
    if output is not None:
        store.copy_out(job.inputs.key, output)
    return BuildReport(output or artifact.root, job.inputs.key, found is not None, artifact.manifest.report)


def _prepare(model: str, options: CompileOptions) -> Job:
    if not model.endswith(".onnx"):
        return Job.prepare(model, options)
    from .onnx.job import OnnxJob  # here: it is a kind of Job

    return OnnxJob.prepare(model, options)


@dataclass
class Job:
    """A compilation: everything that its key hashes."""

    source: source.ModelSource
    target: Target
    options: Options
    dtype: torch.dtype
    entry_point: str
    longest: int  # tokens of a sequence
    checkpoint: Checkpoint | None
    inputs: Inputs
    defer_gate: bool
    table: Table
    measure: bool
    request: Request
    texts: list[list[int]] | None  # token ids that weights are rounded with

    @classmethod
    def prepare(cls, model: str, options: CompileOptions) -> Job:
        found = source.resolve(model, trust_remote_code=options.trust_remote_code)
        target = resolve(options.target)
        if options.defer_gate and target.kind == "cuda":
            target = msgspec.structs.replace(target, device="")  # as from a machine without it: nothing is measured
        config = found.config
        method = method_of(config)
        request = Request.of(options.quantize, options.quantize_exclude, options.calibrate, method, options.dummy_weights)
        texts = None if request.text is None else windows(request.text, found.folder / "tokenizer.json", _max_model_len(config))
        if options.tune and options.defer_gate:
            raise CompileError("--tune measures kernels and --defer-gate runs none; give one of the two")
        if options.kv_cache_dtype not in ("auto", *KV_DTYPES):
            raise CompileError(f"--kv-cache-dtype {options.kv_cache_dtype} is unknown: use auto, {', '.join(KV_DTYPES)}")
        kv_cache = options.kv_cache_dtype
        if kv_cache == "auto" and method is not None and method.kv_cache:
            kv_cache = method.kv_cache
        if kv_cache == "fp8" and target.kind == "cuda" and target.arch < 89:
            raise CompileError(f"--kv-cache-dtype fp8 needs sm_89 or newer, whose instructions convert it, and the target is {target}: use int8")
        dtype = _dtype(options.dtype, config, target)
        kv_dtype = dtype_name(dtype) if kv_cache == "auto" else kv_cache
        _check_admitted(config)
        source.check_vocabulary(found)
        if _max_model_len(config) < 1:
            raise CompileError(f"config.json gives a context of {_max_model_len(config)} tokens; correct max_position_embeddings")
        if _max_model_len(config) >= 2**31:
            raise CompileError(f"config.json gives a context of {_max_model_len(config)} tokens, and positions have 31 bits; correct max_position_embeddings")
        on_gpu = target.kind == "cuda"
        entry = entry_point(config)
        if entry == "embed" and options.kv_cache_dtype != "auto":
            raise CompileError(f"--kv-cache-dtype {options.kv_cache_dtype}: {architecture(config)} is an encoder and has no KV cache; leave the flag out")
        longest = embedding.longest_text(found) if entry == "embed" else _max_model_len(config)
        most_tokens = 8192 if on_gpu else 512
        if entry == "embed":  # a text is computed in one step
            most_tokens = max(most_tokens, min(longest, 8192))
            longest = min(longest, options.max_num_batched_tokens or most_tokens)
        resolved = Options(
            dtype=dtype_name(dtype),
            quantize=options.quantize,
            quantize_exclude=request.exclude,
            calibrate="" if texts is None else sha256(json.dumps(texts)),
            kv_cache_dtype=kv_dtype,
            max_num_seqs=options.max_num_seqs or (256 if on_gpu else 64),
            max_num_batched_tokens=options.max_num_batched_tokens or most_tokens,
            deterministic=options.deterministic,
            dummy_weights=options.dummy_weights,
        )
        for flag, given, most in (("seqs", resolved.max_num_seqs, MAX_NUM_SEQS), ("batched-tokens", resolved.max_num_batched_tokens, MAX_NUM_BATCHED_TOKENS)):
            if given > most:
                raise CompileError(f"--max-num-{flag} {given}: a step takes at most {most}; more wait for the next one")
        if resolved.max_num_batched_tokens < resolved.max_num_seqs:
            raise CompileError(f"--max-num-batched-tokens {resolved.max_num_batched_tokens} is less than --max-num-seqs {resolved.max_num_seqs}: "
                               "a decode step takes a token of every sequence")  # fmt: skip
        table = Table() if options.tune else table_for(target)
        checkpoint = None if options.dummy_weights else Checkpoint.open(found.folder)
        inputs = inputs_of(found, checkpoint, target, resolved, table.key(options.tune))
        return cls(found, target, resolved, dtype, entry, longest, checkpoint, inputs, options.defer_gate, table, options.tune, request, texts)

    def build(self, writer: ArtifactWriter, store: Store, progress: Progress, start: float) -> None:
        seconds: dict[str, float] = {}

        def done(stage: str) -> None:
            seconds[stage] = round(time.perf_counter() - start - sum(seconds.values()), 3)

        dump = settings().dump
        done("prepare")
        scratch = Path(tempfile.mkdtemp(prefix="calibrated-", dir=writer.folder))  # what a kill leaves in the writer's folder, gc removes
        compiled = lambda n, of: progress("compile kernels", n / max(of, 1))
        with tempfile.TemporaryDirectory(prefix="kernels-", dir=writer.folder) as folder, Emitter(self.target, store, Path(folder), compiled) as emitted:
            device = None if self.defer_gate else device_for(self.target)
            warm_up(self.target)
            self.begin_kernels(emitted, device)
            done("foresee")
            graph, counts = self.lowered(progress, done, scratch)
            programs = self.programs(graph, dump)
            done("outline")
            selection = select([p for _, p in programs], self.target, emitted, device, lambda n, of: progress("select and gate", n / max(of, 1)),
                               self.table, measure=self.measure, done=done)  # fmt: skip
            planned = (plan(outline, s.steps, s.name, selection.choose(s.steps), capture=s.capture) for outline, p in programs for s in p.specs)
            plans = [v if _capturable(v) else msgspec.structs.replace(v, capture=()) for v in planned if not v.decodes or _capturable(v)]
            if self.options.deterministic:
                _check_deterministic(plans, self.target)
            for variant in plans:
                writer.add_plan(variant)
            used = {e.kernel for v in plans for e in v.entries if e.backend != "torch"}
            kernels = [selection.kernels[name] for name in sorted(used)]
            for kernel in kernels:
                binary, text = emitted.files(kernel.name)
                writer.add_kernel(kernel, binary, text)
                if dump is not None:
                    (dump / "kernels").mkdir(exist_ok=True)
                    (dump / kernel.source).write_text(text)
            writer.add_file(CHECKS, msgspec.json.format(msgspec.json.encode([c for c in selection.checks if used.issuperset(c.kernels)]), indent=1))
        done("plan")
        progress("pack weights", 0.0)
        known = store.same_weights(self.inputs.short["checkpoint"], described(graph, self.checkpoint))
        if known is not None:
            writer.reuse_weights(known)
        speed = 0.0 if known is not None else pack(graph, self.checkpoint, writer, lambda f: progress("pack weights", f))
        shutil.rmtree(scratch)
        done("weights")
        for file in self.source.tokenizer_files:
            writer.add_file(f"tokenizer/{file.name}", file.read_bytes())
        writer.add_file("config.json", self.source.config.to_json_string().encode())
        writer.add_file(INPUTS, json.dumps(self.inputs.long, indent=1).encode())
        report = {
            "nodes": list(counts.items()),  # pairs: a dictionary of the manifest is sorted, and the order of passes says something
            "calls": count(graph),
            "layers": layers(graph),
            "dequantized": dequantized(graph),
            "kernels": {b: sum(k.backend == b for k in kernels) for b in ("triton", "tvm")},
            "entries": {v.name: {b: sum(e.backend == b for e in v.entries) for b in ("triton", "tvm", "torch")} for v in plans},
            "kernels_compiled": emitted.compiled,
            "gate": {k.name: passed(device.type, selection.errors[k.name]) if device is not None else DEFERRED for k in kernels},
            "rejected": selection.rejected,
            "measured_us": selection.measured,
            "weights_gb_per_s": round(speed, 3),
            "seconds": seconds | {"total": round(time.perf_counter() - start, 3)},
        }
        writer.finish(
            key=self.inputs.key,
            key_inputs=self.inputs.short,
            target=self.target,
            model=self._model_info(graph),
            options=self.options,
            groups=_groups(graph),
            states=tuple(State(n, s.group, dtype_name(s.dtype), s.shape) for n, s in graph.states.items()),
            report=report,
            entry_point=self.entry_point,
            embedding=self._embedding(graph),
        )

    def begin_kernels(self, emitted: Emitter, device: torch.device | None) -> None:
        """Begin to compile the kernels of a model with two such layers while the whole is traced: they are the same, or else are compiled later."""
        if (short := shortened(self.source.config)) is None or method_of(self.source.config) is not None or self.request.method != "none":
            return
        try:
            traced = self.traced(short)
        except Exception:  # whatever modeling code makes of two layers: what is wrong with the whole, its own trace tells
            return
        graph, _ = lower(traced, self.target)
        emitted.begin(wanted_sources([p for _, p in self.programs(graph)], self.target, device, self.table, measure=self.measure))

    def traced(self, config: Any) -> Graph:
        """The graph of the source's config, or of one that is a little different."""
        method, kv_cache = method_of(config), self.options.kv_cache_dtype
        return trace(config, dtype=self.dtype, kv_dtype=KV_DTYPES[kv_cache], page_size=page_size(self.target),
                     kv_calibrated=method is not None and method.kv_cache == kv_cache)  # fmt: skip

    def lowered(self, progress: Progress, done: Callable[[str], None], scratch: Path | None = None) -> tuple[Graph, dict[str, int]]:
        """The model's graph after all passes, and the number of calls after each. `done` is told when a stage ends.

        Weights are calibrated when there is a folder for what is found; the graph's calls are the same without.
        """
        progress("trace", 0.0)
        method = method_of(self.source.config)
        traced = self.traced(self.source.config)
        if self.request.method != "none":
            traced = quantize_weights(traced, choose_online(self.request, self.target), expert_formats(self.target))
        elif self.checkpoint is None and method is not None:
            traced = quantize_weights(traced, choose_as(method), expert_formats(self.target))
        traced.weights = bind(traced, self.checkpoint, self.source.config)  # first: a checkpoint that does not fit is found here
        traced.weights = {n: replace(w, recipe=with_activations(w.recipe, self.target)) for n, w in traced.weights.items()}
        done("trace")
        if self.texts is not None and scratch is not None and self.checkpoint is not None:
            device = device_for(self.target) or torch.device("cpu")
            traced, self.checkpoint = calibrate(
                traced, self.checkpoint, self.request.algorithm, self.texts, scratch, self.options.calibrate[:16], device, lambda f: progress("calibrate", f)
            )
            done("calibrate")
        progress("lower", 0.0)
        lowered = lower(traced, self.target, settings().dump)
        done("lower")
        return lowered

    def specs(self) -> list[VariantSpec]:
        """The variants that the artifact gets."""
        made = embed_variants if self.entry_point == "embed" else variants
        return made(self.target, self.options.max_num_seqs, self.options.max_num_batched_tokens, self.options.deterministic)

    @uncollected()
    def programs(self, graph: Graph, dump: Path | None = None) -> list[tuple[Outline, Program]]:
        """Every graph of the artifact with its variants: the lowered one, and what samples from its logits."""
        outlines = [(Outline.of(g), specs) for g, specs in [*self.by_steps(graph, dump), *self.sampling(graph)]]
        return [(outline, Program(outline.graph, outline.calls, specs)) for outline, specs in outlines]

    def by_steps(self, graph: Graph, dump: Path | None) -> list[tuple[Graph, list[VariantSpec]]]:
        """The lowered graph, and what some steps want instead, with their variants in order."""
        graphs: dict[tuple[Pass, ...], Graph] = {}
        found: list[tuple[Graph, list[VariantSpec]]] = []
        for spec in self.specs():
            passes = passes_for(spec.steps)
            if passes not in graphs:
                graphs[passes] = lower_further(graph, self.target, passes, dump)
            if not found or found[-1][0] is not graphs[passes]:
                found.append((graphs[passes], []))
            found[-1][1].append(spec)
        return found

    def sampling(self, graph: Graph) -> list[tuple[Graph, list[VariantSpec]]]:
        """The entry point `sample`, on a GPU: a CPU's sampler decides by what it finds, which a plan cannot."""
        if self.entry_point != "forward" or self.target.kind != "cuda":
            return []
        logits = graph.fx.output_node().args[0][0].meta["val"]
        return sampling_programs(int(logits.shape[-1]), logits.dtype, self.options.max_num_seqs)

    def _architecture(self) -> str:
        config = self.source.config
        return architecture(config) if self.entry_point == "embed" else (config.architectures or [type(config).__name__])[0]

    def _embedding(self, graph: Graph) -> Embedding | None:
        """How the entry point `embed` makes embeddings."""
        return embedding.describe(graph, self.source) if self.entry_point == "embed" else None

    def _model_info(self, graph: Graph) -> ModelInfo:
        config = self.source.config
        return ModelInfo(
            name=self.source.name,
            architecture=self._architecture(),
            model_type=config.model_type,
            vocab_size=_vocab_size(graph),
            max_model_len=self.longest,
            eos_token_ids=tuple(self.source.eos_token_ids),
            dtype=self.options.dtype,
            num_parameters=sum(num_elements(w) for w in graph.weights.values() if w.recipe.op != "constant"),
        )


def _check_deterministic(plans: Iterable[Variant], target: Target) -> None:
    """CompileError when a plan runs anything but generated kernels and copies: who knows in what order it adds."""
    others = sorted({e.target for v in plans for e in v.entries if e.backend == "torch" and e.target not in ("aten.clone", "aten.reshape", "aten.cat")})
    if others:
        raise CompileError(f"--deterministic: on {target} no generated kernel computes {', '.join(others)}; compile without it")


def _capturable(variant: Variant) -> bool:
    """Whether a CUDA graph can hold the plan: a reference that reads sizes on the host cannot be replayed. Without its decode
    variants a model decodes through the others, launched one by one, and `ingot inspect` shows none named decode."""
    dialect = (e.target.removeprefix("ingot.") for e in variant.entries if e.backend == "torch" and not e.kernel and e.target.startswith("ingot."))
    return not any(OPS[name].host_sync for name in dialect)


def device_for(target: Target) -> torch.device | None:
    """The device that can run the target's kernels here, or None."""
    return torch.device(target.kind) if target.runs_on(here(target.kind)) else None


def _dtype(name: str, config: Any, target: Target) -> torch.dtype:
    if name == "auto":
        default = torch.float32 if entry_point(config) == "embed" else torch.bfloat16
        dtype = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None) or default
        name = dtype_name(dtype) if isinstance(dtype, torch.dtype) else str(dtype)
        if name not in DTYPES:
            raise CompileError(f"config.json gives the dtype {name}, in which nothing is computed; choose one of {', '.join(DTYPES)} with --dtype")
    if name not in DTYPES:
        raise CompileError(f"--dtype {name} is unknown: use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _check_admitted(config: Any) -> None:
    """TraceError for a class that transformers does not have; CompileError for one that the oracle refused, or has not seen."""
    name = architecture(config)
    verdict = next((v for v in oracle.load(entry_point(config)) if v.architecture == name), None)
    if verdict is None:
        raise CompileError(f"{name} has not been tried: `ingot models --run {name} --save` does that, and makes it known to this checkout")
    if not verdict.admitted:
        raise CompileError(f"{name} is not supported: {verdict.reason} (see `ingot models`)")


def _max_model_len(config: Any) -> int:
    return int(getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or 1 << 20)


def _vocab_size(graph: Graph) -> int:
    """Of a `forward` graph the width of its logits; of an `embed` graph the rows of the table that the ids choose from."""
    if graph.entry_point == "forward":
        return int(graph.fx.output_node().args[0][0].meta["val"].shape[-1])
    (table,) = {u.args[1] for u in graph.placeholders["input_ids"].users if u.target is torch.ops.ingot.embedding.default}
    return int(table.meta["val"].shape[0])


def _groups(graph: Graph) -> tuple[Group, ...]:
    groups: dict[str, Group] = {}
    for state in graph.states.values():
        known = groups.get(state.group)
        size = state.dtype.itemsize * math.prod(state.shape)
        window = int(state.group.removeprefix("window")) if state.group.startswith("window") else 0
        page_size = state.shape[1] if state.kind == "page" else 0
        groups[state.group] = Group(state.group, state.kind, page_size, size + (known.bytes_per_unit if known else 0), window)
    return tuple(groups.values())
