"""Compiles TVMScript files to shared objects; run as a program, because a defect in TVM's code generation is a segfault.

    python tvm_worker.py  < requests

A request is a line `symbol <tab> source path <tab> .so path <tab> launcher.o <tab> LLVM target as JSON`, answered by a line when it
is done. A shared object appears whole or not at all, and the first failure ends the program. Imports neither torch nor the rest of Ingot.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys

import tvm
from tvm.script import from_source
from tvm.target import Target

_PR_SET_PDEATHSIG = 1


def compile_file(symbol: str, source: str, output: str, target: Target, launcher: str) -> None:
    """Write the shared object of one PrimFunc. ValueError if it would allocate on the heap at run time."""
    with open(source) as f:
        function = from_source(f.read())
    module = tvm.compile(tvm.IRModule({symbol: function}), target, tir_pipeline="tirx").mod
    if "TVMBackendAllocWorkspace" in module.inspect_source("ll"):
        raise ValueError(f'{source}: a buffer lies on the heap; give every alloc_buffer scope="global" and at most 1 KB')
    stem = f"{output}.{os.getpid()}"
    module.write_to_file(stem + ".o", "o")
    # The launcher's OpenMP symbols stay undefined: the libgomp that torch has loaded defines them when the kernel is loaded.
    subprocess.run(["cc", "-shared", "-Wl,-Bsymbolic", "-o", stem, stem + ".o", launcher, "-lm"], check=True)
    os.remove(stem + ".o")
    os.replace(stem, output)


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a compiler that is killed leaves nobody at work
    sys.excepthook = sys.__excepthook__  # TVM's own says nothing of what is wrong with a script
    for line in sys.stdin:
        symbol, source, output, launcher, target = line.rstrip("\n").split("\t")
        compile_file(symbol, source, output, Target(json.loads(target)), launcher)
        print(output, flush=True)
