"""Calls of every Triton family: what `test_triton_kernels.py` compares with references. `CASES` has them by op and name."""

from dataclasses import dataclass, field, replace

import torch

from ingot.ops import formats
from ingot.ops.dims import evaluate
from ingot.ops.glu import ACTIVATIONS
from ingot.ops.kernel import Call, Steps, Tensor
from ingot.ops.random_inputs import RANGES
from ingot.ops.rotary import STYLES
from ingot.ops.target import Target

BF16, F16, F32, I32 = torch.bfloat16, torch.float16, torch.float32, torch.int32
FP8, INT8 = torch.float8_e4m3fn, torch.int8
T, R, S, S1, P, N, SLOTS = {"T": 1}, {"R": 1}, {"S": 1}, {"S": 1, "": 1}, {"P_full": 1}, {"N_full": 1}, {"N_slot": 1}


@dataclass(frozen=True)
class Case:
    """Arguments of a call, in the schema's order: a `Tensor` of dtype None has the activations' type; `values` gives index arrays."""

    args: dict
    results: tuple
    sizes: dict = field(default_factory=lambda: {"T": 5})
    values: dict = field(default_factory=dict)
    max_num_new: int = 0  # 0: as many as there are tokens
    max_seqs: int = 0  # 0: as many as there are
    page_size: int = 16
    exact: bool = False

    def call(self, op, dtype):
        typed = lambda t: replace(t, dtype=dtype) if isinstance(t, Tensor) and t.dtype is None else t
        return Call(op, {n: typed(a) for n, a in self.args.items()}, tuple(typed(r) for r in self.results))

    @property
    def steps(self):
        t = self.sizes.get("T", 1)
        return Steps(t, self.max_seqs or self.sizes.get("S", 1), self.max_num_new or t, self.sizes.get("R", 1), self.exact, self.page_size)

    def inputs(self, call, device):
        generator = torch.Generator().manual_seed(7)
        made = {}
        for name, arg in call.args.items():
            if name in self.values:
                made[name] = self.values[name].to(arg.dtype).to(device)
            elif isinstance(arg, Tensor) and arg.dtype == torch.int8:
                made[name] = torch.randint(-127, 128, [evaluate(d, self.sizes) for d in arg.shape], generator=generator, dtype=torch.int8).to(device)
            elif isinstance(arg, Tensor) and name in RANGES:
                low, high = RANGES[name]
                made[name] = (torch.rand([evaluate(d, self.sizes) for d in arg.shape], generator=generator) * (high - low) + low).to(arg.dtype).to(device)
            elif isinstance(arg, Tensor) and name.endswith(("_scale", "_static")):
                made[name] = ((torch.rand([evaluate(d, self.sizes) for d in arg.shape], generator=generator) + 0.5) / 64).to(device)
            elif isinstance(arg, Tensor):
                made[name] = torch.randn([evaluate(d, self.sizes) for d in arg.shape], generator=generator).to(arg.dtype).to(device)
            else:
                made[name] = arg
        return made


def tensor(*shape, dtype=None):
    return Tensor(dtype, shape)


def norm_cases(residual):
    extra = {"residual": tensor(T, 72)} if residual else {}
    outs = 2 if residual else 1
    return {
        "odd": Case({"x": tensor(T, 72), **extra, "weight": tensor(72), "eps": 1e-6, "offset": 0.0}, (tensor(T, 72),) * outs),
        "bare": Case({"x": tensor(T, 72), **extra, "weight": None, "eps": 1e-5, "offset": 0.0}, (tensor(T, 72),) * outs),
        "gemma": Case({"x": tensor(T, 72), **extra, "weight": tensor(72, dtype=F32), "eps": 1e-6, "offset": 1.0}, (tensor(T, 72),) * outs),
    }


def gated_norm_cases():
    def case(shape, group, act, norm_first, weighted=True):
        args = {"x": tensor(T, *shape), "gate": tensor(T, *shape), "weight": tensor(shape[-1], dtype=F32) if weighted else None}
        return Case(args | {"eps": 1e-5, "group": group, "act": act, "norm_first": norm_first}, (tensor(T, *shape),), {"T": 7})

    return {"odd": case((72,), 0, "silu", True), "groups": case((60,), 20, "silu", False), "heads": case((3, 24), 0, "sigmoid", True, False)}


def linear_cases(op):
    cases = {}
    for rows, n, k, bias in ((1, 40, 520, True), (5, 72, 330, False), (40, 50, 96, True), (150, 72, 130, True), (70, 7, 24, False)):
        args = {"x": tensor(T, k), "weight": tensor(2 * n if op == "linear_glu" else n, k)}
        if op == "linear_glu":
            args["act"] = tuple(ACTIVATIONS)[len(cases)]
        else:
            args["bias"] = tensor(n) if bias else None
        if op == "linear_add":
            args["residual"] = tensor(T, n)
        cases[f"rows{rows}"] = Case(args, (tensor(T, n),), {"T": rows})
    return cases


def norm_linear_cases(op):
    cases = {}
    for rows, n, k, weighted in ((1, 40, 520, True), (1, 24, 130, False), (5, 72, 330, True), (40, 50, 96, False), (70, 24, 64, True)):
        args = {"x": tensor(T, k), "norm_weight": tensor(k) if weighted else None, "weight": tensor(2 * n if op.endswith("glu") else n, k)}
        args |= {"act": "silu"} if op.endswith("glu") else {"bias": tensor(n) if weighted else None}
        cases[f"rows{rows}_{k}"] = Case(args | {"eps": 1e-5, "offset": 0.0 if k > 100 else 1.0}, (tensor(T, n),), {"T": rows})
    return cases


def rope_cases():
    tables = {"cos": tensor(T, 24, dtype=F32), "sin": tensor(T, 24, dtype=F32)}
    halves = {"cos": tensor(T, 12, dtype=F32), "sin": tensor(T, 12, dtype=F32)}
    cases = {s: Case({"x": tensor(T, 3, 40), **(halves if s.endswith("_half") else tables), "style": s}, (tensor(T, 3, 40),)) for s in STYLES}
    return cases | {"full": Case({"x": tensor(T, 3, 24), **tables, "style": "neox"}, (tensor(T, 3, 24),))}


@dataclass(frozen=True)
class Batch:
    """Sequences with `cached` and `new` tokens (0 and 0: a padding row with one token), then `unused` tokens of no sequence; shuffled pages."""

    cached: tuple
    new: tuple
    unused: int = 0
    page_size: int = 16

    @property
    def sizes(self):
        width = -(-max(c + n for c, n in zip(self.cached, self.new, strict=True)) // self.page_size) + 1
        tokens = sum(max(n, 1) for n in self.new) + self.unused
        return {"T": tokens, "S": len(self.new), "P_full": width, "N_full": len(self.new) * width + 2, "N_slot": len(self.new) + 2}

    @property
    def values(self):
        sizes = self.sizes
        generator = torch.Generator().manual_seed(3)
        pages = torch.randperm(sizes["N_full"], generator=generator)[: sizes["S"] * sizes["P_full"]].view(sizes["S"], -1)
        slots = []
        for i, (cached, new) in enumerate(zip(self.cached, self.new, strict=True)):
            slots += [int(pages[i, p // self.page_size]) * self.page_size + p % self.page_size for p in range(cached, cached + new)] or [-1]
        lengths = [c + n for c, n in zip(self.cached, self.new, strict=True)]
        starts = torch.tensor([0] + [max(n, 1) for n in self.new]).cumsum(0)
        states = torch.where(torch.tensor(lengths) > 0, torch.randperm(len(lengths) + 2, generator=generator)[: len(lengths)], -1)
        made = {
            "state_slots": states,
            "cu_seqlens_q": starts,
            "seq_lens": torch.tensor(lengths),
            "page_table": pages,
            "slot_mapping": torch.tensor(slots + [-1] * self.unused),
        }
        return {n: v.to(I32) for n, v in made.items()}


def scales(heads, page_size=16, quantized=True, static=()):
    """Scales of a quantized cache, and static ones of `static` (k, v) heads."""
    scale = tensor(N, heads, page_size, dtype=F32) if quantized else None
    return {"k_scale": scale, "v_scale": scale, **{n: tensor(static[i], dtype=F32) if static else None for i, n in enumerate(("k_static", "v_static"))}}


def kv_cases():
    cases = {}
    rows = (("odd", 40, 24, 16, None, ()), ("wide", 64, 64, 8, None, ()), ("fp8", 40, 24, 16, FP8, ()), ("int8", 64, 64, 8, INT8, ()),
            ("fp8_static", 40, 64, 16, FP8, (1, 1)), ("int8_static", 24, 24, 16, INT8, (3, 3)))  # fmt: skip
    for name, e, f, page_size, dtype, static in rows:
        batch = Batch((3, 0, 20), (2, 0, 3), 2, page_size)
        args = {"k": tensor(T, 3, e), "v": tensor(T, 3, f), "k_cache": tensor(N, 3, page_size, e, dtype=dtype),
                "v_cache": tensor(N, 3, page_size, f, dtype=dtype), "slot_mapping": tensor(T, dtype=I32),
                **scales(3, page_size, dtype is not None, static)}  # fmt: skip
        cases[name] = Case(args, (), batch.sizes, batch.values, page_size=page_size)
    return cases


def qkv_cases():
    def case(style, h, k, e, f, table, norms, offset=0.0, dtype=None, static=()):
        batch = Batch((3, 0, 20), (2, 0, 3), 1)
        weights = {n: tensor(e) if norms else None for n in ("q_weight", "k_weight")}
        args = {"qkv": tensor(T, (h + k) * e + k * f), "cos": tensor(T, table, dtype=F32), "sin": tensor(T, table, dtype=F32), **weights,
                "k_cache": tensor(N, k, 16, e, dtype=dtype), "v_cache": tensor(N, k, 16, f, dtype=dtype), "slot_mapping": tensor(T, dtype=I32),
                "num_heads": h, "num_kv_heads": k, "style": style, "eps": 1e-6, "offset": offset,
                **scales(k, 16, dtype is not None, static)}  # fmt: skip
        return Case(args, (tensor(T, h, e),), batch.sizes, batch.values)

    return {
        "qwen3": case("neox", 4, 2, 32, 32, 32, True),
        "gemma3": case("neox", 3, 1, 40, 40, 40, True, 1.0),
        "partial": case("neox", 5, 5, 40, 24, 16, False),
        "gptj": case("gptj_half", 4, 2, 24, 40, 8, False),
        "dsv3": case("dsv3", 2, 1, 32, 32, 32, True),
        "fp8": case("neox", 4, 2, 32, 40, 32, True, dtype=FP8),
        "int8": case("gptj_half", 3, 3, 40, 24, 8, False, dtype=INT8),
        "fp8_static": case("neox", 4, 2, 32, 32, 32, False, dtype=FP8, static=(2, 2)),
    }


def attention_cases():
    def case(batch, h=4, k=2, e=32, f=32, max_num_new=0, max_seqs=0, sinks=False, alibi=False, dtype=None, **features):
        scale = tensor(N, k, batch.page_size, dtype=F32) if dtype else None
        args = {"q": tensor(T, h, e), "k_cache": tensor(N, k, batch.page_size, e, dtype=dtype), "v_cache": tensor(N, k, batch.page_size, f, dtype=dtype),
                "cu_seqlens_q": tensor(S1, dtype=I32), "seq_lens": tensor(S, dtype=I32), "page_table": tensor(S, P, dtype=I32),
                "sinks": tensor(h) if sinks else None, "alibi_slopes": tensor(h, dtype=F32) if alibi else None,
                "scale": e**-0.5, **{"window": 0, "chunk": 0, "softcap": 0.0}, **features, "k_scale": scale, "v_scale": scale}  # fmt: skip
        return Case(args, (tensor(T, h, f),), batch.sizes, batch.values, max_num_new, max_seqs, batch.page_size)

    decode = Batch((0, 150, 0, 66), (1, 1, 0, 1), 3)
    ragged = Batch((0, 70, 0, 33, 0), (19, 1, 0, 40, 3), 5)
    few = Batch((90, 0, 5), (3, 0, 2), 1)
    return {
        "decode": case(decode, max_num_new=1, max_seqs=500),
        "decode_split": case(decode, max_num_new=1, max_seqs=32),
        "decode_split_all": case(decode, max_num_new=1, max_seqs=16, h=3, k=1, e=40, f=24, window=50, softcap=5.0, sinks=True, alibi=True),
        "decode_sinks": case(decode, max_num_new=1, max_seqs=500, h=3, k=3, sinks=True, chunk=64),
        "verify_split": case(few, h=8, max_num_new=3, max_seqs=32, window=40),
        "ragged": case(ragged),
        "ragged_features": case(ragged, h=6, k=2, e=40, f=72, softcap=3.0, sinks=True, alibi=True),
        "ragged_window": case(Batch((0, 70), (45, 30), page_size=8), window=21, sinks=True),
        "ragged_chunk": case(ragged, h=5, k=1, chunk=24),
        "causal": case(Batch((0, 70, 0, 33, 0, 200), (19, 1, 0, 140, 3, 77), 5, page_size=64), sinks=True),
        "causal_128": case(Batch((0, 70, 0, 33, 250), (19, 1, 0, 40, 20), 5, page_size=64), h=8, e=128, f=128),
        "causal_64": case(Batch((64, 0, 520), (20, 50, 17), page_size=64), h=6, e=64, f=64, sinks=True),
        "causal_64_128": case(Batch((5, 130), (50, 20), 3, page_size=16), h=3, k=1, e=64, f=128),
        "causal_groups": case(Batch((64, 0), (130, 70), page_size=64), h=6, k=2, e=64, f=32),
        "decode_fp8": case(decode, max_num_new=1, max_seqs=500, dtype=FP8),
        "decode_split_int8": case(decode, max_num_new=1, max_seqs=32, h=3, k=1, e=40, f=24, softcap=5.0, sinks=True, dtype=INT8),
        "ragged_fp8": case(ragged, h=6, k=2, e=40, f=72, alibi=True, dtype=FP8),
        "ragged_window_int8": case(Batch((0, 70), (45, 30), page_size=8), f=64, window=21, dtype=INT8),
        "group_of_71": case(Batch((3,), (4,)), h=71, k=1, e=16, f=16),
    }


def qkv_attention_cases():
    def case(batch, style, h, k, e, f, table, norms=True, exact=True, max_seqs=0, sinks=False, dtype=None, static=(), **features):
        weights = {n: tensor(e) if norms else None for n in ("q_weight", "k_weight")}
        args = {"qkv": tensor(T, (h + k) * e + k * f), "cos": tensor(T, table, dtype=F32), "sin": tensor(T, table, dtype=F32), **weights,
                "k_cache": tensor(N, k, 16, e, dtype=dtype), "v_cache": tensor(N, k, 16, f, dtype=dtype), "slot_mapping": tensor(T, dtype=I32),
                "cu_seqlens_q": tensor(S1, dtype=I32), "seq_lens": tensor(S, dtype=I32), "page_table": tensor(S, P, dtype=I32),
                "sinks": tensor(h) if sinks else None, "num_heads": h, "num_kv_heads": k, "style": style, "eps": 1e-5, "offset": 0.0, "scale": e**-0.5,
                **{"window": 0, "chunk": 0, "softcap": 0.0}, **features, **scales(k, 16, dtype is not None, static)}  # fmt: skip
        return Case(args, (tensor(T, h, f),), batch.sizes, batch.values, 1 if exact else 0, max_seqs, exact=exact)

    decode = Batch((0, 150, 0, 66, 31), (1, 1, 0, 1, 1))
    return {
        "qwen3": case(decode, "neox", 4, 2, 32, 32, 32, max_seqs=500),
        "qwen3_split": case(decode, "neox", 4, 2, 32, 32, 32, max_seqs=20),
        "split_all": case(decode, "gptj_half", 3, 1, 40, 24, 12, max_seqs=16, window=50, softcap=5.0, sinks=True),
        "sinks": case(decode, "neox", 6, 2, 24, 24, 24, norms=False, max_seqs=500, sinks=True, chunk=64),
        "ragged": case(Batch((0, 70, 33), (19, 1, 7), 2), "neox", 4, 2, 32, 32, 32, exact=False),
        "fp8": case(decode, "neox", 4, 2, 32, 64, 32, max_seqs=500, dtype=FP8),
        "int8_words": case(decode, "neox", 4, 2, 32, 64, 32, max_seqs=20, dtype=INT8),
        "skewed": case(Batch((1500, 3, 0, 20, 31, 0), (1, 1, 1, 1, 1, 0)), "neox", 4, 2, 32, 32, 32, max_seqs=200),
        "skewed_window": case(Batch((1500, 3, 0, 20, 650, 9, 40), (1,) * 7), "neox", 4, 2, 32, 32, 32, max_seqs=500, window=1100, sinks=True),
        "int8_split_all": case(decode, "neox", 6, 2, 40, 24, 24, norms=False, max_seqs=20, window=50, softcap=5.0, sinks=True, dtype=INT8, static=(1, 1)),
    }


def step_args(**caches):
    """What an op over paged caches reads of a step, after its caches."""
    return {**caches, "cu_seqlens_q": tensor(S1, dtype=I32), "seq_lens": tensor(S, dtype=I32), "page_table": tensor(S, P, dtype=I32)}


DECODED = Batch((0, 150, 0, 66), (1, 1, 0, 1))
RAGGED = Batch((0, 70, 0, 33, 0), (19, 1, 0, 40, 3), 5)


def mla_cases():
    def listed(batch, k):
        """Positions of the past in any order, and places that are none, for each token."""
        generator = torch.Generator().manual_seed(9)
        rows = []
        for cached, new in zip(batch.cached, batch.new, strict=True):
            for position in range(cached, cached + new):
                drawn = torch.randperm(max(position + 1, k), generator=generator)[:k]
                rows.append(torch.where(drawn <= position, drawn, -1))
            rows += [torch.full((k,), -1)] * (new == 0)
        return torch.stack(rows + [torch.full((k,), -1)] * batch.unused)

    def case(batch, h, width, r, exact=False, max_seqs=0, sinks=False, window=0, k=0):
        args = {"q_latent": tensor(T, h, width), "q_rope": tensor(T, h, r), **step_args(latent_cache=tensor(N, 1, batch.page_size, width + r)),
                "indices": tensor(T, k, dtype=I32) if k else None, "sinks": tensor(h) if sinks else None, "scale": (width + r) ** -0.5,
                "window": window}  # fmt: skip
        values = batch.values | ({"indices": listed(batch, k)} if k else {})
        return Case(args, (tensor(T, h, width),), batch.sizes, values, 1 if exact else 0, max_seqs, batch.page_size, exact)

    return {
        "decode": case(replace(DECODED, page_size=64), 4, 32, 16, True, 500),
        "decode_split": case(DECODED, 16, 32, 8, True, 60, sinks=True),
        "decode_heads": case(Batch((70, 0), (1, 0)), 70, 40, 0, True, 60, window=50),
        "decode_listed": case(DECODED, 20, 32, 16, True, 60, k=40),
        "ragged": case(replace(RAGGED, page_size=64), 5, 32, 16, max_seqs=300),
        "ragged_all": case(RAGGED, 3, 24, 8, window=21, sinks=True, max_seqs=300),
        "ragged_heads": case(Batch((3, 90), (4, 5), page_size=8), 72, 16, 16, max_seqs=300),
        "ragged_many_heads": case(Batch((3, 9), (4, 5), 2, page_size=8), 128, 16, 16, max_seqs=300),
        "ragged_listed": case(Batch((0, 40, 0), (9, 1, 3), 2), 6, 32, 0, k=20, sinks=True, max_seqs=300),
        "ragged_split": case(Batch((75, 0, 5), (3, 0, 2), 1), 4, 32, 16, max_seqs=60),
    }


def head_linear_cases():
    cases = {}
    for rows, h, n, k in ((1, 3, 32, 128), (5, 2, 40, 24), (5, 2, 24, 300), (40, 3, 64, 72), (150, 2, 16, 130)):
        cases[f"rows{rows}_{k}"] = Case({"x": tensor(T, h, k), "weight": tensor(h, n, k)}, (tensor(T, h, n),), {"T": rows})
    return cases


def latent_write_cases():
    def case(width, r, page_size=16):
        batch = Batch((3, 0, 20), (2, 0, 3), 2, page_size)
        args = {"latent": tensor(T, width), "rope": tensor(T, r) if r else None, "latent_cache": tensor(N, 1, page_size, width + r),
                "slot_mapping": tensor(T, dtype=I32)}  # fmt: skip
        return Case(args, (), batch.sizes, batch.values, page_size=page_size)

    return {"both": case(40, 24), "latent": case(32, 0, 8)}


def latent_rope_write_cases():
    def case(style, h, nope, r, size, apart, page_size=16, offset=0.0):
        batch = Batch((3, 0, 20), (2, 0, 3), 2, page_size)
        width, table = h * (nope + r), tensor(T, r // 2 if style.endswith("_half") else r, dtype=F32)
        q, kv = (tensor(T, width), tensor(T, 24 + size + r)) if apart else [tensor(T, 8 + width + size + r)] * 2
        args = {"q": q, "kv": kv, "cos": table, "sin": table, "weight": tensor(size), "latent_cache": tensor(N, 1, page_size, size + r),
                "slot_mapping": tensor(T, dtype=I32), "straight": [0, nope + r] if apart else [8, nope],
                "turned": [nope, nope + r] if apart else [8 + h * nope, r], "kv_begin": 24 if apart else 8 + width, "num_heads": h, "nope": nope,
                "style": style, "eps": 1e-6, "offset": offset}  # fmt: skip
        return Case(args, (tensor(T, h, nope), tensor(T, h, r)), batch.sizes, batch.values, page_size=page_size)

    return {"v3": case("dsv3", 5, 24, 16, 40, True), "v2": case("gptj_half", 4, 16, 8, 64, False, 8), "offset": case("neox", 3, 20, 24, 32, True, 16, 1.0)}


def sparse_index_cases():
    def case(batch, j, d, topk, exact=False, max_seqs=0):
        args = {
            "q": tensor(T, j, d),
            "weights": tensor(T, j, dtype=F32),
            **step_args(index_cache=tensor(N, 1, batch.page_size, d)),
            "topk": topk,
            "scale": d**-0.5,
        }
        return Case(args, (tensor(T, topk, dtype=I32),), batch.sizes, batch.values, 1 if exact else 0, max_seqs, batch.page_size, exact)

    return {
        "decode": case(DECODED, 4, 32, 8, True, 500),
        "decode_split": case(Batch((0, 500, 0, 66, 300), (1, 1, 0, 1, 1)), 5, 24, 20, True, 32),
        "ragged": case(RAGGED, 4, 16, 24),
        "long": case(Batch((700, 40), (3, 2), 1), 16, 32, 50),
    }


def packed_cases():
    def case(new, unused=0, h=4, k=4, e=32, f=32, max_seqs=0, window=0):
        batch = Batch((0,) * len(new), new, unused)
        values = batch.values | {"cu_seqlens_q": torch.tensor([0, *new]).cumsum(0).to(I32)}
        args = {"q": tensor(T, h, e), "k": tensor(T, k, e), "v": tensor(T, k, f), "cu_seqlens_q": tensor(S1, dtype=I32), "scale": e**-0.5, "window": window}
        return Case(args, (tensor(T, h, f),), {"T": sum(new) + unused, "S": len(new)}, values, max_seqs=max_seqs)

    return {
        "ragged": case((19, 1, 0, 70), 5),
        "odd_heads": case((7, 40), h=6, k=2, e=40, f=72, max_seqs=30),
        "window": case((90, 3, 33), 2, window=9),
        "one": case((1,), e=16, f=16),
    }


def pool_cases():
    def case(new, width, how):
        values = {"cu_seqlens_q": torch.tensor([0, *new]).cumsum(0).to(I32), "pooling": torch.tensor(how, dtype=I32)}
        args = {"x": tensor(T, width), "cu_seqlens_q": tensor(S1, dtype=I32), "pooling": tensor(S, dtype=I32)}
        return Case(args, (tensor(S, width, dtype=F32),), {"T": sum(new) + 2, "S": len(new)}, values)

    return {"ragged": case((19, 1, 0, 5, 33, 2), 72, (0, 0, 1, 1, 2, 0)), "wide": case((3, 4), 300, (2, 0))}


SLOT = {"cu_seqlens_q": tensor(S1, dtype=I32), "seq_lens": tensor(S, dtype=I32), "state_slots": tensor(S, dtype=I32)}
LONG = Batch((0, 9, 30), (70, 64, 3), 2)


def recurrent_case(args, out, batch):
    """A step of `batch`: of DECODED exactly one token a sequence."""
    exact = batch is DECODED
    return Case(args, (out,), batch.sizes, batch.values, 1 if exact else 0, exact=exact)


def conv_cases():
    def case(batch, c, w, bias=True, act="silu"):
        args = {"x": tensor(T, c), "weight": tensor(c, w), "bias": tensor(c) if bias else None, "conv_state": tensor(SLOTS, c, w - 1), **SLOT, "act": act}
        return recurrent_case(args, tensor(T, c), batch)

    return {
        "decode": case(DECODED, 300, 4),
        "decode_2": case(DECODED, 40, 2, False, ""),
        "ragged": case(RAGGED, 72, 4),
        "ragged_3": case(RAGGED, 150, 3, False, ""),
    }


def ssd_cases():
    def case(batch, h, g, p, n, extra=True, low=0.0, high=float("inf")):
        args = {"x": tensor(T, h, p), "dt": tensor(T, h), "A": tensor(h, dtype=F32), "B": tensor(T, g, n), "C": tensor(T, g, n),
                "D": tensor(h) if extra else None, "dt_bias": tensor(h, dtype=F32) if extra else None, "ssm_state": tensor(SLOTS, h, p, n, dtype=F32), **SLOT,
                "softplus": extra, "dt_min": low, "dt_max": high}  # fmt: skip
        return recurrent_case(args, tensor(T, h, p, dtype=F32), batch)

    return {
        "decode": case(DECODED, 4, 2, 24, 40),
        "decode_bare": case(DECODED, 2, 1, 64, 16, False, 0.1, 0.9),
        "ragged": case(RAGGED, 2, 1, 40, 24),
        "long": case(LONG, 1, 1, 16, 16, False, 0.1, 0.9),
    }


def selective_cases():
    def case(batch, c, n, extra=True):
        args = {"x": tensor(T, c), "dt": tensor(T, c), "A": tensor(c, n, dtype=F32), "B": tensor(T, n), "C": tensor(T, n),
                **{name: t if extra else None for name, t in (("D", tensor(c, dtype=F32)), ("z", tensor(T, c)), ("dt_bias", tensor(c, dtype=F32)))},
                "ssm_state": tensor(SLOTS, c, n, dtype=F32), **SLOT, "softplus": extra}  # fmt: skip
        return recurrent_case(args, tensor(T, c), batch)

    return {"decode": case(DECODED, 72, 16), "ragged": case(RAGGED, 40, 5), "bare": case(Batch((3,), (4,)), 16, 16, False)}


def delta_cases():
    def case(batch, k, h, e, f, channels=False, eps=1e-6):
        args = {"q": tensor(T, k, e), "k": tensor(T, k, e), "v": tensor(T, h, f), "g": tensor(T, h, *((e,) if channels else ()), dtype=F32),
                "beta": tensor(T, h), "delta_state": tensor(SLOTS, h, e, f, dtype=F32), **SLOT, "eps": eps}  # fmt: skip
        return recurrent_case(args, tensor(T, h, f), batch)

    return {
        "decode": case(DECODED, 2, 4, 24, 40),
        "decode_channels": case(DECODED, 1, 1, 64, 32, True),
        "ragged": case(RAGGED, 1, 2, 40, 24),
        "ragged_channels": case(RAGGED, 2, 2, 16, 24, True, 1e-5),
        "long": case(LONG, 1, 1, 16, 16),
    }


def channel_cases(op):
    def case(batch, c):
        state = {"lru_state": tensor(SLOTS, c, dtype=F32)} if op == "linear_recurrence" else {"wkv_state": tensor(SLOTS, 3, c, dtype=F32)}
        inputs = {"x": tensor(T, c), "decay": tensor(T, c, dtype=F32)} if op == "linear_recurrence" else {"k": tensor(T, c), "v": tensor(T, c)}
        inputs |= {} if op == "linear_recurrence" else {"log_decay": tensor(c), "bonus": tensor(c)}
        return recurrent_case(inputs | state | SLOT, tensor(T, c), batch)

    return {"decode": case(DECODED, 300), "ragged": case(RAGGED, 20)}


def sampling_cases():
    """Rows that are greedy, plain, cut by rank, by mass, by both and by min-p; few values, so that many are equal, or none finite."""
    settings = torch.tensor([[0, 0, 1, 0], [0.7, 0, 1, 0], [1.3, 5, 1, 0], [1, 0, 0.6, 0], [0.8, 40, 0.5, 0], [1, 0, 1, 0.2], [2, 1, 0.9, 0],
                             [1, 700, 0.999, 0.01], [1, 3000, 0.01, 0], [1, 0, 0.9, 0], [0, 0, 1, 0]])  # fmt: skip
    temperature, top_k, top_p, min_p = (column.contiguous() for column in settings.T)

    def case(vocab, spread, levels=0, seed=0):
        generator = torch.Generator().manual_seed(seed)
        rows = len(settings)
        logits = torch.randn(rows, vocab, generator=generator) * spread
        if levels:
            logits = (logits * levels / spread).round() / levels
        logits[-1, vocab // 2] = float("nan")
        values = {"logits": logits, "temperature": temperature, "top_k": top_k.to(I32), "top_p": top_p, "min_p": min_p,
                  "seed": torch.randint(-(2**31), 2**31 - 1, (rows, 2), generator=generator).to(I32), "step": torch.arange(rows, dtype=I32)}  # fmt: skip
        args = {"logits": tensor(R, vocab), **{n: tensor(R, dtype=F32) for n in ("temperature", "top_p", "min_p")}}
        args = {n: args.get(n, tensor(R, dtype=I32)) for n in values} | {"seed": tensor(R, 2, dtype=I32)}
        return Case(args, (tensor(R, dtype=I32),), {"R": rows}, values)

    return {"wide": case(5003, 3.0), "equal": case(997, 1.0, 2, 1), "peaked": case(4096, 8.0, 0, 2), "narrow": case(70, 2.0, 1, 3)}


def quantized_case(form, activation, rows, n, k, act=None, bias=False, residual=False, norm=None):
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(n, k, generator=generator).bfloat16() * k**-0.5
    layout = formats.get(form).layout(Target("cuda", "sm_90", ""))
    parts = {"zero": None, **formats.packed(formats.get(form).quantize(weight), form, layout, 2 if act else 1)}
    typed = {p: t if t is None else tensor(*t.shape, dtype=t.dtype) for p, t in parts.items()}
    static = {"input_scale": tensor(1, dtype=F32)} if activation.endswith("static") else {"input_scale": None}
    width = n // 2 if act else n
    args = {"x": tensor(T, k), **{p: typed[p] for p in ("weight", "scale", "zero")}, **static, "bias": tensor(n) if bias else None,
            "residual": tensor(T, n) if residual else None, "act": act, "format": form, "layout": layout, "activation": activation, "n": n,
            "norm_weight": tensor(k) if norm else None, "eps": 1e-5 if norm is not None else None, "offset": 1.0 if norm else 0.0}  # fmt: skip
    values = {p: t for p, t in parts.items() if t is not None} | ({"input_scale": torch.tensor([0.01])} if activation.endswith("static") else {})
    return Case(args, (tensor(T, width),), {"T": rows}, values)


def quantized_linear_cases():
    """Formats, how x is rounded, and epilogues; a case's name says them. K is a multiple of no group."""
    rows = [
        ("fp8_e4m3_channel", "none", 5, 72, 330, {}),
        ("fp8_e4m3_channel", "fp8_e4m3_token", 1, 72, 330, {"residual": True}),
        ("fp8_e4m3_channel", "fp8_e4m3_token", 40, 80, 330, {"bias": True}),
        ("fp8_e4m3_channel", "fp8_e4m3_token", 1, 72, 330, {"norm": True}),
        ("fp8_e4m3_channel", "fp8_e4m3_token", 5, 72, 330, {"norm": True}),
        ("fp8_e4m3_channel", "fp8_e4m3_static", 1, 40, 96, {"norm": False}),
        ("int4_group128", "none", 1, 96, 330, {"norm": True, "act": "silu"}),
        ("int4_group128", "none", 5, 72, 330, {"norm": False}),
        ("fp8_e4m3_channel", "fp8_e4m3_token", 150, 80, 208, {"act": "silu"}),
        ("fp8_e4m3_channel", "fp8_e4m3_token", 150, 80, 208, {"residual": True}),
        ("fp8_e4m3_channel", "fp8_e4m3_static", 5, 40, 96, {"norm": True}),
        ("fp8_e4m3_channel", "fp8_e4m3_static", 1, 40, 96, {"act": "silu"}),
        ("fp8_e4m3_channel", "fp8_e4m3_static", 5, 40, 96, {}),
        ("fp8_e4m3_block128", "none", 1, 140, 330, {}),
        ("fp8_e4m3_block128", "fp8_e4m3_group128", 1, 256, 330, {"act": "silu"}),
        ("fp8_e4m3_block128", "fp8_e4m3_group128", 5, 140, 330, {"residual": True}),
        ("fp8_e4m3_block128", "fp8_e4m3_group128", 5, 140, 330, {"norm": True}),
        ("int8_channel", "none", 1, 72, 330, {"bias": True}),
        ("int8_channel", "none", 40, 72, 330, {}),
        ("int8_channel", "int8_token", 1, 72, 330, {}),
        ("int8_channel", "int8_token", 70, 72, 330, {"act": "gelu"}),
        ("int8_group32_zero", "none", 1, 40, 330, {}),
        ("int8_group32_zero", "none", 5, 40, 330, {}),
        ("int4_group128", "none", 1, 80, 330, {"residual": True}),
        ("int4_group128", "none", 5, 80, 330, {"bias": True, "residual": True}),
        ("int4_group128", "none", 150, 96, 200, {"act": "silu"}),
        ("int4_group32_zero", "none", 1, 96, 330, {"act": "silu"}),
        ("int4_group32_zero", "none", 40, 40, 330, {}),
        ("int4_group32_zero", "none", 70, 48, 330, {"bias": True}),
        ("int8_group64_zero", "none", 70, 40, 330, {"residual": True}),
        ("fp8_e4m3_block128", "none", 70, 140, 330, {}),
        ("int4_channel", "none", 1, 24, 330, {}),
        ("int4_channel_zero", "none", 1, 48, 330, {"bias": True}),
        ("int4_group64_zero", "none", 1, 96, 330, {"act": "gelu_tanh", "norm": True}),
        ("int4_channel", "none", 5, 32, 330, {}),
        ("int4_group64", "none", 5, 32, 1100, {}),
        ("int4_group32_zero", "none", 200, 288, 1100, {"act": "silu"}),
        ("int4_group128", "none", 130, 272, 2100, {"residual": True}),
        ("int4_group64_zero", "none", 70, 528, 420, {"bias": True}),
        ("fp8_e4m3_channel", "fp8_e4m3_token", 300, 208, 640, {"act": "silu"}),
        ("fp8_e4m3_channel", "fp8_e4m3_token", 150, 330, 1152, {"residual": True}),
        ("fp8_e4m3_channel", "fp8_e4m3_static", 70, 200, 384, {"bias": True, "norm": True}),
    ]  # fmt: skip
    return {f"{form}-{activation}-{t}-{'-'.join(extra)}": quantized_case(form, activation, t, n, k, **extra) for form, activation, t, n, k, extra in rows}


def glu_quantized_linear_cases():
    """Of each way to round: K is a multiple of no group, rows of no block."""

    def case(form, activation, rows, n, k, gate, **extra):
        of = quantized_case(form, activation, rows, n, k, **extra)
        kept = {a: of.args[a] for a in ("weight", "scale", "input_scale", "bias", "residual", "format", "layout", "activation", "n")}
        return Case({"x": tensor(T, 2 * k), "gate": gate} | kept, of.results, of.sizes, of.values)

    return {
        "token": case("fp8_e4m3_channel", "fp8_e4m3_token", 19, 72, 330, "silu", residual=True),
        "static": case("fp8_e4m3_channel", "fp8_e4m3_static", 5, 40, 96, "gelu"),
        "block": case("fp8_e4m3_block128", "fp8_e4m3_group128", 5, 140, 330, "silu", bias=True),
        "int8": case("int8_channel", "int8_token", 3, 40, 72, "relu"),
    }


def add_norm_quantized_linear_cases():
    def case(form, activation, rows, n, k, **extra):
        of = quantized_case(form, activation, rows, n, k, norm=True, **extra)
        kept = {a: of.args[a] for a in ("norm_weight", "weight", "scale", "input_scale", "bias", "act", "format", "layout", "activation", "n", "eps", "offset")}
        return Case({"x": tensor(T, k), "added": tensor(T, k)} | kept, (*of.results, tensor(T, k)), of.sizes, of.values)

    return {
        "unit": case("fp8_e4m3_channel", "fp8_e4m3_token", 19, 96, 80, act="silu"),
        "block": case("fp8_e4m3_block128", "fp8_e4m3_group128", 3, 140, 330, bias=True),
        "one": case("fp8_e4m3_channel", "fp8_e4m3_static", 1, 40, 72),
    }


def grouped_linear_cases():
    def case(rows, experts, n, k, transposed, bias, ids=None):
        ids = torch.randint(-1, experts + 1, (rows,), generator=torch.Generator().manual_seed(rows)) if ids is None else torch.tensor(ids)
        args = {"x": tensor(T, k), "weight": tensor(experts, k, n) if transposed else tensor(experts, n, k), "bias": tensor(experts, n) if bias else None,
                "expert_ids": tensor(T, dtype=torch.int64), "transposed": transposed}  # fmt: skip
        return Case(args, (tensor(T, n),), {"T": rows}, {"expert_ids": ids})

    return {
        "one": case(1, 3, 40, 330, False, True, [2]),
        "nobody": case(1, 3, 24, 64, True, True, [3]),
        "few": case(7, 5, 40, 130, False, False),
        "few_transposed": case(5, 3, 72, 130, True, True),
        "some": case(70, 9, 24, 96, True, True),
        "one_expert": case(90, 4, 40, 70, False, True, [1] * 90),
        "many": case(300, 2, 48, 64, False, True),
    }


def moe_cases():
    """Ids outside the table, experts without tokens, and every activation, layout and bias."""

    def case(rows, active, experts, inner, act, gated=True, transposed=False, interleaved=False, bias=False, ids=torch.int64, d=72):
        generator = torch.Generator().manual_seed(rows)
        chosen = torch.rand(rows, experts + 1, generator=generator).argsort(-1)[:, :active] - int(rows > 4)
        shape = lambda x, n, k: tensor(x, k, n) if transposed else tensor(x, n, k)
        wide = 2 * inner if gated else inner
        args = {"x": tensor(T, d), "expert_ids": tensor(T, active, dtype=ids), "expert_weights": tensor(T, active, dtype=F32 if bias else None),
                "w_in": shape(experts, wide, d), "b_in": tensor(experts, wide) if bias else None, "w_out": shape(experts, d, inner),
                "b_out": tensor(experts, d) if bias else None, "act": act, "gated": gated, "transposed": transposed, "interleaved": interleaved}  # fmt: skip
        return Case(args, (tensor(T, d),), {"T": rows}, {"expert_ids": chosen})

    return {
        "one": case(1, 2, 8, 40, "silu"),
        "one_active": case(1, 1, 4, 24, "gelu", bias=True),
        "four": case(4, 3, 5, 40, "gelu_tanh", transposed=True, interleaved=True, bias=True),
        "few": case(9, 4, 6, 24, "swiglu_oai", interleaved=True),
        "top_1": case(40, 1, 3, 24, "relu", gated=False, bias=True, ids=I32),
        "some": case(50, 4, 6, 40, "sigmoid", gated=False, transposed=True),
        "many": case(150, 2, 3, 24, "swiglu_oai", bias=True),
    }


def quantized_moe_case(form, rows, active, experts, inner, d, act, gated=True, bias=False):
    generator = torch.Generator().manual_seed(rows)
    values = {"expert_ids": torch.rand(rows, experts + 1, generator=generator).argsort(-1)[:, :active].contiguous()}
    wide, layout = 2 * inner if gated else inner, formats.get(form).layout(Target("cuda", "sm_90", ""), experts=True)
    for side, n, k in (("in", wide, d), ("out", d, inner)):
        weight = torch.randn(experts * n, k, generator=generator).bfloat16() * k**-0.5
        parts = formats.packed(formats.get(form).quantize(weight), form, layout, experts)
        values |= {f"{part[0]}_{side}": t.unflatten(0, (experts, -1)) for part, t in parts.items()}
    of = {n: tensor(*v.shape, dtype=v.dtype) for n, v in values.items()} | {"b_in": tensor(experts, wide), "b_out": tensor(experts, d)}
    given = {f"{part}_{side}": of.get(f"{part}_{side}") if part != "b" or bias else None for side in ("in", "out") for part in "wszb"}
    args = {"x": tensor(T, d), "expert_ids": tensor(T, active, dtype=torch.int64), "expert_weights": tensor(T, active, dtype=F32)}
    args |= given | {"act": act, "gated": gated, "format": form, "layout": layout, "activation": "none", "inner": inner}
    return Case(args, (tensor(T, d),), {"T": rows}, values)


def quantized_moe_cases():
    case = quantized_moe_case
    return {
        "fp8_one": case("fp8_e4m3_channel", 1, 2, 4, 24, 72, "silu", bias=True),
        "fp8_some": case("fp8_e4m3_channel", 40, 3, 5, 24, 72, "gelu", gated=False),
        "block_one": case("fp8_e4m3_block128", 1, 1, 3, 128, 128, "silu"),
        "block_some": case("fp8_e4m3_block128", 17, 2, 2, 128, 256, "silu"),
        "int8_some": case("int8_channel", 50, 2, 3, 24, 72, "silu", bias=True),
        "int8_groups": case("int8_group64", 2, 2, 5, 24, 72, "relu"),
        "int8_zero": case("int8_group32_zero", 3, 1, 2, 12, 40, "silu", bias=True),
        "int4_one": case("int4_group128", 1, 2, 4, 8, 132, "swiglu_oai", bias=True),
        "int4_few": case("int4_group64_zero", 2, 2, 3, 8, 72, "silu"),
        "int4_some": case("int4_channel", 33, 2, 2, 24, 72, "gelu", gated=False, bias=True),
        "int4_many": case("int4_group32_zero", 70, 1, 1, 24, 136, "silu"),
    }


def route_cases():
    """Rows with many equal elements, negative zeros and infinities among them."""

    def case(shape, k, softmax, renormalize, scale=1.0, dtype=None):
        logits = (torch.randn(5, *shape, generator=torch.Generator().manual_seed(k)) * 4).round() / 2
        logits[0] = 0.0
        logits[0, ..., 1::2] = -0.0
        logits[1, ..., 2:] = float("-inf")
        args = {"logits": tensor(T, *shape), "k": k, "softmax": softmax, "renormalize": renormalize, "scale": scale, "dtype": dtype or F32}
        return Case(args, (tensor(T, *shape[:-1], k, dtype=dtype or F32), tensor(T, *shape[:-1], k, dtype=torch.int64)), {"T": 5}, {"logits": logits})

    return {
        "mixtral": case((8,), 2, True, True),
        "qwen3": case((128,), 8, True, False, dtype=BF16),
        "groups": case((3, 5), 2, False, False),
        "odd": case((300,), 7, True, True, 2.5, F16),
    }


CASES = {
    "rms_norm": norm_cases(False)
    | {"heads": Case({"x": tensor(T, 3, 16), "weight": tensor(16), "eps": 1e-6, "offset": 0.0}, (tensor(T, 3, 16),), {"T": 70})},
    "add_rms_norm": norm_cases(True),
    "rms_norm_gated": gated_norm_cases(),
    "linear": linear_cases("linear") | {"split": Case({"x": tensor(T, 1100), "weight": tensor(24, 1100), "bias": tensor(24)}, (tensor(T, 24),), {"T": 3})},
    "linear_add": linear_cases("linear_add") | {
        f"split {t}": Case({"x": tensor(T, 1100), "weight": tensor(40, 1100), "bias": None, "residual": tensor(T, 40)}, (tensor(T, 40),), {"T": t})
        for t in (20, 70)
    },
    "linear_glu": linear_cases("linear_glu"),
    "rms_norm_linear": norm_linear_cases("rms_norm_linear"),
    "rms_norm_linear_glu": norm_linear_cases("rms_norm_linear_glu"),
    "qkv_attention": qkv_attention_cases(),
    "sample": sampling_cases(),
    "grouped_linear": grouped_linear_cases(),
    "moe": moe_cases(),
    "quantized_moe": quantized_moe_cases(),
    "route": route_cases(),
    "quantized_linear": quantized_linear_cases(),
    "glu_quantized_linear": glu_quantized_linear_cases(),
    "add_rms_norm_quantized_linear": add_norm_quantized_linear_cases(),
    "glu": {
        act: Case({"gate_up": tensor(T, 2 * n), "act": act}, (tensor(T, n),)) for act, n in zip(ACTIVATIONS, (40, 1100, 7, 64, 33), strict=True)
    },
    "embedding": {
        str(dtype): Case({"ids": tensor(T, dtype=dtype), "weight": tensor(11, 2100)}, (tensor(T, 2100),),
                         values={"ids": torch.tensor([10, 0, 3, 3, 7], dtype=dtype)})
        for dtype in (I32, torch.int64)
    },
    "gather_rows": {
        "rows": Case({"x": tensor(T, 3, 21), "rows": tensor(R, dtype=I32)}, (tensor(R, 3, 21),), {"T": 5, "R": 3}, {"rows": torch.tensor([4, 0, 4], dtype=I32)})
    },
    "rotary_embedding": {
        f"{width}{half}": Case({"positions": tensor(T, dtype=I32), "inv_freq": tensor(width, dtype=F32), "scaling": 1.25, "half": half},
                               (tensor(T, width if half else 2 * width, dtype=F32),) * 2,
                               values={"positions": torch.tensor([0, 5, 17, 3, 1000], dtype=I32)})
        for width, half in ((20, True), (32, False))
    },
    "rope": rope_cases(),
    "kv_write": kv_cases(),
    "qkv_rope_kv_write": qkv_cases(),
    "paged_attention": attention_cases(),
    "mla_attention": mla_cases(),
    "head_linear": head_linear_cases(),
    "latent_write": latent_write_cases(),
    "latent_rope_write": latent_rope_write_cases(),
    "sparse_index": sparse_index_cases(),
    "packed_attention": packed_cases(),
    "pool": pool_cases(),
    "causal_conv1d": conv_cases(),
    "ssd_scan": ssd_cases(),
    "selective_scan": selective_cases(),
    "gated_delta_rule": delta_cases(),
    "linear_recurrence": channel_cases("linear_recurrence"),
    "wkv": channel_cases("wkv"),
}  # fmt: skip
