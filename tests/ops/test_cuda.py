"""The CUDA driver by ctypes, against a driver made for the test: which GPU is there, and what a machine without one says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return %(init)d; }
int cuDeviceGet(int *device, int ordinal) { *device = 40; return %(count)d > 0 ? 0 : 101; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "NVIDIA H200", length); return device == 40 ? 0 : 1; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 9 : attribute == 76 ? 0 : -1; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = context; return device == 40 ? 0 : 1; }
"""
PROBE = """
import sys
from ingot.ops import cuda, target
cuda._torch_has_cuda = lambda: %(built)s
cuda.make_context()
assert "torch" not in sys.modules
print(target.gpu() or "none", "|", target.resolve("auto").kind, "|", target.resolve("sm_90"))
"""


@pytest.mark.parametrize(
    ("init", "count", "built", "said"),
    [
        (0, 1, True, "cuda/sm_90 (NVIDIA H200) | cuda | cuda/sm_90 (NVIDIA H200)"),
        (0, 1, False, "none | cpu | cuda/sm_90"),  # a torch that is for CPUs
        (0, 0, True, "none | cpu | cuda/sm_90"),  # CUDA_VISIBLE_DEVICES hides them all
        (100, 1, True, "none | cpu | cuda/sm_90"),  # a driver that does not match
    ],
)
def test_the_gpu_is_found_without_torch(tmp_path: Path, init: int, count: int, built: bool, said: str) -> None:
    (tmp_path / "driver.c").write_text(DRIVER % {"init": init, "count": count})
    subprocess.run(["cc", "-shared", "-fPIC", tmp_path / "driver.c", "-o", tmp_path / "libcuda.so.1"], check=True)
    env = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROBE % {"built": built}], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == said
