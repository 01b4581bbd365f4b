"""The lowered graph of each main layer shape, as text. `pytest --update-golden` rewrites the files; read the diff."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from ingot.compiler.pipeline import lower
from ingot.models.frontend import trace
from ingot.ops.target import Target

GOLDEN = Path(__file__).parent.parent / "golden"
SMALL = dict(hidden_size=64, num_hidden_layers=1, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=128,
             pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
MODELS = {
    "llama": dict(SMALL),
    "qwen2": {k: v for k, v in SMALL.items() if k != "head_dim"},
    "qwen3": dict(SMALL, tie_word_embeddings=True),
    "gemma2": dict(SMALL, num_hidden_layers=2, sliding_window=8, query_pre_attn_scalar=16),
    "phi3": {k: v for k, v in SMALL.items() if k != "head_dim"},
    "mixtral": dict(SMALL, num_local_experts=4, num_experts_per_tok=2),
}


CPU, CUDA = Target("cpu", "x86-64:avx2+fma", ""), Target("cuda", "sm_90", "")


@pytest.mark.parametrize(("model_type", "target"), [(m, CPU) for m in sorted(MODELS)] + [(m, CUDA) for m in ("gemma2", "mixtral", "qwen3")])
def test_lowered_graph(model_type: str, target: Target, update_golden: bool) -> None:
    config = AutoConfig.for_model(model_type, **MODELS[model_type])
    graph, _ = lower(trace(config, dtype=torch.bfloat16), target)
    text = stable(str(graph)) + "\n"
    path = GOLDEN / (f"{model_type}.txt" if target is CPU else f"{model_type}.cuda.txt")
    if update_golden:
        path.write_text(text)
    assert text == path.read_text(), f"{path.name} changed; if that is meant, run: pytest tests/compiler/test_golden.py --update-golden"


def stable(text: str) -> str:
    """Number values in order, so that the text depends on the program and not on how it came to be."""
    names: dict[str, str] = {}
    for line in text.splitlines():
        if (m := re.match(r"(?!input|state|weight|return)(\S+):", line)) is not None:
            names[m[1]] = f"v{len(names)}"
    return re.sub(r"(?<![\w.])%?([A-Za-z_]\w*)(?=[:,)\]]|$)", lambda m: m[0].replace(m[1], names.get(m[1], m[1])), text, flags=re.M)
