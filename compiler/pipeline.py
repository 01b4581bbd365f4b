"""The passes, in order. Each is `Graph, Target → Graph`, pure; `verify` runs after each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ingot.ops import Graph
from ingot.ops.garbage import uncollected
from ingot.ops.kernel import Steps
from ingot.ops.target import Target

from .passes.clean_views import clean_views
from .passes.fold_weight_views import fold_weight_views
from .passes.fuse_add_norm import fuse_add_norm
from .passes.fuse_attention import fuse_attention
from .passes.fuse_glu import fuse_glu
from .passes.fuse_latent_write import fuse_latent_write
from .passes.fuse_norm_linear import fuse_norm_linear
from .passes.fuse_residual import fuse_residual
from .passes.fuse_rope_kv import fuse_rope_kv
from .passes.fuse_router import fuse_router
from .passes.gather_early import gather_early
from .passes.group_regions import group_regions
from .passes.merge_siblings import merge_siblings
from .passes.quantize_experts import quantize_experts
from .passes.quantize_linears import quantize_linears
from .passes.round_glu import round_glu
from .passes.straighten_experts import straighten_experts
from .passes.ungroup_columns import ungroup_columns
from .variants import LAST_CAPTURED

Pass = Callable[[Graph, Target], Graph]

PIPELINE: tuple[Pass, ...] = (
    clean_views,  # first, so that patterns need not look through views
    fold_weight_views,  # weights are what they will be before anything merges them
    straighten_experts,
    ungroup_columns,  # before siblings merge: a linear's columns are one product's
    fuse_glu,  # before siblings merge: gate and up must lie in this order
    merge_siblings,
    fuse_rope_kv,  # needs the merged QKV
    fuse_latent_write,  # the same of latents
    fuse_attention,  # needs the fused rope
    fuse_residual,
    fuse_add_norm,  # takes the residual sums that no linear could
    quantize_linears,  # needs the linears that will be
    quantize_experts,
    fuse_norm_linear,  # of linears that stayed as they were
    fuse_router,
    group_regions,  # last: what is still aten then, nothing else will compute
)
PROMPTS: tuple[Pass, ...] = (gather_early,)
"""Beyond those, for steps in which a sequence has several tokens."""
MANY_ROWS: tuple[Pass, ...] = (round_glu,)
"""Beyond those, for steps of more than `variants.LAST_CAPTURED` tokens. Fewer rows are better without: a generated product gates its own result."""


def passes_for(steps: Steps) -> tuple[Pass, ...]:
    """What the lowered graph goes through once more for such steps. Deterministic steps are of one graph, as they are of one variant."""
    if steps.deterministic:
        return ()
    return (PROMPTS if steps.max_num_new > 1 else ()) + (MANY_ROWS if steps.max_tokens > LAST_CAPTURED else ())


@uncollected()
def lower(graph: Graph, target: Target, dump: Path | None = None) -> tuple[Graph, dict[str, int]]:
    """Run PIPELINE; also the number of calls after each pass. With `dump`, the graph goes to `<dump>/<nn>_<pass>.txt`."""
    graph.verify()
    counts = {"traced": count(graph)}
    _dump(graph, dump, "00_traced")
    for i, run in enumerate(PIPELINE, 1):
        graph = run(graph, target)
        graph.verify()
        counts[run.__name__] = count(graph)
        _dump(graph, dump, f"{i:02}_{run.__name__}")
    return graph, counts


def lower_further(graph: Graph, target: Target, passes: Sequence[Pass], dump: Path | None = None) -> Graph:
    """Run passes on a lowered graph, which is returned itself where they change nothing. With `dump`, what they change goes there too, with all their names."""
    name = f"{len(PIPELINE) + 1:02}"
    for run in passes:
        before, graph = graph, run(graph, target)
        graph.verify()
        name += f"_{run.__name__}"
        if graph is not before:
            _dump(graph, dump, name)
    return graph


def count(graph: Graph) -> int:
    """Number of calls, views and all."""
    return sum(n.op == "call_function" for n in graph.fx.nodes)


def _dump(graph: Graph, folder: Path | None, name: str) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text(f"{graph}\n")
