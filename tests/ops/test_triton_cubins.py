"""Every Triton family compiles to cubins at the shapes of real models, on a machine without a GPU."""

import pytest
import torch

import ingot.ops.triton
from ingot.compiler.codegen.triton import compile_sources
from ingot.ops import formats
from ingot.ops.kernel import CLAIMS, Call, Steps, Tensor
from ingot.ops.target import GPU_ARCHES, Target

ingot.ops.triton.load()

BF16, F16, F32, I32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.float8_e4m3fn
ONE, DECODE, PREFILL = Steps(1, 1, 1, 1, True), Steps(8, 8, 1, 8, True), Steps(1024, 64, 1024, 64, False)
T, R, S, S1, P, N = {"T": 1}, {"R": 1}, {"S": 1}, {"S": 1, "": 1}, {"P_full": 1}, {"N_full": 1}


def quantized(form, activation, rows, n, k, act=None):
    """A product of x [rows, k] with a weight in a format."""
    plain = formats.get(form).quantize(torch.empty(n, k, dtype=BF16, device="meta"))
    layout = formats.get(form).layout(Target("cuda", "sm_90", ""))
    parts = {p: Tensor(t.dtype, tuple(t.shape)) for p, t in formats.packed(plain, form, layout, 2 if act else 1).items()}
    args = {"x": Tensor(BF16, (rows, k)), "weight": parts["weight"], "scale": parts["scale"], "zero": parts.get("zero"), "input_scale": None, "bias": None,
            "residual": None, "act": act, "format": form, "layout": layout, "activation": activation, "n": n, "norm_weight": None, "eps": None,
            "offset": 0.0}  # fmt: skip
    return Call("quantized_linear", args, (Tensor(BF16, (rows, n // 2 if act else n)),))


def recurrences(dtype):
    """Of Mamba-2 2.7B, Mamba, Qwen3-Next, Kimi Linear (its decay is by channel), RecurrentGemma and RWKV-4."""
    rows, slots = lambda *shape, dtype=dtype: Tensor(dtype, (T, *shape)), lambda *shape, dtype=F32: Tensor(dtype, ({"N_slot": 1}, *shape))
    step = {"cu_seqlens_q": Tensor(I32, (S1,)), "seq_lens": Tensor(I32, (S,)), "state_slots": Tensor(I32, (S,))}
    heads, channels = Tensor(F32, (80,)), Tensor(F32, (5120,))
    delta = {"q": rows(16, 128), "k": rows(16, 128), "v": rows(32, 128), "g": rows(32, dtype=F32), "beta": rows(32), "delta_state": slots(32, 128, 128)}
    return [
        Call("rms_norm_gated", {"x": rows(5120, dtype=F32), "gate": rows(5120), "weight": channels, "eps": 1e-5, "group": 0, "act": "silu",
                                "norm_first": False}, (rows(5120, dtype=F32),)),
        Call("causal_conv1d", {"x": rows(5376), "weight": Tensor(dtype, (5376, 4)), "bias": Tensor(dtype, (5376,)),
                               "conv_state": slots(5376, 3, dtype=dtype), **step, "act": "silu"}, (rows(5376),)),
        Call("ssd_scan", {"x": rows(80, 64), "dt": rows(80), "A": heads, "B": rows(1, 128), "C": rows(1, 128), "D": heads, "dt_bias": heads,
                          "ssm_state": slots(80, 64, 128), **step, "softplus": True, "dt_min": 0.0, "dt_max": float("inf")}, (rows(80, 64, dtype=F32),)),
        Call("selective_scan", {"x": rows(5120), "dt": rows(5120), "A": Tensor(F32, (5120, 16)), "B": rows(16), "C": rows(16), "D": channels, "z": rows(5120),
                                "dt_bias": channels, "ssm_state": slots(5120, 16), **step, "softplus": True}, (rows(5120),)),
        Call("gated_delta_rule", {**delta, **step, "eps": 1e-6}, (rows(32, 128),)),
        Call("gated_delta_rule", {**delta, "g": rows(32, 128, dtype=F32), **step, "eps": 1e-6}, (rows(32, 128),)),
        Call("linear_recurrence", {"x": rows(2560), "decay": rows(2560, dtype=F32), "lru_state": slots(2560), **step}, (rows(2560),)),
        Call("wkv", {"k": rows(2048), "v": rows(2048), "log_decay": Tensor(dtype, (2048,)), "bonus": Tensor(dtype, (2048,)),
                     "wkv_state": slots(3, 2048), **step}, (rows(2048),)),
    ]  # fmt: skip


def experts(form, x, count, active, hidden, inner):
    """A mixture of gated experts in a format."""
    layout = formats.get(form).layout(Target("cuda", "sm_90", ""), experts=True)
    args = {"x": x, "expert_ids": Tensor(torch.int64, (T, active)), "expert_weights": Tensor(F32, (T, active))}
    for side, n, k in (("in", 2 * inner, hidden), ("out", hidden, inner)):
        plain = formats.get(form).quantize(torch.empty(n, k, dtype=BF16, device="meta"))
        parts = {p: Tensor(t.dtype, (count, *t.shape)) for p, t in formats.packed(plain, form, layout, 1).items()}
        args |= {f"w_{side}": parts["weight"], f"s_{side}": parts["scale"], f"z_{side}": parts.get("zero"), f"b_{side}": None}
    return Call("quantized_moe", args | {"act": "silu", "gated": True, "format": form, "layout": layout, "activation": "none", "inner": inner}, (x,))


def calls(h, k, e, f, hidden, dtype, kv_dtype=None):
    """A call of every op in a model with h query heads, k kv heads, head dims e and f; `kv_dtype`: of a quantized cache."""
    x, weight = Tensor(dtype, (T, hidden)), Tensor(dtype, (hidden,))
    table, slots = Tensor(F32, (T, e)), Tensor(I32, (T,))
    cache = {"k_cache": Tensor(kv_dtype or dtype, (N, k, 64, e)), "v_cache": Tensor(kv_dtype or dtype, (N, k, 64, f))}
    scales = dict.fromkeys(("k_scale", "v_scale"), Tensor(F32, (N, k, 64)) if kv_dtype else None)
    written = {**scales, "k_static": None, "v_static": None}
    batch = {"cu_seqlens_q": Tensor(I32, (S1,)), "seq_lens": Tensor(I32, (S,)), "page_table": Tensor(I32, (S, P))}
    q, head = Tensor(dtype, (T, h, e)), Tensor(dtype, (e,))
    square = Tensor(dtype, (hidden, hidden))
    down = quantized("fp8_e4m3_channel", "fp8_e4m3_token", T, hidden, 4096).args
    return [
        quantized("fp8_e4m3_channel", "fp8_e4m3_token", T, 4096, hidden, "silu"),
        Call("glu_quantized_linear", {"x": Tensor(BF16, (T, 8192)), "gate": "silu"} | {a: down[a] for a in (
            "weight", "scale", "input_scale", "bias", "residual", "format", "layout", "activation", "n")}, (Tensor(BF16, (T, hidden)),)),
        quantized("int4_group128", "none", T, 4096, hidden),
        quantized("int8_channel", "int8_token", T, 4096, hidden),
        Call("add_rms_norm_quantized_linear", {"x": Tensor(BF16, (T, 4096)), "added": Tensor(BF16, (T, 4096)), "norm_weight": None} | {a: down[a] for a in (
            "weight", "scale", "input_scale", "bias", "act", "format", "layout", "activation", "n")} | {"eps": 1e-6, "offset": 0.0},
             (Tensor(BF16, (T, hidden)), Tensor(BF16, (T, 4096)))),
        Call("rms_norm", {"x": x, "weight": weight, "eps": 1e-6, "offset": 0.0}, (x,)),
        Call("add_rms_norm", {"x": x, "residual": x, "weight": weight, "eps": 1e-6, "offset": 1.0}, (x, x)),
        Call("linear", {"x": x, "weight": square, "bias": None}, (x,)),
        Call("linear_add", {"x": x, "weight": square, "bias": weight, "residual": x}, (x,)),
        Call("linear_glu", {"x": x, "weight": Tensor(dtype, (6 * hidden, hidden)), "act": "gelu"}, (Tensor(dtype, (T, 3 * hidden)),)),
        Call("rms_norm_linear", {"x": x, "norm_weight": weight, "weight": square, "bias": None, "eps": 1e-6, "offset": 0.0}, (x,)),
        Call("rms_norm_linear_glu", {"x": x, "norm_weight": weight, "weight": Tensor(dtype, (6 * hidden, hidden)), "act": "silu", "eps": 1e-6, "offset": 0.0},
             (Tensor(dtype, (T, 3 * hidden)),)),
        Call("grouped_linear", {"x": x, "weight": Tensor(dtype, (32, hidden, 720)), "bias": Tensor(dtype, (32, 720)), "expert_ids": Tensor(torch.int64, (T,)),
                                "transposed": True}, (Tensor(dtype, (T, 720)),)),
        Call("moe", {"x": x, "expert_ids": Tensor(torch.int64, (T, 8)), "expert_weights": Tensor(dtype, (T, 8)), "w_in": Tensor(dtype, (128, 1536, hidden)),
                     "b_in": None, "w_out": Tensor(dtype, (128, hidden, 768)), "b_out": None, "act": "silu", "gated": True, "transposed": False,
                     "interleaved": False}, (x,)),
        experts("fp8_e4m3_block128", x, 32, 8, hidden, 768),
        experts("int4_group128", x, 32, 8, hidden, 768),
        Call("route", {"logits": Tensor(dtype, (T, 128)), "k": 8, "softmax": True, "renormalize": True, "scale": 1.0, "dtype": dtype},
             (Tensor(dtype, (T, 8)), Tensor(torch.int64, (T, 8)))),
        Call("qkv_attention", {"qkv": Tensor(dtype, (T, (h + k) * e + k * f)), "cos": table, "sin": table, "q_weight": head, "k_weight": head, **cache,
                               "slot_mapping": slots, **batch, "sinks": None, "num_heads": h, "num_kv_heads": k, "style": "neox", "eps": 1e-6,
                               "offset": 0.0, "scale": e**-0.5, "window": 0, "chunk": 0, "softcap": 0.0,
                               **written}, (Tensor(dtype, (T, h, f)),)),
        Call("sample", {"logits": Tensor(dtype, (R, 128256)), "temperature": Tensor(F32, (R,)), "top_k": Tensor(I32, (R,)), "top_p": Tensor(F32, (R,)),
                        "min_p": Tensor(F32, (R,)), "seed": Tensor(I32, (R, 2)), "step": Tensor(I32, (R,))}, (Tensor(I32, (R,)),)),
        Call("glu", {"gate_up": Tensor(dtype, (T, 6 * hidden)), "act": "gelu_tanh"}, (Tensor(dtype, (T, 3 * hidden)),)),
        Call("embedding", {"ids": slots, "weight": Tensor(dtype, (1000, hidden))}, (x,)),
        Call("gather_rows", {"x": x, "rows": Tensor(I32, (R,))}, (Tensor(dtype, (R, hidden)),)),
        Call("rotary_embedding", {"positions": slots, "inv_freq": Tensor(F32, (e // 2,)), "scaling": 1.0, "half": False}, (table, table)),
        Call("rope", {"x": q, "cos": table, "sin": table, "style": "neox"}, (q,)),
        Call("kv_write", {"k": Tensor(dtype, (T, k, e)), "v": Tensor(dtype, (T, k, f)), **cache, "slot_mapping": slots, **written}, ()),
        Call("qkv_rope_kv_write", {"qkv": Tensor(dtype, (T, (h + k) * e + k * f)), "cos": table, "sin": table, "q_weight": head, "k_weight": head, **cache,
                                   "slot_mapping": slots, "num_heads": h, "num_kv_heads": k, "style": "neox", "eps": 1e-6, "offset": 0.0,
                                   **written}, (q,)),
        Call("paged_attention", {"q": q, **cache, **batch, "sinks": Tensor(dtype, (h,)), "alibi_slopes": None, "scale": e**-0.5, "window": 0, "chunk": 0,
                                 "softcap": 0.0, **scales}, (Tensor(dtype, (T, h, f)),)),
        Call("packed_attention", {"q": q, "k": Tensor(dtype, (T, k, e)), "v": Tensor(dtype, (T, k, f)), "cu_seqlens_q": batch["cu_seqlens_q"],
                                  "scale": e**-0.5, "window": 64}, (Tensor(dtype, (T, h, f)),)),
        *recurrences(dtype),
        Call("pool", {"x": x, "cu_seqlens_q": batch["cu_seqlens_q"], "pooling": Tensor(I32, (S,))}, (Tensor(F32, (S, hidden)),)),
    ]  # fmt: skip


def latent_calls(h, topk=None):
    """Latent attention as DeepSeek-V2 and V3 have it; `topk`: with V3.2's indexer of 64 heads."""
    cache, batch = {"latent_cache": Tensor(BF16, (N, 1, 64, 576))}, {"cu_seqlens_q": Tensor(I32, (S1,)), "seq_lens": Tensor(I32, (S,)),
                                                                     "page_table": Tensor(I32, (S, P))}  # fmt: skip
    latent, q, table = Tensor(BF16, (T, h, 512)), Tensor(BF16, (T, h, 128)), Tensor(F32, (T, 64))
    found = [
        Call("latent_write", {"latent": Tensor(BF16, (T, 512)), "rope": Tensor(BF16, (T, 64)), **cache, "slot_mapping": Tensor(I32, (T,))}, ()),
        Call("latent_rope_write", {"q": Tensor(BF16, (T, h * 192)), "kv": Tensor(BF16, (T, 2112)), "cos": table, "sin": table, "weight": Tensor(BF16, (512,)),
                                   **cache, "slot_mapping": Tensor(I32, (T,)), "straight": [0, 128], "turned": [128 * h, 64],
                                   "kv_begin": 1536, "num_heads": h, "nope": 128, "style": "dsv3", "eps": 1e-6, "offset": 0.0}, (q, Tensor(BF16, (T, h, 64)))),
        Call("head_linear", {"x": q, "weight": Tensor(BF16, (h, 512, 128))}, (latent,)),
        Call("head_linear", {"x": latent, "weight": Tensor(BF16, (h, 128, 512))}, (q,)),
        Call("mla_attention", {"q_latent": latent, "q_rope": Tensor(BF16, (T, h, 64)), **cache, **batch, "indices": Tensor(I32, (T, topk)) if topk else None,
                               "sinks": None, "scale": 192**-0.5, "window": 0}, (latent,)),
    ]  # fmt: skip
    if topk:
        found.append(Call("sparse_index", {"q": Tensor(BF16, (T, 64, 128)), "weights": Tensor(F32, (T, 64)), "index_cache": Tensor(BF16, (N, 1, 64, 128)),
                                           **batch, "topk": topk, "scale": 128**-0.5}, (Tensor(I32, (T, topk)),)))  # fmt: skip
    return found


LATENT = latent_calls(16) + latent_calls(128, 2048)
LLAMA = calls(32, 8, 128, 128, 2048, BF16)


def sources(call, steps, target, most):
    """The sources of the `most` first candidates of a call, all claims' together."""
    candidates = [c for claim in CLAIMS[call.op, "triton"] for c in claim(call, steps, target)]
    assert candidates, f"{call.op} is not claimed on {target.isa}"
    return [launch.source for c in candidates[:most] for launch in c.launches if launch.source.backend == "triton"]


@pytest.mark.parametrize(("isa", "kv_dtype", "steps"), [("sm_90", FP8, DECODE), ("sm_89", FP8, PREFILL), ("sm_80", torch.int8, DECODE)])
def test_quantized_caches_compile(isa, kv_dtype, steps):
    target = Target("cuda", isa, "")
    wanted = [s for c in calls(32, 8, 128, 128, 2048, BF16, kv_dtype) if "k_scale" in c.args for s in sources(c, steps, target, 1)]
    assert {s.family for s in wanted} >= {"triton_attention", "triton_kv_cache"}
    compile_sources(wanted, target, 2)


@pytest.mark.parametrize("isa", ["sm_80", "sm_89"])
def test_quantized_weights_compile(isa):
    target = Target("cuda", isa, "")
    wanted = [c for c in LLAMA if c.op == "quantized_linear" and (isa != "sm_80" or c.args["weight"].dtype != FP8)]
    compile_sources([s for c in wanted for steps in (ONE, DECODE) for s in sources(c, steps, target, 1)], target, 2)


@pytest.mark.nightly
@pytest.mark.parametrize(("isa", "form", "activation"), [
    ("sm_86", "int4_group128", "none"),
    ("sm_89", "fp8_e4m3_block128", "none"),
    ("sm_89", "fp8_e4m3_channel", "fp8_e4m3_token"),
    ("sm_90", "int4_group64_zero", "none"),
])  # fmt: skip
def test_quantized_products_fit_in_shared_memory(isa, form, activation):
    """All that is offered compiles also where memory is small, and where widened weights go through it."""
    target = Target("cuda", isa, "")
    wanted = [quantized(form, activation, T, n, 4096, act) for n, act in ((4096, None), (28672, "silu"))]
    compile_sources([s for c in wanted for steps in (ONE, Steps(64, 64, 1, 64, True), PREFILL) for s in sources(c, steps, target, 100)], target, 2)


def test_float8_is_declined_where_no_instruction_converts_it():
    weights = [quantized("fp8_e4m3_channel", "none", T, 64, 64)]
    assert not [c for call in weights for claim in CLAIMS[call.op, "triton"] for c in claim(call, DECODE, Target("cuda", "sm_86", ""))]
    for call in calls(32, 8, 128, 128, 2048, BF16, FP8):
        if "k_scale" in call.args:
            assert not [c for claim in CLAIMS[call.op, "triton"] for c in claim(call, DECODE, Target("cuda", "sm_86", ""))]


def test_every_op_is_compiled():
    assert {c.op for c in LLAMA + LATENT} == {op for op, backend in CLAIMS if backend == "triton"}


@pytest.mark.parametrize("isa", GPU_ARCHES)
def test_a_model_compiles(isa):
    """On other architectures than sm_90 a sample: what is largest and what uses the matrix units."""
    target = Target("cuda", isa, "")
    sampled = LLAMA if isa == "sm_90" else [c for c in LLAMA if c.op in ("rms_norm", "linear_glu", "paged_attention")]
    wanted = [s for call in sampled for steps in ((DECODE, PREFILL) if isa == "sm_90" else (PREFILL,)) for s in sources(call, steps, target, 1)]
    for compiled in compile_sources(wanted, target, 2):
        assert compiled.binary[:4] == b"\x7fELF"


@pytest.mark.parametrize(("isa", "steps"), [("sm_90", DECODE), ("sm_90", PREFILL), ("sm_80", PREFILL), ("sm_86", DECODE), ("sm_100", DECODE)])
def test_latent_attention_compiles(isa, steps):
    target = Target("cuda", isa, "")
    sampled = LATENT if isa == "sm_90" else [c for c in LATENT if c.op in ("mla_attention", "sparse_index")]
    compile_sources([s for call in sampled for s in sources(call, steps, target, 1)], target, 2)


@pytest.mark.parametrize("isa", ["sm_86", pytest.param("sm_90", marks=pytest.mark.nightly)])
@pytest.mark.parametrize(("h", "k", "e", "f", "dtype"), [(16, 16, 192, 128, BF16), (4, 2, 512, 512, F16), (8, 2, 64, 64, F32)])
def test_attention_fits_in_shared_memory(h, k, e, f, dtype, isa):
    """What is offered compiles also where heads are wide and memory is small."""
    target = Target("cuda", isa, "")
    [call] = [c for c in calls(h, k, e, f, 64, dtype) if c.op == "paged_attention"]
    compile_sources(sources(call, DECODE, target, 1) + sources(call, PREFILL, target, 1), target, 2)
