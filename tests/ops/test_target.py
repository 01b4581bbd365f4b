"""Names of targets, and which machine runs what."""

import pytest

from ingot.ops import target
from ingot.ops.target import CPU_FEATURES, GPU_ARCHES, Target, TargetError, check_runs_here, host, resolve

V3, V4 = "x86-64:avx2+fma", "x86-64:avx2+fma+avx512f+avx512bw+avx512vl"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "gpu", lambda: None)


def test_names() -> None:
    assert resolve("auto") == resolve("cpu") == host()
    assert resolve("x86-64-v3") == resolve("cpu:fma+avx2") == Target("cpu", V3, "")
    assert resolve("x86-64-v4") == Target("cpu", V4, "")
    assert resolve("cpu:" + "+".join(reversed(CPU_FEATURES))).isa == "x86-64:" + "+".join(CPU_FEATURES)
    assert [resolve(name) for name in GPU_ARCHES] == [Target("cuda", name, "") for name in GPU_ARCHES]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sm_91", "unknown target 'sm_91': use auto, cpu, x86-64-v3, .*sm_120, or cpu:"),
        ("x86-64-v2", "unknown target"),
        ("cpu:avx2+fma+sse9", "'sse9' is no feature that kernels ask about; they are avx2, fma"),
        ("cpu:", "'' is no feature"),
        ("cpu:avx2", "lacks fma, .*; add fma"),
        ("cpu:avx2+fma+avx512_bf16", r"lacks avx512f, avx512bw, avx512vl, .*; add avx512f\+avx512bw\+avx512vl"),
    ],
)
def test_names_that_mean_nothing(name: str, said: str) -> None:
    with pytest.raises(TargetError, match=said):
        resolve(name)


def test_less_than_the_machine_has_runs_and_more_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "host", lambda: Target("cpu", V3, "A CPU"))
    check_runs_here(resolve("x86-64-v3"), "")
    with pytest.raises(TargetError, match=r"avx512vl, this machine is cpu/x86-64:avx2\+fma \(A CPU\); build one for it with: ingot compile m"):
        check_runs_here(resolve("x86-64-v4"), "ingot compile m")
    with pytest.raises(TargetError, match="no CUDA device"):
        check_runs_here(resolve("sm_90"), "")
    assert not resolve("sm_90").runs_on(Target("cuda", "sm_80", "NVIDIA A100"))
    assert resolve("sm_90").runs_on(Target("cuda", "sm_90", "NVIDIA H200"))
