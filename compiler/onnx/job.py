"""`ingot compile model.onnx`: the graph and the weights are the file's; everything behind them is a model's compilation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from ingot.artifacts.manifest import Embedding, Options
from ingot.artifacts.settings import settings
from ingot.models import sentence_transformers
from ingot.models.onnx import source
from ingot.models.onnx.frontend import OnnxEncoder
from ingot.ops import Graph
from ingot.ops.target import resolve

from ..build import CompileError, CompileOptions, Job, Progress
from ..codegen.emit import Emitter
from ..inputs import inputs_of
from ..pipeline import lower
from ..quantization import Request
from ..tuning import Table, table_for


@dataclass
class OnnxJob(Job):
    """The compilation of an encoder in an ONNX file, in float32."""

    encoder: OnnxEncoder

    @classmethod
    def prepare(cls, model: str, options: CompileOptions) -> OnnxJob:
        unknown = {"quantize": "none", "kv_cache_dtype": "auto", "dummy_weights": False, "deterministic": False, "quantize_exclude": "", "calibrate": ""}
        for name, nothing in unknown.items():
            if getattr(options, name) != nothing:
                raise CompileError(
                    f"--{name.replace('_', '-')} does not go with an ONNX file; leave it out, or compile the model that the file was exported from"
                )
        if options.dtype not in ("auto", "float32"):
            raise CompileError(
                f"--dtype {options.dtype}: an encoder from an ONNX file is compiled in float32; compile the model that the file was exported from"
            )
        target = resolve(options.target)
        if options.defer_gate and target.kind == "cuda":
            target = msgspec.structs.replace(target, device="")
        found, encoder = source.resolve(Path(model))
        longest = min(found.config.max_position_embeddings, sentence_transformers.read(found.folder).max_seq_length or 1 << 20)
        tokens = options.max_num_batched_tokens or max(8192 if target.kind == "cuda" else 512, min(longest, 8192))
        resolved = Options("float32", "none", "float32", options.max_num_seqs or (256 if target.kind == "cuda" else 64), tokens, False, False)
        table = Table() if options.tune else table_for(target)
        inputs = inputs_of(found, encoder.file, target, resolved, table.key(options.tune))  # type: ignore[arg-type]
        inputs = replace(inputs, short=inputs.short | {"embedding": str(sentence_transformers.read(found.folder))})
        return cls(found, target, resolved, torch.float32, "embed", min(longest, tokens), encoder.file, inputs, options.defer_gate, table,  # type: ignore[arg-type]
                   options.tune, Request(), None, encoder)  # fmt: skip

    def begin_kernels(self, emitted: Emitter, device: torch.device | None) -> None:
        """Nothing is known before the file is traced."""

    def lowered(self, progress: Progress, done: Callable[[str], None], scratch: Path | None = None) -> tuple[Graph, dict[str, int]]:
        progress("trace", 0.0)
        traced = self.encoder.trace()
        done("trace")
        progress("lower", 0.0)
        result = lower(traced, self.target, settings().dump)
        done("lower")
        return result

    def _architecture(self) -> str:
        return "OnnxEncoder"

    def _embedding(self, graph: Graph) -> Embedding | None:
        made = sentence_transformers.read(self.source.folder)
        pooled: Any = graph.fx.output_node().args[0][0]  # type: ignore[index]
        return Embedding(int(pooled.meta["val"].shape[1]), made.pooling, made.normalize, self.encoder.padding_id)
