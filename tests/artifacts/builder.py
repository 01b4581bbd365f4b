"""Builds the artifact that these tests work on; as a script, builds it in forked children that a test can kill.

`python builder.py` reads lines "HOME KEY MODE" and forks a child for each, which writes lines "PID WORD": "started", then
"opened KEY" (it is there), "waiting", "building", "built", "found" or "refused: …". MODE "hold" builds once HOME/go exists; "nobody" may not write.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from ingot.artifacts.artifact import ArtifactWriter
from ingot.artifacts.files import ArtifactError
from ingot.artifacts.manifest import CHUNK_BYTES, Group, Manifest, ModelInfo, Options, State
from ingot.artifacts.plan import Arg, Entry, Kernel, Value, Variant
from ingot.artifacts.store import Store
from ingot.ops.graph import Recipe
from ingot.ops.target import Target

NOBODY = 65534
KERNELS = ("rms_norm_0a1b", "gemv_2c3d", "rope_4e5f")
VARIANTS = ("decode_1", "prefill_17")
FILES = (
    "manifest.json",
    *(f"kernels/{k}.{s}" for k in KERNELS for s in ("py", "so")),
    *(f"plans/{v}.json" for v in VARIANTS),
    "config.json",
    "tokenizer/tokenizer.json",
    "weights.bin",
)


def tensors(seed: int, large: bool = False) -> dict[str, torch.Tensor]:
    """Random bits (NaNs among them) of odd shapes and many dtypes; when `large`, a tensor lies across the border of two chunks."""
    generator = torch.Generator().manual_seed(seed)

    def bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        size = torch.empty(shape, dtype=dtype, device="meta").numel() * dtype.itemsize
        return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)

    return {
        "norm": bits(torch.bfloat16, 13),
        "scalar": bits(torch.float32),
        "empty": bits(torch.float16, 0, 5),
        "packed": bits(torch.int32, 3, 1, 7),
        "int8": bits(torch.int8, 5, 7, 3),
        "fp8": bits(torch.float8_e4m3fn, 11, 3),
        "fp32": bits(torch.float32, 17, 19),
        "mask": torch.randint(0, 2, (9,), generator=generator).bool(),
        "across": bits(torch.bfloat16, 1009, CHUNK_BYTES // 2000 if large else 19),
        "last": bits(torch.bfloat16, 3, 5),
    }


def write(writer: ArtifactWriter, key: str, seed: int = 0, max_model_len: int = 777, large: bool = False) -> Manifest:
    """A whole artifact with everything in it."""
    random = torch.Generator().manual_seed(seed)
    for name in KERNELS:
        binary = bytes(torch.randint(0, 256, (3001,), dtype=torch.uint8, generator=random).tolist())
        writer.add_kernel(Kernel(name, name.rpartition("_")[0], "tvm", "f", f"kernels/{name}.so", f"kernels/{name}.py"), binary, f"# {name} α\n")
    for i, name in enumerate(VARIANTS):
        value = Value("x", "bfloat16", ({"T": 2, "": 1}, 64), "arena")
        entry = Entry("n", "ingot.rms_norm", "tvm", (Arg(value="x"), Arg(const=1e-6)), ("x",), KERNELS[i], reason="only claimant")
        writer.add_plan(Variant("forward", name, 17, 1, 17, 1, (), (value,), (entry,), ("x",), 256))
    for name, tensor in tensors(seed, large).items():
        writer.weights().add(name, tensor, Recipe("cat", (0,), (Recipe("tensor", (f"model.{name}",)), Recipe("constant", ("zeros",)))))
    writer.weights().add_seed("dummy", torch.bfloat16, (33, 7), Recipe("seed", (seed + 41, 0.25, 1.5)))
    writer.add_file("config.json", b'{"model_type": "llama"}')
    writer.add_file("tokenizer/tokenizer.json", '{"vocab": "äöü"}'.encode())
    return writer.finish(
        key=key,
        key_inputs={"checkpoint": f"seed {seed}", "graph": "1f"},
        target=Target("cpu", "x86-64:avx2+fma", "A CPU"),
        model=ModelInfo("tiny", "LlamaForCausalLM", "llama", 101, max_model_len, (2, 7), "bfloat16", 12345),
        options=Options("bfloat16", "none", "auto", 3, 17, False, False),
        groups=(Group("full", "page", 16, 4096),),
        states=(State("k_cache_0", "full", "bfloat16", (2, 16, 8)),),
        report={"seconds": {"trace": 1.25, "total": 3e-7}, "nodes": [["start", 17], ["fuse", 9]]},
    )


def _build(home: Path, key: str, mode: str) -> None:
    def say(word: str) -> None:
        os.write(1, f"{os.getpid()} {word}\n".encode())

    if mode == "nobody" and os.geteuid() == 0:
        os.setgroups([])
        os.setuid(NOBODY)
    say("started")
    if (found := Store(home).find(key)) is not None:
        Store(home).open(key).verify()
        say(f"opened {found.name}")
    try:
        with Store(home).building(key, waiting=lambda: say("waiting")) as writer:
            if writer is not None:
                say("building")
                while mode == "hold" and not (home / "go").exists():
                    time.sleep(0.01)
                write(writer, key)
    except ArtifactError as error:
        say(f"refused: {error}")
    else:
        say("found" if writer is None else "built")


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # a killed child is gone at once
    for line in sys.stdin:
        if os.fork() == 0:
            home, key, mode = line.split()
            _build(Path(home), key, mode)
            os._exit(0)
