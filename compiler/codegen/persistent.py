"""A persistent kernel: the launches of a layer of a decode step as stages of one kernel, whose programs stay on the GPU and wait for each other.

A stage is the body of an ordinary kernel. Its program ids become arguments, the programs of its grid are dealt out to the programs that stay,
and where it waits for the kernel before it (`gdc_wait`) it waits until all programs of the stage before it have arrived. So what the kernels
ask for ahead (weights, older KV pages) is on its way while they wait, as it is between launches that overlap, but a stage begins without one.

The programs must all be on the GPU at once: `num_programs` is at most what its multiprocessors hold. A wait that lasts for seconds gives up, and the result
is wrong rather than the GPU lost. Arrivals are counted in `Tickets`, zero before and after. Needs sm_90, whose kernels say where they wait.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from ingot.artifacts.plan import Arg, Entry, Grid, Value, Variant
from ingot.ops.dims import evaluate
from ingot.ops.kernel import Source

SYMBOL = "persistent_kernel"
TICKETS, _ALL = "persistent.tickets", "persistent.all_tickets"

_WAITING = '''
@triton.jit
def await_stage(arrivals, fresh, EXPECTED: tl.constexpr):
    """Wait until EXPECTED programs have arrived, or for EXPECTED = 0 until the kernel before this one has ended; only a `fresh` program needs to."""
    if fresh:
        if EXPECTED == 0:
            tl.extra.cuda.gdc_wait()
        else:
            tries = 0
            while (tl.load(arrivals, volatile=True) < EXPECTED) & (tries < 4000000):
                tries += 1
            tl.atomic_add(arrivals, 0, sem="acquire", scope="gpu")
            tl.debug_barrier()


@triton.jit
def arrive(arrivals, EXPECTED: tl.constexpr):
    """Say that this program has done its part of a stage; whether all EXPECTED ones have."""
    tl.debug_barrier()  # all threads have stored
    return tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == EXPECTED - 1
'''


@dataclass(frozen=True)
class Stage:
    """One launch of an ordinary kernel: `grid` of up to three axes, run-time arguments as the plan has them."""

    source: Source
    grid: tuple[int, ...]
    args: tuple[Arg, ...]

    @property
    def num_programs(self) -> int:
        x, y, z = (*self.grid, 1, 1, 1)[:3]
        return x * y * z


def join(stages: Sequence[Stage], num_programs: int, num_warps: int = 4, num_stages: int = 3) -> Source:
    """The kernel that runs `stages` one after the other. Its arguments are theirs in order, named s0_x, s1_x, …, and the tickets, one a stage."""
    functions: dict[str, ast.FunctionDef] = {}
    arrivals = [min(s.num_programs, num_programs) for s in stages]
    signature = {f"s{i}_{p}": t for i, s in enumerate(stages) for p, t in s.source.signature.items()} | {"tickets": "*i32"}
    lines = ["@triton.jit", f"def {SYMBOL}({', '.join(signature)}, NUM_PROGRAMS: tl.constexpr, PDL: tl.constexpr):"]
    lines += ["    if PDL:", "        tl.extra.cuda.gdc_launch_dependents()", "    this = tl.program_id(0)"]
    for i, stage in enumerate(stages):
        body = _stage_function(stage.source, functions)
        x, y, z = (*stage.grid, 1, 1, 1)[:3]
        given = {p: repr(c) for p, c in stage.source.constants.items()} | {p: f"s{i}_{p}" for p in stage.source.signature}
        given |= {"PDL": "PDL", "THREADS": str(32 * num_warps), "program_0": f"p % {x}", "program_1": f"p // {x} % {y}", "program_2": f"p // {x * y}",
                  "programs_0": str(x), "programs_1": str(y), "programs_2": str(z), "fresh": "p < NUM_PROGRAMS",
                  "arrivals": f"tickets + {max(i - 1, 0)}", "EXPECTED": str(arrivals[i - 1] if i else 0)}  # fmt: skip
        arguments = ", ".join(f"{a.arg}={given[a.arg]}" for a in functions[body].args.args)
        lines += [f"    for p in range(this, {stage.num_programs}, NUM_PROGRAMS):", f"        {body}({arguments})", f"    if this < {stage.num_programs}:"]
        if i < len(stages) - 1:
            lines.append(f"        arrive(tickets + {i}, {arrivals[i]})")
        else:  # nobody waits any more
            lines += [f"        if arrive(tickets + {i}, {arrivals[i]}):", *(f"            tl.store(tickets + {j}, 0)" for j in range(len(stages)))]
    texts = [_WAITING.strip(), *(ast.unparse(ast.fix_missing_locations(f)) for f in functions.values()), "\n".join(lines)]
    return Source(
        family="triton_persistent",
        backend="triton",
        symbol=SYMBOL,
        text="\n\n\n".join(["import triton\nimport triton.language as tl", *texts]) + "\n",
        signature=signature,
        constants={"NUM_PROGRAMS": num_programs},
        num_warps=num_warps,
        num_stages=num_stages,
    )


_PLACE = (*(f"{p}_{axis}" for p in ("program", "programs") for axis in range(3)), "arrivals", "fresh", "EXPECTED")
"""What a stage's functions are told instead of asking: which program of which grid this is, and what to wait for."""
_ASKS = ("tl.program_id", "tl.num_programs", "tl.extra.cuda.gdc_wait", "tl.extra.cuda.gdc_launch_dependents")


def _stage_function(source: Source, functions: dict[str, ast.FunctionDef]) -> str:
    """Put the source's functions among `functions`, its kernel as a stage, of the name that is returned."""
    parsed = {node.name: node for node in ast.parse(source.text).body if isinstance(node, ast.FunctionDef)}
    called = {name: {ast.unparse(c.func) for c in ast.walk(node) if isinstance(c, ast.Call)} for name, node in parsed.items()}
    told: set[str] = set()
    while more := {name for name, calls in called.items() if calls & {*_ASKS, *told}} - told:
        told |= more
    for name, node in parsed.items():
        if name in told:
            node = _AsStage(told).visit(node)
            node.name = f"{name}_stage"
            node.args.args += [ast.arg(p, ast.parse("tl.constexpr", mode="eval").body if p == "EXPECTED" else None) for p in _PLACE]
        known = functions.setdefault(node.name, node)
        if ast.unparse(known) != ast.unparse(node):
            raise ValueError(f"two kernels of a layer have different functions named {node.name}")
    return f"{source.symbol}_stage"


class _AsStage(ast.NodeTransformer):
    """Program ids become arguments, and waiting for the kernel before becomes waiting for the stage before; `told`: functions that are told so too."""

    def __init__(self, told: set[str]) -> None:
        self.told = told

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = ast.unparse(node.func)
        match name:
            case "tl.program_id":
                return ast.Name(f"program_{ast.unparse(node.args[0])}", ast.Load())
            case "tl.num_programs":
                return ast.Name(f"programs_{ast.unparse(node.args[0])}", ast.Load())
            case "tl.extra.cuda.gdc_wait":
                return ast.parse("await_stage(arrivals, fresh, EXPECTED)", mode="eval").body
        if name in self.told:
            node.func = ast.Name(f"{name}_stage", ast.Load())
            node.keywords += [ast.keyword(p, ast.Name(p, ast.Load())) for p in _PLACE]
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        self.generic_visit(node)
        return ast.Pass() if ast.unparse(node.value) == "tl.extra.cuda.gdc_launch_dependents()" else node


def layers(variant: Variant) -> list[slice]:
    """The entries of each layer: the longest stretch in which the same sequence of kernels repeats, cut into its repetitions; [] when nothing repeats."""
    names = [e.kernel if e.backend == "triton" else None for e in variant.entries]
    best: list[slice] = []
    for period in range(1, min(32, len(names) // 2) + 1):
        begin = 0
        while begin + period <= len(names):
            end = begin + period
            while names[end : end + period] == names[begin : begin + period] and None not in names[begin : begin + period]:
                end += period
            found = [slice(i, i + period) for i in range(begin, end, period)]
            if len(found) > 1 and len(found) * period > len(best) * (best[0].stop - best[0].start if best else 0):
                best = found
            begin += 1 if len(found) == 1 else max(end - begin - period + 1, 1)
    return best


def persistent(variant: Variant, sources: Mapping[str, Source], num_programs: int, **options: int) -> tuple[Variant, Source]:
    """`variant`, a decode step, with a kernel a layer, and that kernel, named SYMBOL in its entries; `sources` by the names of kernels.

    `options`: num_warps, num_stages. ValueError when no layer repeats.
    """
    repeated = layers(variant)
    if not repeated:
        raise ValueError(f"{variant.name} has no sequence of kernels that repeats")
    sizes = {"T": variant.max_tokens, "S": variant.max_seqs, "R": variant.max_rows}
    entries: list[Entry] = []
    source: Source | None = None
    for layer in repeated:
        parts = variant.entries[layer]
        stages = [Stage(sources[e.kernel], tuple(-(-evaluate(g.dim, sizes) // g.block) for g in e.grid), e.args) for e in parts]
        source = source or join(stages, num_programs, **options)
        args = (*(a for s in stages for a in s.args), Arg(value=TICKETS))
        outputs = tuple(dict.fromkeys(o for e in parts for o in e.outputs))
        entries.append(Entry(parts[0].node, "ingot.layer", "triton", args, outputs, SYMBOL, (Grid(num_programs),), reason="a layer as one kernel"))
    assert source is not None
    # the stages' own tickets lie at the beginning of the same memory, and are drawn while arrivals are counted
    drawn = max((evaluate(v.shape[0], sizes) for v in variant.values if v.storage == "tickets"), default=0)
    count, first = len(variant.entries[repeated[0]]), -(-drawn // 4) * 4
    values = (Value(_ALL, "int32", (first + count,), "tickets"), Value(TICKETS, "int32", (count,), "tickets", root=_ALL, offset=first))
    around = (*variant.entries[: repeated[0].start], *entries, *variant.entries[repeated[-1].stop :])
    return msgspec.structs.replace(variant, entries=around, values=(*variant.values, *values)), source
