"""Selection and tuning tables, over kernels that are Python functions: which one is taken, why, and what is compiled for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from ingot.artifacts.gate_record import GateError
from ingot.artifacts.plan import Kernel
from ingot.compiler import select as selecting
from ingot.compiler import tuning
from ingot.compiler.build import CompileOptions, Job
from ingot.compiler.select import Program, Selection, select
from ingot.compiler.tuning import Table, Tuned, TuningError, fingerprints, table_for, write
from ingot.compiler.variants import VariantSpec
from ingot.ops.kernel import Call, Candidate, Launch, Operand, Source, Steps, Tensor
from ingot.ops.norm import rms_norm
from ingot.ops.target import Target

CPU = torch.device("cpu")
DEVICE = Target("cpu", "x86-64:avx2+fma", "Made Up 9000")
X = Tensor(torch.float32, ({"T": 1}, 8))
CALL = Call("rms_norm", {"x": X, "weight": Tensor(torch.float32, (8,)), "eps": 1e-6, "offset": 0.0}, (X,))
SPECS = [VariantSpec(f"tokens_{n}", Steps(n, n, n, n, False), False) for n in (1, 4, 64)]


@dataclass
class Compiler:
    """Compiles the source "seconds bias" to a kernel that takes so long and is so far off."""

    sources: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)

    def __call__(self, sources: Iterable[Source]) -> Iterator[tuple[Source, tuple[Kernel, Any]]]:
        for s in sources:
            self.sources.append(s.text)
            yield s, (Kernel(s.text.replace(" ", "_"), s.family, "tvm", s.symbol, "", ""), _Function(self, s.text))


@dataclass
class _Function:
    compiler: Compiler
    text: str

    def bind(self, args: list[Any], grid: tuple[int, ...]) -> Callable[[], None]:
        x, weight, out = args

        def run() -> None:
            self.compiler.runs.append(self.text)
            out.copy_(rms_norm(x, weight, 1e-6, 0.0) + float(self.text.split()[1]))

        return run


class Clock:
    """Stands in for `Stopwatch`: what the kernel's text says."""

    warms = True

    def __init__(self, call: Call, steps: Steps, device: torch.device, layers: int = 1) -> None: ...

    def seconds(self, candidate: Candidate, kernels: list[Any], warm: float = 0.0) -> float:
        cold, _, *warmed = kernels[0].text.split()
        return float(warmed[0] if warm and warmed else cold)

    def runs(self, candidate: Candidate, kernels: list[Any]) -> list[list[Callable[[], None]]]:
        return [[lambda: None]]


def candidate(text: str, rank: float = 0.0) -> Candidate:
    operands = (Operand(arg="x"), Operand(arg="weight"), Operand(out=0))
    return Candidate(f"takes {text}", (Launch(Source("fake", "tvm", "kernel", text), operands),), rank=rank)


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Candidate]]:
    """The candidates of rms_norm: a list to change. Tables are read from an empty folder."""
    found = [candidate("0.003 0", 0.0), candidate("0 0", 1.0), candidate("0.001 0", 2.0)]
    monkeypatch.setattr(selecting, "load_families", lambda target: None)
    monkeypatch.setattr(selecting, "claimants", lambda call, steps, target: list(found))
    monkeypatch.setattr(selecting, "Stopwatch", Clock)
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path)
    return found


def run(compiler: Compiler, table: Table | None = None, device: torch.device | None = CPU, specs: list[VariantSpec] = SPECS, measure: bool = True) -> Selection:
    program = Program(None, [CALL, CALL], specs)  # type: ignore[arg-type]
    return select([program], DEVICE, compiler, device, lambda done, of: None, table or Table(), measure=measure)


def reasons(selection: Selection) -> list[str]:
    return [c.reason for c in selection.choices.values()]


@pytest.fixture
def table(family: list[Candidate]) -> Table:
    """What measuring the family gave, written and read again."""
    measured = run(Compiler())
    assert reasons(measured) == ["takes 0 0: fastest of 3 measured"] * 3
    write(tuning.SHIPPED / "made-up-9000.json", DEVICE, measured.tuned)
    return table_for(DEVICE)


def test_kernels_of_decode_steps_are_chosen_among_their_layers_others(family: list[Candidate], monkeypatch: pytest.MonkeyPatch) -> None:
    family[:] = [candidate("1.1 0"), candidate("1 0"), candidate("2 0")]
    tried: list[tuple[int, list[str]]] = []

    def fastest(layer: list[str], runs: dict[str, dict[str, Any]]) -> dict[str, str]:
        ((name, found),) = runs.items()
        assert layer == [name]  # from one of three to the next
        tried.append((len(tried), list(found)))
        return {name: "takes 1.1 0"}

    monkeypatch.setattr(selecting, "overlap", lambda target, steps: steps.exact)
    monkeypatch.setattr(selecting, "fastest_together", fastest)
    specs = [VariantSpec("decode_4", Steps(4, 4, 1, 4, True)), VariantSpec("tokens_64", Steps(64, 4, 64, 4, False))]
    chosen = run(Compiler(), specs=specs)
    assert tried == [(0, ["takes 1 0", "takes 1.1 0"])]
    assert reasons(chosen) == ["takes 1.1 0: fastest of 2 measured among its layer's others", "takes 1 0: fastest of 3 measured"]
    assert [t.candidate for t in chosen.tuned.values()] == ["takes 1.1 0", "takes 1.1 0", "takes 1 0"]  # the first with its layer and without
    assert {c.kernels[0] for c in chosen.choices.values()} <= chosen.kernels.keys()
    decided = run(Compiler(), Table("a.json", "", chosen.tuned), specs=specs)
    assert len(tried) == 1, "what the table knows is not tried again"
    assert "takes 1.1 0" in reasons(decided)[0]


@pytest.mark.parametrize("strict", [False, True])
def test_what_another_layer_chose_is_better_than_the_rank_but_not_measured(family: list[Candidate], monkeypatch: pytest.MonkeyPatch, strict: bool) -> None:
    monkeypatch.setattr(selecting, "overlap", lambda target, steps: True)
    monkeypatch.setattr(selecting, "fastest_together", lambda layer, runs: {})
    other = Call(CALL.op, CALL.args | {"eps": 1e-5}, CALL.results)
    measured = run(Compiler(), specs=SPECS[:1])
    program = Program(None, [CALL, other] * 2, SPECS[:1])  # type: ignore[arg-type]
    table = Table("a.json", "", measured.tuned, strict)
    chosen = select([program], DEVICE, Compiler(), CPU, lambda done, of: None, table, measure=True)
    assert ("tuning table" in chosen.choices[repr(CALL), SPECS[0].steps].reason) is not strict
    assert "tuning table" not in chosen.choices[repr(other), SPECS[0].steps].reason
    assert len(chosen.tuned) == (4 if strict else 2)


def test_long_kernels_are_compared_when_the_device_is_warm(family: list[Candidate]) -> None:
    """Those that were nearly the fastest when it was not."""
    family[:] = [candidate("0.010 0 0.014"), candidate("0.011 0 0.012"), candidate("0.013 0 0.001")]
    chosen = run(Compiler(), specs=SPECS[:1])
    assert reasons(chosen) == ["takes 0.011 0 0.012: fastest of 3 measured"]
    assert [t.us for t in chosen.tuned.values()] == [12000]


def test_a_table_spares_measuring_and_compiling_the_others(table: Table) -> None:
    compiler = Compiler()
    chosen = run(compiler, table)
    assert compiler.sources == ["0 0"]
    assert all("fastest of 3 in the tuning table made-up-9000.json, 0 µs" in r for r in reasons(chosen))
    assert chosen.errors["0_0"] < 1e-6
    assert compiler.runs == ["0 0"] * 2  # on the least and the largest variant that it serves; never timed
    assert chosen.tuned == {} == chosen.measured


def test_a_call_is_gated_while_kernels_of_others_compile(family: list[Candidate], monkeypatch: pytest.MonkeyPatch) -> None:
    other = Call(CALL.op, CALL.args | {"eps": 1e-5}, CALL.results)
    monkeypatch.setattr(selecting, "claimants", lambda call, steps, target: [candidate("0 0" if call is CALL else "1 0")])
    events: list[str] = []
    compiler = Compiler(events, events)
    select([Program(None, [other, CALL], SPECS[:1])], DEVICE, compiler, CPU, lambda done, of: None, Table())  # type: ignore[arg-type]
    assert events == ["1 0", "1 0", "0 0", "0 0"]  # compiled, run, compiled, run


def test_without_the_device_the_table_decides_and_else_the_rank(table: Table, family: list[Candidate]) -> None:
    compiler = Compiler()
    assert all("takes 0 0: " in r and "tuning table" in r for r in reasons(run(compiler, table, device=None)))
    assert compiler.sources == ["0 0"]
    for device in (None, CPU):  # a CPU is not asked how fast it is, so that equal inputs give equal artifacts
        compiler = Compiler()
        ranked = run(compiler, device=device, measure=False)
        assert reasons(ranked) == ["takes 0.003 0: first of 3 by rank"] * 3
        assert compiler.sources == ["0.003 0"]
        assert len(compiler.runs) == (0 if device is None else 2)
        assert ranked.errors.keys() == (set() if device is None else {"0.003_0"})


@pytest.mark.parametrize("change", ["source", "new candidate", "steps"])
def test_what_was_not_measured_so_is_not_found(table: Table, family: list[Candidate], change: str) -> None:
    specs = SPECS
    if change == "source":
        family[0] = candidate("0.002 0")
    elif change == "new candidate":
        family.append(candidate("0.004 0"))
    else:
        specs = [VariantSpec("tokens_128", Steps(128, 128, 128, 128, False), False)]
    assert reasons(run(Compiler(), table, specs=specs)) == [f"takes 0 0: fastest of {len(family)} measured"] * len(specs)
    assert all("by rank" in r for r in reasons(run(Compiler(), table, device=None, specs=specs)))


def test_a_table_cannot_get_a_wrong_kernel_past_the_gate(family: list[Candidate]) -> None:
    family[1] = candidate("0 0.5")
    entries = {fingerprints(CALL, s.steps, family)[0]: Tuned("rms_norm", "takes 0 0.5", 1.0) for s in SPECS}
    compiler = Compiler()
    chosen = run(compiler, Table("a.json", "", entries))
    assert reasons(chosen) == ["takes 0.001 0: fastest of 2 measured"] * 3
    assert compiler.sources == ["0 0.5", "0.003 0", "0.001 0"]
    assert all("takes 0 0.5 for ingot.rms_norm: error" in r for r in chosen.rejected)


def test_a_table_that_names_a_kernel_that_is_not_there_is_an_error(family: list[Candidate]) -> None:
    entries = {fingerprints(CALL, s.steps, family)[0]: Tuned("rms_norm T≤1", "takes 9 0", 1.0) for s in SPECS}
    with pytest.raises(TuningError, match=r"a\.json wants 'takes 9 0' for rms_norm T≤1, for which there are takes 0 0, .*ingot tune --add"):
        run(Compiler(), Table("a.json", "", entries))


def test_when_no_kernel_is_right_nothing_is_chosen(family: list[Candidate]) -> None:
    family[:] = [candidate("0 1"), candidate("0 2")]
    with pytest.raises(GateError, match=r"takes 0 1 .* error .* takes 0 2"):
        run(Compiler())


def test_tables_belong_to_devices(table: Table) -> None:
    assert table_for(Target("cpu", "x86-64:avx2+fma", "Other")).entries == {}
    assert table_for(Target("cpu", "x86-64:avx2+fma", "")).entries == table.entries  # compiled for no device in particular
    assert table_for(Target("cpu", "x86-64:avx2", "")).entries == {}
    (tuning.SHIPPED / "made-up-9000.json").write_text("{")
    with pytest.raises(TuningError, match=r"made-up-9000\.json is not a tuning table.*ingot tune"):
        table_for(DEVICE)
    with pytest.raises(TuningError, match="give another file with -o"):
        write(Path("/proc/none/x.json"), DEVICE, {})


def test_the_table_is_part_of_the_key(table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingot.compiler.build.resolve", lambda name: DEVICE)

    def key(**options: Any) -> str:
        return Job.prepare("bundled", CompileOptions(**options)).inputs.key

    with_table, measured = key(), key(tune=True)
    (tuning.SHIPPED / "made-up-9000.json").unlink()
    assert len({with_table, measured, key()}) == 3
    assert key(tune=True) == measured
