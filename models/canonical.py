"""From what `make_fx` records to the dialect: no noise, dialect ops for what they stand for, logits for the rows that need them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ingot.ops import Graph
from ingot.ops.rows import CASTS, row_operands

_aten = torch.ops.aten
_ingot = torch.ops.ingot
_NO_EFFECT = frozenset(
    {
        _aten._assert_tensor_metadata.default,
        _aten._assert_scalar.default,
        _aten._assert_async.msg,
        _aten.sym_constrain_range_for_size.default,
        torch._C._set_grad_enabled,
    }
)
_IDENTITIES = frozenset(
    {_aten.alias.default, _aten.detach.default, _aten.contiguous.default, _aten.clone.default, _aten.lift_fresh_copy.default, _aten.dropout.default}
)
_IDENTITIES_IF_ALIKE = CASTS | {_aten.expand.default, _aten.slice.Tensor}
_RESHAPES = frozenset({_aten.reshape.default, _aten.view.default, _aten._unsafe_view.default})
_RANGES = frozenset({_aten.arange.default, _aten.arange.start, _aten.arange.start_step})
_UNFILLED = frozenset({_aten.new_empty.default, _aten.empty.memory_format, _aten.empty_like.default})


def canonicalize(graph: Graph) -> Graph:
    """`graph` (changed in place) without nodes that compute nothing, with `ingot.linear` and `ingot.embedding`, and with `positions` for ranges."""
    for node in list(graph.fx.nodes):
        if node.op != "call_function":
            continue
        if node.target in _NO_EFFECT:
            graph.fx.erase_node(node)
            continue
        if node.target in _IDENTITIES or (node.target in _IDENTITIES_IF_ALIKE and _alike(node, node.args[0])):
            _replace(graph, node, node.args[0])
        elif node.target in _RESHAPES:
            # a view of what was made contiguous above need not be one now; and one unknown size needs no name
            node.target, node.args = _aten.reshape.default, (node.args[0], sizes(node.meta["val"].shape, node.args[1]))
        elif node.target in CASTS and node.target is not _aten.to.dtype:
            node.target, node.args, node.kwargs = _aten.to.dtype, (node.args[0], node.meta["val"].dtype), {}
        elif node.target is _aten.copy.default and _alike(node, node.args[1]):
            _replace(graph, node, node.args[1])
        elif node.target is _aten.slice_scatter.default:
            _tile(graph, node)
        elif node.target in _RANGES and _over_tokens(graph, node):
            with graph.fx.inserting_before(node):
                _replace(graph, node, graph.call(_aten.to.dtype, graph.placeholders["positions"], node.meta["val"].dtype))
        elif node.target is _aten.linear.default:
            node.target, node.args = _ingot.linear.default, (*node.args, None)[:3]
        elif node.target is _aten.embedding.default:
            node.target, node.args, node.kwargs = _ingot.embedding.default, (node.args[1], node.args[0]), {}
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "pin_memory"}
    graph.fx.eliminate_dead_code()
    return graph


def _over_tokens(graph: Graph, node: Any) -> bool:
    """Whether a range counts the tokens of the step from 0: a model without `position_ids` calls that their positions."""
    begin = node.args[0] if len(node.args) > 1 else 0
    return begin == 0 and str(node.meta["val"].shape[0]) == str(graph.placeholders["positions"].meta["val"].shape[0])


def sizes(shape: Any, given: Any) -> list[Any]:
    """Sizes for a reshape to `shape`: −1 for the only unknown; with more of them, those `given`, which may be nodes."""
    known = [s if isinstance(s, int) else -1 for s in shape]
    return known if known.count(-1) <= 1 else list(given)[-len(known) :]


def _replace(graph: Graph, node: fx.Node, by: fx.Node) -> None:
    node.replace_all_uses_with(by)
    graph.fx.erase_node(node)


def _alike(a: fx.Node, b: Any) -> bool:
    if not isinstance(b, fx.Node):
        return False
    x, y = a.meta["val"], b.meta["val"]
    return x.dtype == y.dtype and x.device == y.device and len(x.shape) == len(y.shape) and all(str(s) == str(t) for s, t in zip(x.shape, y.shape, strict=True))


def _tile(graph: Graph, last: fx.Node) -> None:
    """Slices written one after the other over memory that nobody filled are a `cat`, if they cover it without a gap."""
    dim, end = _slice(last)[:2]
    extent = last.meta["val"].shape[dim]
    pieces: list[tuple[int, int, fx.Node]] = []
    node: Any = last
    while node.target is _aten.slice_scatter.default:
        dim_here, begin, end = _slice(node)
        if dim_here != dim or not all(isinstance(n, int) for n in (begin, end, extent)):
            return
        pieces.append((begin, min(end, extent), node.args[1]))
        node = node.args[0]
    pieces.sort(key=lambda piece: piece[0])
    edges = [0, *(end for _, end, _ in pieces)]
    if node.target not in _UNFILLED or edges[-1] != extent or any(begin != edge for (begin, _, _), edge in zip(pieces, edges, strict=False)):
        return
    with graph.fx.inserting_before(last):
        whole = graph.call(_aten.cat.default, [piece for _, _, piece in pieces], dim)
    _replace(graph, last, whole)


def _slice(node: Any) -> tuple[int, Any, Any]:
    """(dim, begin, end) of a slice_scatter of step 1."""
    given: tuple[Any, ...] = tuple(node.args)
    _, _, dim, begin, end, step = given + (0, None, None, 1)[len(given) - 2 :]
    rank = node.meta["val"].dim()
    return int(dim) % rank, (begin or 0) if step == 1 else None, end if end is not None else node.meta["val"].shape[dim]


def gather_logits_rows(graph: Graph) -> Graph:
    """Insert `gather_rows` where every op from there to the logits works row by row: after the last mix, before the final norm."""
    output = graph.fx.output_node()
    node, chain = output.args[0][0], []
    tokens = str(graph.placeholders["input_ids"].meta["val"].shape[0])
    while (source := _row_source(node, tokens)) is not None:
        chain.append(node)
        node = source
    first = chain[-1] if chain else output
    with graph.fx.inserting_before(first):
        rows = graph.call(_ingot.gather_rows.default, node, graph.placeholders["logits_rows"])
    if chain:
        first.replace_input_with(node, rows)
    else:
        output.args = ([rows, *output.args[0][1:]],)
    for late in reversed(chain):
        late.meta["val"] = graph.fake(late.target, late.args, late.kwargs)
    return graph


def _row_source(node: Any, tokens: str) -> fx.Node | None:
    """The only operand that has rows, if row t of `node` depends on row t of it alone and on no other result."""
    if not isinstance(node.meta["val"], torch.Tensor) or len(node.users) != 1 or node.target is operator.getitem:
        return None
    operands = row_operands(node, tokens) or []
    return operands[0] if len(operands) == 1 and operands[0] is node.args[0] else None
