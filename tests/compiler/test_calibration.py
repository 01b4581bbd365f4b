"""Rounding weights with a text: what the algorithms see, that they round better than to nearest, and that they leave the model what it is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ingot.compiler.calibration import ALGORITHMS, CalibrationError, calibrate, siblings, windows
from ingot.compiler.calibration.algorithm import Inputs, rounded, scales_for
from ingot.compiler.calibration.forward import Forward, step_inputs
from ingot.compiler.calibration.gptq import _factor, quantized
from ingot.compiler.quantization import Request, choose_online, quantize_weights
from ingot.compiler.weights import bind
from ingot.models import oracle
from ingot.models.checkpoint import Checkpoint
from ingot.models.frontend import trace
from ingot.ops import Graph, Recipe, formats
from ingot.ops.target import Target

CPU = Target("cpu", "x86-64:avx2+fma", "")
CONFIG = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=128,
                     max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0, architectures=["LlamaForCausalLM"])  # fmt: skip
TEXTS = torch.randint(3, 128, (8, 24), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model some of whose inputs are much larger than others, as those of trained ones are."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32, attn_implementation="eager").eval()
    oracle.randomize(model)
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.data[::9] *= 6
        if "up_proj" in name:
            parameter.data[::7] *= 4
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def rounding(saved: tuple[Any, Path]) -> tuple[Graph, Checkpoint]:
    """The model's graph with weights to be rounded to int4."""
    graph = quantize_weights(trace(CONFIG, dtype=torch.float32, page_size=oracle.PAGE_SIZE), choose_online(Request("int4-g32", ("lm_head",)), CPU))
    checkpoint = Checkpoint.open(saved[1])
    graph.weights = bind(graph, checkpoint, CONFIG)
    return graph, checkpoint


def test_what_a_linear_reads_is_what_the_model_computes(saved: tuple[Any, Path], rounding: tuple[Graph, Checkpoint]) -> None:
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: args[0].flatten(0, -2)}))
        for name, module in saved[0].named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        saved[0](torch.tensor(TEXTS))
    for hook in hooks:
        hook.remove()
    graph, checkpoint = rounding
    forward = Forward(graph, checkpoint, torch.device("cpu"))
    groups = siblings(graph)
    assert [len(g) for g in groups.values()] == [3, 1, 2, 1] * 2
    compared = []

    def before(node: Any) -> None:
        for x, linears in groups.items():
            if node is linears[0]:
                name = linears[0].args[1].name.removesuffix("_weight")
                theirs = next(v for n, v in seen.items() if n.replace(".", "_") == name)
                torch.testing.assert_close(forward.values[x], theirs, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(Inputs.of(forward.values[x]).moments, theirs.T @ theirs / len(theirs), rtol=1e-4, atol=1e-4)
                compared.append(name)

    forward.run(step_inputs(graph, TEXTS, torch.device("cpu")), before)
    assert len(compared) == 8
    assert len(forward.values) == len({n for n in graph.fx.output_node().all_input_nodes if n.op == "call_function"})  # all others were let go


def rounding_error(weight: torch.Tensor, meaning: torch.Tensor, moments: torch.Tensor) -> float:
    wrong = meaning - weight
    return float((wrong @ moments * wrong).sum())


@pytest.mark.parametrize(("n", "k", "name"), [(24, 96, "int4_group32"), (7, 75, "int4_group32"), (16, 130, "int4_channel")])
def test_gptq_and_chosen_ends_beat_rounding_to_nearest(n: int, k: int, name: str) -> None:
    torch.manual_seed(n)
    form = formats.get(name)
    weight = torch.randn(n, k)
    x = torch.randn(512, 24) @ torch.randn(24, k) + 0.3 * torch.randn(512, k)  # columns that go together
    moments = Inputs.of(x).moments
    nearest = rounding_error(weight, form.dequantize(form.quantize(weight)), moments)
    scale = scales_for(weight, form, moments, torch.float32)
    ends = rounding_error(weight, rounded(weight, form.columns(scale, k), form), moments)
    order = moments.diag().argsort(descending=True)
    meaning = quantized(weight, scale, form, order, _factor(moments, order))
    assert ends < nearest
    assert rounding_error(weight, meaning, moments) < 0.6 * ends
    codes = meaning / form.columns(scale, k)
    torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
    assert codes.round().min() >= -8
    assert codes.round().max() <= 7


def logits_error(graph: Graph, checkpoint: Checkpoint, model: Any) -> float:
    constants = {n: w.recipe.run(checkpoint.tensors, graph.constants) for n, w in graph.weights.items()}
    weights = {n: replace(w, recipe=Recipe("constant", (n,))) for n, w in graph.weights.items()}
    return oracle.compare(replace(graph, constants=constants, weights=weights), model)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_calibrated_model_is_closer_to_the_original(algorithm: str, saved: tuple[Any, Path], rounding: tuple[Graph, Checkpoint], tmp_path: Path) -> None:
    graph, checkpoint = rounding
    done, more = calibrate(graph, checkpoint, algorithm, TEXTS, tmp_path, "mark", torch.device("cpu"), lambda fraction: None)
    before, after = logits_error(graph, checkpoint, saved[0]), logits_error(done, more, saved[0])
    assert after < 0.9 * before
    changed = {n for n, w in done.weights.items() if w != graph.weights[n]}
    norms = {n for n in changed if "layernorm" in n}
    assert len(changed - norms) == 7 * 2
    assert len(norms) == (4 if algorithm == "awq" else 0)
    assert all(s.startswith("calibrated/mark/") for n in changed for s in done.weights[n].recipe.sources)


def test_scaled_columns_leave_the_model_what_it_is(saved: tuple[Any, Path], rounding: tuple[Graph, Checkpoint], tmp_path: Path, monkeypatch: Any) -> None:
    """AWQ's factors alone: with weights that are not rounded, nothing changes."""
    awq = ALGORITHMS["awq"]
    factors = []

    def keep(self: Any, name: str, weight: torch.Tensor, inputs: Inputs) -> None:
        self.results[name] = {"weight": weight}

    chosen = awq._factor
    monkeypatch.setattr(awq, "_round", keep)
    monkeypatch.setattr(awq, "_factor", lambda *args: factors.append(chosen(*args)) or factors[-1])
    graph, checkpoint = rounding
    done, more = calibrate(graph, checkpoint, "awq", TEXTS, tmp_path, "mark", torch.device("cpu"), lambda fraction: None)
    assert len(factors) == 3 * 2  # before QKV, before gate and up, and between up and down
    assert sum(float(f.max() / f.min()) > 1.5 for f in factors) >= 4
    assert logits_error(done, more, saved[0]) < 1e-5


def test_texts_that_cannot_be_used(tmp_path: Path) -> None:
    from ingot.models.source import BUNDLED

    tokenizer = BUNDLED / "tokenizer.json"
    with pytest.raises(CalibrationError, match="no such file"):
        windows(tmp_path / "absent.txt", tokenizer, 512)
    text = tmp_path / "text.txt"
    text.write_text("def f():\n    pass\n")
    with pytest.raises(CalibrationError, match="at least 4096 are needed"):
        windows(text, tokenizer, 2048)
    with pytest.raises(CalibrationError, match="needs the model's tokenizer"):
        windows(text, tmp_path / "tokenizer.json", 2048)
    text.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="not UTF-8"):
        windows(text, tokenizer, 2048)
    text.write_text("\n".join(f"x{i} = {i} * y{i}" for i in range(2000)))
    assert len(windows(text, tokenizer, 256)[0]) == 256
