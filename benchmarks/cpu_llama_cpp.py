"""Decode at batch 1 on the CPU, int4 groups of 128, beside llama.cpp's Q4_0 on the same shape, in one run. Prints JSON.

    python -m venv /tmp/llama && CMAKE_ARGS=-DGGML_NATIVE=ON /tmp/llama/bin/pip install llama-cpp-python gguf numpy
    python benchmarks/cpu_llama_cpp.py --config DIR --llama-python /tmp/llama/bin/python [--threads 2] [--quantize int4-g128]

Random weights on both sides. The GGUF is what `llama-quantize … Q4_0` makes of such a model: Q4_0, and Q6_K where embeddings are also the LM
head. A step is one token after a prompt of 128; the sides alternate, so that drift of the machine hits both; medians. Qwen3's shape only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPT = 128


def blocks(kind: str, rows: int, columns: int) -> Any:
    """Random blocks of a GGUF type, uint8 [rows, bytes], whose scales are of a usual size."""
    import numpy as np

    random = np.random.default_rng(rows + columns)
    size, nbytes, at = {"Q4_0": (32, 18, 0), "Q6_K": (256, 210, 208)}[kind]
    data = random.integers(0, 256, (rows, columns // size, nbytes), dtype=np.uint8)
    scale = np.float16(columns**-0.5 / (4.6 if kind == "Q4_0" else 18 * 8))
    data[:, :, at : at + 2] = np.frombuffer(scale.tobytes(), np.uint8)
    if kind == "Q6_K":
        data[:, :, 192:208] = 8
    return data.reshape(rows, -1)


def write_gguf(config: dict[str, Any], file: Path) -> None:
    """The model of `config`, without a vocabulary."""
    import gguf
    import numpy as np

    d, i, e, h, k = (config[n] for n in ("hidden_size", "intermediate_size", "head_dim", "num_attention_heads", "num_key_value_heads"))
    writer = gguf.GGUFWriter(str(file), "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(d)
    writer.add_feed_forward_length(i)
    writer.add_head_count(h)
    writer.add_head_count_kv(k)
    writer.add_key_length(e)
    writer.add_value_length(e)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta", 1e6))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, kind: str, rows: int, columns: int) -> None:
        writer.add_tensor(f"{name}.weight", blocks(kind, rows, columns), raw_dtype=gguf.GGMLQuantizationType[kind])

    def ones(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    add("token_embd", "Q6_K", config["vocab_size"], d)
    ones("output_norm", d)
    for n in range(config["num_hidden_layers"]):
        for name, rows, columns in (("attn_q", h * e, d), ("attn_k", k * e, d), ("attn_v", k * e, d), ("attn_output", d, h * e),
                                    ("ffn_gate", i, d), ("ffn_up", i, d), ("ffn_down", d, i)):  # fmt: skip
            add(f"blk.{n}.{name}", "Q4_0", rows, columns)
        for name, size in (("attn_norm", d), ("ffn_norm", d), ("attn_q_norm", e), ("attn_k_norm", e)):
            ones(f"blk.{n}.{name}", size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def worker(config_file: str, threads: int) -> None:
    """In llama.cpp's environment: a line with a number on stdin is answered by the seconds of as many decode steps after a prompt, as JSON."""
    import llama_cpp as cpp

    config = json.loads(Path(config_file).read_text())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        write_gguf(config, file)
        nbytes = file.stat().st_size
        cpp.llama_backend_init()
        params = cpp.llama_model_default_params()
        model = cpp.llama_model_load_from_file(str(file).encode(), params)
        options = cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_threads, options.n_threads_batch = 512, PROMPT, threads, threads
        context = cpp.llama_init_from_model(model, options)

        def decode(tokens: list[int]) -> None:
            array = (ctypes.c_int32 * len(tokens))(*tokens)
            if cpp.llama_decode(context, cpp.llama_batch_get_one(array, len(tokens))) != 0:
                raise SystemExit("llama_decode failed")

        print(json.dumps(nbytes), flush=True)
        for line in sys.stdin:
            cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
            decode([(7 * n) % 1000 for n in range(PROMPT)])
            times = []
            for n in range(int(line)):
                start = time.perf_counter()
                decode([n])
                cpp.llama_get_logits(context)  # waits for the step
                times.append(time.perf_counter() - start)
            print(json.dumps(times), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--llama-python", required=True, help="a Python that has llama-cpp-python and gguf")
    parser.add_argument("--quantize", default="int4-g128")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    import torch
    from cpu_decode import ingot_steps, read_bandwidth

    from ingot.artifacts.artifact import Artifact
    from ingot.compiler.build import CompileOptions, compile_model
    from ingot.runtime.llm import LLM
    from ingot.serve.bench.floor import Floor

    torch.set_num_threads(args.threads)
    built = compile_model(str(args.config), CompileOptions(target="cpu", dtype="bfloat16", quantize=args.quantize, dummy_weights=True))
    artifact = Artifact.open(built.path)
    floor = Floor.of(artifact)
    llm = LLM(built.path, num_threads=args.threads, enable_prefix_caching=False, max_model_len=512)
    command = [args.llama_python, __file__, "--worker", str(args.config / "config.json"), str(args.threads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        their_bytes = json.loads(other.stdout.readline())
        bandwidth = read_bandwidth()
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(args.rounds):
            ours += ingot_steps(llm, args.tokens, artifact.manifest.model.vocab_size)
            other.stdin.write(f"{args.tokens}\n")
            other.stdin.flush()
            theirs += json.loads(other.stdout.readline())
        other.stdin.close()
    step, step_of_llama = statistics.median(ours), statistics.median(theirs)
    print(json.dumps({
        "model": artifact.manifest.model.name, "threads": args.threads, "device": artifact.manifest.target.device, "quantize": args.quantize,
        "ingot_ms": step * 1e3, "llama_cpp_ms": step_of_llama * 1e3, "speedup": step_of_llama / step, "bandwidth_gb_s": bandwidth / 1e9,
        "ingot_weight_mb": (floor.weight_bytes or 0) / 1e6, "llama_cpp_file_mb": their_bytes / 1e6,
        "bandwidth_fraction": (floor.weight_bytes or 0) / step / bandwidth,
    }))  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], int(sys.argv[3]))
    else:
        main()
