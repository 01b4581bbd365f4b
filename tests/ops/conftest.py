"""What tests of kernels share."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ingot.ops.kernel import Call

MEMORY_BYTES = 32 << 20


@pytest.fixture(scope="session")
def let_go() -> Callable[[Call, dict[str, Any]], dict[str, Any]]:
    """Inputs of a call as a cache leaves them whose pages behind the window belong to others: these are NaN (of a quantized cache, their scales
    are), and the page table repeats the first page kept."""

    def let_go(call: Call, inputs: dict[str, Any]) -> dict[str, Any]:
        caches = [n for n in ("k_cache", "v_cache", "latent_cache") if n in inputs]
        window, page_size = inputs.get("window"), inputs[caches[0]].shape[2] if caches else 0
        if not window or not page_size:
            return inputs
        table, starts = inputs["page_table"].clone(), inputs["cu_seqlens_q"].tolist()
        names = caches if inputs.get("k_scale") is None else ("k_scale", "v_scale")
        pages = {n: inputs[n].clone() for n in names}
        others = set(range(len(inputs[caches[0]])))
        for s, length in enumerate(inputs["seq_lens"].tolist()):
            first = max(0, length - (starts[s + 1] - starts[s]) - window + 1) // page_size
            table[s, :first] = table[s, first]
            others -= set(table[s, first : -(-length // page_size)].tolist())
        for state in pages.values():
            state[sorted(others)] = float("nan")
        return inputs | {"page_table": table, **pages}

    return let_go


@dataclass
class Interpreter:
    """A process with Triton's interpreter; tensors travel through a file that both map."""

    process: subprocess.Popen
    memory: torch.Tensor
    folder: Path

    def kernel(self, source):
        path = self.folder / f"{source.family}_{hash(source.text):x}.py"
        path.write_text(source.text)
        return Interpreted(self, source, path)


def memory_of(tensor):
    """All elements from the first to the last, those between rows that lie apart too."""
    if tensor.is_contiguous():
        return tensor.flatten()
    return tensor.as_strided((1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)),), (1,))


@dataclass
class Interpreted:
    interpreter: Interpreter
    source: object
    path: Path

    def bind(self, args, grid):
        return lambda: self.run(args, grid)

    def run(self, args, grid):
        memory, end, named, placed = self.interpreter.memory, 0, {}, {}
        for name, arg in zip(self.source.signature, args, strict=True):
            named[name] = arg
            if isinstance(arg, torch.Tensor):
                flat = memory_of(arg)
                known = arg.data_ptr(), flat.nbytes
                if known not in placed:  # what one argument writes another may read
                    placed[known] = flat, memory[end : end + flat.nbytes], end
                    end += flat.nbytes + -flat.nbytes % 256
                begin = placed[known][2]
                named[name] = {"begin": begin, "end": begin + flat.nbytes, "dtype": str(arg.dtype).removeprefix("torch.")}
        assert end <= MEMORY_BYTES
        for tensor, place, _ in placed.values():
            place.copy_(tensor.view(torch.uint8))
        constants = self.source.constants | ({"PDL": False} if "PDL: tl.constexpr" in self.source.text else {})
        job = {"path": str(self.path), "symbol": self.source.symbol, "constants": constants, "args": named, "grid": grid}
        process = self.interpreter.process
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        failure = json.loads(process.stdout.readline() or '"the interpreter died"')
        assert not failure, failure
        for tensor, place, _ in placed.values():
            tensor.copy_(place.view(tensor.dtype))


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton")
    memory = torch.from_file(str(folder / "memory"), shared=True, size=MEMORY_BYTES, dtype=torch.uint8)
    script = Path(__file__).with_name("triton_interpreter.py")
    command = [sys.executable, str(script), str(folder / "memory"), str(MEMORY_BYTES)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Interpreter(process, memory, folder)
        process.stdin.close()
