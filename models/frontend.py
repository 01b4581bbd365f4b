"""From a transformers config to a Graph, by running transformers' own modeling code on tensors without data.

The model is built on the meta device. One run of shapes finds the states and lets the swaps see how each piece is called;
then the model runs once more under `make_fx`, with symbolic sizes, its parameters as inputs and the swaps in force.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ingot.ops import Graph, Recipe, Weight
from ingot.ops.garbage import uncollected

from . import encoders
from .alike import UNREAD, Alike
from .canonical import canonicalize, gather_logits_rows
from .functional import functional
from .swaps import Patch, Swap, patched
from .swaps.attention import Attention
from .swaps.context import Context, TraceError, tracing
from .swaps.experts import Experts
from .swaps.families import Families
from .swaps.latent import Latent
from .swaps.linear import Linear
from .swaps.masks import Masks
from .swaps.norm import Norm
from .swaps.rope import Rope
from .swaps.rotary_embedding import RotaryEmbedding
from .swaps.state_space import StateSpace
from .unbatch import unbatch

__all__ = ["TraceError", "architecture", "build", "entry_point", "run_model", "shortened", "trace"]

Run = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
"""(model, ids [1, T], positions [1, T]) → the result of a packed batch [1, T, …]."""
_EXAMPLE = {"T": 13, "S": 3, "R": 5}


def entry_point(config: transformers.PreTrainedConfig) -> str:
    """What a graph of `config` computes: `embed` of an encoder, `forward` of a causal language model."""
    return "embed" if encoders.architecture(config) else "forward"


def architecture(config: transformers.PreTrainedConfig) -> str:
    """Name of the class that is traced: a causal language model's, or an encoder's base model. TraceError if transformers has none for `config`."""
    if encoder := encoders.architecture(config):
        return encoder
    names = list(config.architectures or [])
    mapped = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    for name in (*names, mapped):
        if name is not None and name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and hasattr(transformers, name):
            return name
    raise TraceError(
        f"model type {config.model_type!r} ({', '.join(names) or 'no architectures given'}) is neither a causal language model nor an encoder of transformers "
        f"{transformers.__version__}; models that bring their own code are not supported"
    )


def build(config: transformers.PreTrainedConfig, dtype: torch.dtype, device: str) -> transformers.PreTrainedModel:
    """The model of a copy of `config`, in eval mode; on "meta" it holds no data. Parameters that transformers keeps in float32 are.

    TraceError: the config's sizes and names make no model.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what is traced is the mathematics; formats of weights are recipes
    name = architecture(config)
    if getattr(config.get_text_config(decoder=True), "hidden_size", 1) == 0:
        raise TraceError(f"{name} would be empty: hidden_size is 0 in its config.json; correct the config")
    try:
        with torch.device(device):
            model = getattr(transformers, name)._from_config(config, dtype=dtype, attn_implementation="eager").eval()
    except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as e:  # what modeling code raises on a bad size or name
        raise TraceError(f"transformers cannot build {name} from its config.json: {type(e).__name__}: {e}; correct the config") from e
    if dtype != torch.float32:
        kept = set(model._keep_in_fp32_modules_strict or ()) | (set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set())
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and kept & set(name.split(".")):
                tensor.data = tensor.data.float()
    return model


def shortened(config: transformers.PreTrainedConfig) -> transformers.PreTrainedConfig | None:
    """`config` with two layers, whose calls are those of the whole; None where layers are known to differ, or are few."""
    text = config.get_text_config(decoder=True)
    count, kinds = getattr(text, "num_hidden_layers", None) or 0, getattr(text, "layer_types", None)
    if count <= 4 or len(set(kinds or ())) > 1:
        return None
    short = copy.deepcopy(config)
    text = short.get_text_config(decoder=True)
    text.num_hidden_layers = 2
    if kinds and "layer_types" in vars(text):  # of some it is a property that counts the layers
        text.layer_types = kinds[:2]
    return short


@uncollected()
def trace(
    config: transformers.PreTrainedConfig, *, dtype: torch.dtype, kv_dtype: torch.dtype | None = None, page_size: int = 16, kv_calibrated: bool = False
) -> Graph:
    """The graph of the causal language model (`forward`) or encoder (`embed`) that `config` describes; see ARCHITECTURE.md for its inputs.

    Activations and weights are `dtype`; caches are `kv_dtype` (default: what is written to them); a page holds `page_size`
    tokens. `kv_calibrated`: a checkpoint brings scales for them, weights `<attention module>.k_scale` and `.v_scale`.

    TraceError if the model asks for something that the dialect cannot say.
    """
    model = build(config, dtype, "meta")
    buffers = _real_buffers(model)
    modules = {id(m): n for n, m in model.named_modules()} if kv_calibrated else {}
    context = Context(page_size, kv_dtype, entry_point(config), modules)
    swaps = _swaps(model, context, buffers)
    run = encoders.runner(model) if context.entry_point == "embed" else run_model
    with torch.no_grad(), tracing(context), patched(UNREAD):
        with patched([p for s in swaps for p in s.observers()]):
            context.begin({})
            step = torch.zeros(1, 7, dtype=torch.int32, device="meta")
            _run_shapes(run, model, step)
        patches = [p for s in swaps for p in s.patches()]
        graph = _trace(run, model, context, patches, buffers)
    graph = unbatch(canonicalize(graph))
    graph = encoders.pool_sequences(graph) if graph.entry_point == "embed" else gather_logits_rows(graph)
    drop_unused(graph)
    graph.verify()
    return graph


def _swaps(model: transformers.PreTrainedModel, context: Context, buffers: dict[str, torch.Tensor]) -> list[Swap]:
    of_module: dict[torch.nn.Module, dict[str, torch.Tensor]] = {}
    for name, value in buffers.items():
        parent, _, own = name.rpartition(".")
        of_module.setdefault(model.get_submodule(parent), {})[own] = value
    rope = Rope(model, context)
    tables = RotaryEmbedding(model, context, of_module, rope)
    attention = [Masks(model, context), Attention(model, context), Latent(model, context), Families(model, context)]
    return [Linear(), *attention, Experts(model, context), StateSpace(model, context), Norm(model, context), rope, tables]


def _run_shapes(run: Run, model: torch.nn.Module, step: torch.Tensor) -> None:
    try:
        run(model, step, step)
    except (RuntimeError, NotImplementedError) as e:
        if "meta tensor" not in str(e):
            raise
        raise TraceError(f"{type(model).__name__}: the code asks for values of tensors ({e}); a graph has one path for all steps") from e


def run_model(model: torch.nn.Module, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits [1, T, V] of one packed batch [1, T], without transformers' cache."""
    logits: torch.Tensor = model(input_ids=input_ids, position_ids=positions, use_cache=False).logits
    return logits


def _real_buffers(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Values of the buffers that no checkpoint has, made as `from_pretrained` makes them: by the model's `_init_weights`."""
    meta = {
        f"{prefix}.{name}".lstrip("."): (module, name, buffer)
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name in module._non_persistent_buffers_set
    }
    real = {full: torch.full_like(b, float("nan") if b.is_floating_point() else 0, device="cpu") for full, (_, _, b) in meta.items()}
    for full, (module, name, _) in meta.items():
        module._buffers[name] = real[full]
    owners = {id(module) for module, _, _ in meta.values()}
    nearest: dict[str, transformers.PreTrainedModel] = {}
    for prefix, module in model.named_modules():
        is_model = isinstance(module, transformers.PreTrainedModel)
        nearest[prefix] = module if is_model else nearest.get(prefix.rpartition(".")[0], model)
        if is_model or id(module) in owners:  # a model may fill the buffers of its parts
            nearest[prefix]._init_weights(module)
    for full, (module, name, buffer) in meta.items():
        module._buffers[name] = buffer
        if real[full].is_floating_point() and bool(real[full].isnan().any()):
            raise TraceError(f"{type(module).__name__}: transformers does not say how the buffer {full} is made")
    return real


def _trace(run: Run, model: transformers.PreTrainedModel, context: Context, patches: list[Patch], buffers: dict[str, torch.Tensor]) -> Graph:
    sizes = Sizes()
    inputs = context.inputs()
    values = {name: sizes.empty(spec.shape, spec.dtype) for name, spec in inputs.items()}
    values |= {name: sizes.empty((f"N_{spec.group}", *spec.shape), spec.dtype) for name, spec in context.states.items()}
    weights, constants = _weights(model, buffers)
    weights |= {name: Weight(Recipe("tensor", (name,)), torch.float32, (1,)) for name in context.calibrated}
    tensors = {name: sizes.empty(w.shape, w.dtype) for name, w in weights.items()}
    if clash := set(values) & {_identifier(n) for n in weights}:
        raise TraceError(f"parameters named like step inputs: {', '.join(sorted(clash))}")

    def step(*args: torch.Tensor) -> list[torch.Tensor]:
        inputs = dict(zip(values, args, strict=False))
        parameters = dict(zip(tensors, args[len(values) :], strict=True))
        context.begin(inputs | {n: parameters.pop(n) for n in context.calibrated})
        result = torch.func.functional_call(_Step(model, run), {f"model.{n}": p for n, p in parameters.items()}, (inputs["input_ids"], inputs["positions"]))
        return [result.squeeze(0), *(context.values[n] for n in context.states)]

    args = (*values.values(), *tensors.values())
    with patched(patches), sizes.mode:
        with patched([Alike(sizes.mode).patch]):
            module = make_fx(step, tracing_mode="real", pre_dispatch=True)(*args)
        module = functional(module, args)
    sizes.check_guards(type(model).__name__)
    names = [*values, *map(_identifier, tensors)]
    for node, name in zip([n for n in module.graph.nodes if n.op == "placeholder"], names, strict=True):
        node.name = node.target = name
    graph = Graph(
        fx=module.graph,
        inputs=inputs,
        states=dict(context.states),
        weights={_identifier(n): w for n, w in weights.items()},
        constants=constants,
        symbols=sizes.names,
        entry_point=context.entry_point,
    )
    lift_attributes(graph, module)
    return graph


class _Step(torch.nn.Module):
    """The model on a packed step: a batch of one."""

    def __init__(self, model: torch.nn.Module, run: Run) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.run(self.model, input_ids.unsqueeze(0), positions.unsqueeze(0))


class Sizes:
    """Fake tensors over named symbolic sizes."""

    def __init__(self) -> None:
        self._shapes = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self._shapes, allow_non_fake_inputs=True)
        self.mode.cache_enabled = False  # with symbolic sizes its keys cost more than the rules it saves
        self.names: dict[str, str] = {}  # symbol → size
        self._sizes: dict[str, torch.SymInt] = {}

    def _size(self, name: str | int) -> int | torch.SymInt:
        if isinstance(name, int):
            return name
        if name.endswith("+1"):
            return self._size(name.removesuffix("+1")) + 1
        if name not in self._sizes:
            example = torch.empty(_EXAMPLE.get(name, 17 + 2 * len(self._sizes)), device="meta")
            dynamic: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
            size: Any = self.mode.from_tensor(example, symbolic_context=dynamic, source=ConstantSource(name)).shape[0]
            self._sizes[name] = size
            self.names[str(size.node.expr)] = name
        return self._sizes[name]

    def empty(self, shape: tuple[str | int, ...], dtype: torch.dtype) -> torch.Tensor:
        sizes = [self._size(s) for s in shape]
        if all(isinstance(s, int) for s in sizes):  # as most are, of weights
            return FakeTensor(self.mode, torch.empty(sizes, dtype=dtype, device="meta"), torch.device("cpu"))
        with self.mode:
            return torch.empty(sizes, dtype=dtype)

    def check_guards(self, model: str) -> None:
        """TraceError if the model took a branch that other sizes would not take."""
        for guard in self._shapes.guards:
            free = sorted(guard.expr.free_symbols, key=str)
            # a size of 1 broadcasts where others do not, and the tracer notes that; the references run it all the same
            for probe in (2, 3, 64, 10007, 99991):
                if guard.expr.subs({s: probe + i for i, s in enumerate(free)}) == False:  # noqa: E712 — a sympy boolean
                    branch = str(guard.expr)
                    for symbol, name in self.names.items():
                        branch = re.sub(rf"\b{symbol}\b", name, branch)
                    raise TraceError(f"{model}: the code branches on {branch}; a graph has one path for all steps")


def _identifier(name: str) -> str:
    return name.replace(".", "_")


def _weights(model: transformers.PreTrainedModel, buffers: dict[str, torch.Tensor]) -> tuple[dict[str, Weight], dict[str, torch.Tensor]]:
    """Every parameter and buffer of the model, once, under the name that a checkpoint gives it; and the constants."""
    tied = set(model.all_tied_weights_keys)
    weights: dict[str, Weight] = {}
    seen: set[int] = set()
    parameters = list(model.named_parameters(remove_duplicate=False))
    for name, p in sorted(parameters, key=lambda item: item[0] in tied):
        if id(p) not in seen:
            seen.add(id(p))
            weights[name] = Weight(Recipe("tensor", (name,)), p.dtype, tuple(p.shape))
    for name, b in model.named_buffers():
        recipe = Recipe("constant", (name,)) if name in buffers else Recipe("tensor", (name,))
        weights[name] = Weight(recipe, b.dtype, tuple(b.shape))
    order = {name: i for i, (name, _) in enumerate((*parameters, *model.named_buffers(remove_duplicate=False)))}
    return dict(sorted(weights.items(), key=lambda item: order[item[0]])), dict(buffers)


def lift_attributes(graph: Graph, module: fx.GraphModule) -> None:
    """Tensors that the code made from literals become constants."""
    for node in list(graph.fx.nodes):
        if node.op != "get_attr":
            continue
        value = getattr(module, node.target)
        name = f"constant_{node.target.strip('_')}"
        if not isinstance(value, torch.Tensor) or value.is_meta or type(value) is not torch.Tensor:
            raise TraceError(f"the model keeps {node.target} outside its parameters and buffers; its value is not known without a checkpoint")
        with graph.fx.inserting_before(node):
            placeholder = graph.add_weight(name, Weight(Recipe("constant", (name,)), value.dtype, tuple(value.shape)))
        graph.constants[name] = value.clone()
        node.replace_all_uses_with(placeholder)
        graph.fx.erase_node(node)


def drop_unused(graph: Graph) -> None:
    """Remove what nobody reads: dead calls, step inputs apart, and weights such as a second copy of the frequencies."""
    graph.fx.eliminate_dead_code()
    for name, node in graph.placeholders.items():
        if name in graph.weights and not node.users:
            graph.fx.erase_node(node)
            recipe = graph.weights.pop(name).recipe
            if recipe.op == "constant":
                del graph.constants[recipe.params[0]]
