"""The bodies of the vocabulary (`vector.py`): LLVM functions over vectors of n float32 lanes."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable
from textwrap import dedent, indent


def functions(n: int, native_bfloat16: bool, native_bytes: bool) -> dict[str, str]:
    """LLVM functions by name, for vectors of n lanes. 16-bit floats are widened and narrowed as the i16 that memory holds."""
    f, i, s = f"<{n} x float>", f"<{n} x i32>", f"<{n} x i16>"
    out: dict[str, str] = {}

    def define(result: str, name: str, parameters: str, body: str) -> None:
        # weak_odr: the linker would drop an internal function before the kernel's first call of it is generated.
        out[name] = f"define weak_odr {result} @{name}({parameters}) alwaysinline {{\n{indent(dedent(body).strip(), '  ')}\n}}\n"

    for lanes in (n, 2 * n):
        index = ", ".join(f"i32 {k}" for k in range(lanes))
        define(f"<{lanes} x i1>", f"first_{lanes}", "i32 %count", f"""
            %a = insertelement <{lanes} x i32> poison, i32 %count, i64 0
            %b = shufflevector <{lanes} x i32> %a, <{lanes} x i32> poison, <{lanes} x i32> zeroinitializer
            %m = icmp slt <{lanes} x i32> <{index}>, %b
            ret <{lanes} x i1> %m""")  # fmt: skip
    define("void", "prefetch", "ptr %p", "call void @llvm.prefetch.p0(ptr %p, i32 0, i32 2, i32 1)\nret void")
    define(f, "widen_bfloat16", f"{s} %h", f"""
        %w = zext {s} %h to {i}
        %b = shl {i} %w, splat (i32 16)
        %x = bitcast {i} %b to {f}
        ret {f} %x""")  # fmt: skip
    define(s, "narrow_bfloat16", f"{f} %x", f"""
        %h = fptrunc {f} %x to <{n} x bfloat>
        %b = bitcast <{n} x bfloat> %h to {s}
        ret {s} %b""" if native_bfloat16 else f"""
        %b = bitcast {f} %x to {i}
        %high = lshr {i} %b, splat (i32 16)
        %odd = and {i} %high, splat (i32 1)
        %bias = add {i} %odd, splat (i32 32767)
        %sum = add {i} %b, %bias
        %rounded = lshr {i} %sum, splat (i32 16)
        %nan = fcmp uno {f} %x, %x
        %w = select <{n} x i1> %nan, {i} splat (i32 32704), {i} %rounded
        %h = trunc {i} %w to {s}
        ret {s} %h""")  # fmt: skip
    define(f, "widen_float16", f"{s} %b", f"""
        %h = bitcast {s} %b to <{n} x half>
        %x = fpext <{n} x half> %h to {f}
        ret {f} %x""")  # fmt: skip
    define(s, "narrow_float16", f"{f} %x", f"""
        %h = fptrunc {f} %x to <{n} x half>
        %b = bitcast <{n} x half> %h to {s}
        ret {s} %b""")  # fmt: skip
    _define_eight_bits(define, n)
    for x in ("widen", "narrow"):
        define(f, f"{x}_float32", f"{f} %x", f"ret {f} %x")
    b = f"<{n} x i8>"
    elements = (("float32", f, "float", 4), ("bfloat16", s, "i16", 2), ("float16", s, "i16", 2), ("float8_e4m3fn", b, "i8", 1), ("int8", b, "i8", 1))
    for dtype, raw, element, bytes_ in elements:
        mangled = f"v{n}{'f32' if element == 'float' else element}"
        define(f, f"load_{dtype}", "ptr %p", f"""
            %r = load {raw}, ptr %p, align {bytes_}
            %x = call {f} @widen_{dtype}({raw} %r)
            ret {f} %x""")  # fmt: skip
        define(f, f"load_part_{dtype}", "ptr %p, i32 %count", f"""
            %m = call <{n} x i1> @first_{n}(i32 %count)
            %r = call {raw} @llvm.masked.load.{mangled}.p0(ptr %p, i32 {bytes_}, <{n} x i1> %m, {raw} zeroinitializer)
            %x = call {f} @widen_{dtype}({raw} %r)
            ret {f} %x""")  # fmt: skip
        define("void", f"store_{dtype}", f"ptr %p, {f} %x", f"""
            %r = call {raw} @narrow_{dtype}({f} %x)
            store {raw} %r, ptr %p, align {bytes_}
            ret void""")  # fmt: skip
        define("void", f"store_part_{dtype}", f"ptr %p, {f} %x, i32 %count", f"""
            %m = call <{n} x i1> @first_{n}(i32 %count)
            %r = call {raw} @narrow_{dtype}({f} %x)
            call void @llvm.masked.store.{mangled}.p0({raw} %r, ptr %p, i32 {bytes_}, <{n} x i1> %m)
            ret void""")  # fmt: skip
        define("float", f"load_one_{dtype}", "ptr %p", f"""
            %e = load {element}, ptr %p, align {bytes_}
            %r = insertelement {raw} zeroinitializer, {element} %e, i64 0
            %x = call {f} @widen_{dtype}({raw} %r)
            %y = extractelement {f} %x, i64 0
            ret float %y""")  # fmt: skip
        define("void", f"store_one_{dtype}", "ptr %p, float %y", f"""
            %x = insertelement {f} zeroinitializer, float %y, i64 0
            %r = call {raw} @narrow_{dtype}({f} %x)
            %e = extractelement {raw} %r, i64 0
            store {element} %e, ptr %p, align {bytes_}
            ret void""")  # fmt: skip
        for part, count, argument in (("", "", ""), ("part_", ", i32 %count", ", i32 %count")):
            if dtype not in ("float32", "float16"):
                continue
            define(f, f"dot_{part}{dtype}", f"{f} %acc, ptr %a, ptr %b{count}", f"""
                %x = call {f} @load_{part}{dtype}(ptr %a{argument})
                %y = call {f} @load_{part}{dtype}(ptr %b{argument})
                %z = call {f} @llvm.fma.v{n}f32({f} %x, {f} %y, {f} %acc)
                ret {f} %z""")  # fmt: skip
    pairs = f"<{2 * n} x i16>"
    define(f, "multiply_pairs", f"{f} %acc, {pairs} %a, {pairs} %b", f"""
        %x = bitcast {pairs} %a to <32 x bfloat>
        %y = bitcast {pairs} %b to <32 x bfloat>
        %z = call {f} @llvm.x86.avx512bf16.dpbf16ps.512({f} %acc, <32 x bfloat> %x, <32 x bfloat> %y)
        ret {f} %z""" if native_bfloat16 else f"""
        %x = bitcast {pairs} %a to {i}
        %y = bitcast {pairs} %b to {i}
        %xl = shl {i} %x, splat (i32 16)
        %yl = shl {i} %y, splat (i32 16)
        %xh = and {i} %x, splat (i32 -65536)
        %yh = and {i} %y, splat (i32 -65536)
        %xlf = bitcast {i} %xl to {f}
        %ylf = bitcast {i} %yl to {f}
        %xhf = bitcast {i} %xh to {f}
        %yhf = bitcast {i} %yh to {f}
        %low = call {f} @llvm.fma.v{n}f32({f} %xlf, {f} %ylf, {f} %acc)
        %z = call {f} @llvm.fma.v{n}f32({f} %xhf, {f} %yhf, {f} %low)
        ret {f} %z""")  # fmt: skip
    define(f, "dot_bfloat16", f"{f} %acc, ptr %a, ptr %b", f"""
        %x = load {pairs}, ptr %a, align 2
        %y = load {pairs}, ptr %b, align 2
        %z = call {f} @multiply_pairs({f} %acc, {pairs} %x, {pairs} %y)
        ret {f} %z""")  # fmt: skip
    define(f, "dot_part_bfloat16", f"{f} %acc, ptr %a, ptr %b, i32 %count", f"""
        %m = call <{2 * n} x i1> @first_{2 * n}(i32 %count)
        %x = call {pairs} @llvm.masked.load.v{2 * n}i16.p0(ptr %a, i32 2, <{2 * n} x i1> %m, {pairs} zeroinitializer)
        %y = call {pairs} @llvm.masked.load.v{2 * n}i16.p0(ptr %b, i32 2, <{2 * n} x i1> %m, {pairs} zeroinitializer)
        %z = call {f} @multiply_pairs({f} %acc, {pairs} %x, {pairs} %y)
        ret {f} %z""")  # fmt: skip
    for name, intrinsic, start in (("sum", "reassoc float @llvm.vector.reduce.fadd", "float 0.0, "), ("max", "float @llvm.vector.reduce.fmax", "")):
        define("float", name, f"{f} %x", f"%y = call {intrinsic}.v{n}f32({start}{f} %x)\nret float %y")
    _define_shuffles(define, n)
    _define_elementary(define, n)
    _define_integers(define, n, native_bytes)
    return out


def _define_eight_bits(define: Callable[[str, str, str, str], None], n: int) -> None:
    """What widens and narrows int8 and float8 (e4m3, without infinities)."""
    f, i, b = f"<{n} x float>", f"<{n} x i32>", f"<{n} x i8>"
    define(f, "widen_int8", f"{b} %x", f"""
        %y = sitofp {b} %x to {f}
        ret {f} %y""")  # fmt: skip
    define(f, "limited", f"{f} %x, float %largest", f"""
        %a = insertelement {f} poison, float %largest, i64 0
        %high = shufflevector {f} %a, {f} poison, {i} zeroinitializer
        %low = fneg {f} %high
        %y = call {f} @llvm.minnum.v{n}f32({f} %x, {f} %high)
        %z = call {f} @llvm.maxnum.v{n}f32({f} %y, {f} %low)
        ret {f} %z""")  # fmt: skip
    define(b, "narrow_int8", f"{f} %x", f"""
        %y = call {f} @limited({f} %x, float 127.0)
        %z = call {f} @llvm.rint.v{n}f32({f} %y)
        %w = fptosi {f} %z to {i}
        %r = trunc {i} %w to {b}
        ret {b} %r""")  # fmt: skip
    # e4m3 in the place of a float32's exponent and mantissa is 2¹²⁰ times too small, subnormal numbers included.
    define(f, "widen_float8_e4m3fn", f"{b} %x", f"""
        %w = zext {b} %x to {i}
        %magnitude = and {i} %w, splat (i32 127)
        %placed = shl {i} %magnitude, splat (i32 20)
        %small = bitcast {i} %placed to {f}
        %large = fmul {f} %small, splat (float 0x4770000000000000)
        %bits = bitcast {f} %large to {i}
        %signs = and {i} %w, splat (i32 128)
        %high = shl {i} %signs, splat (i32 24)
        %both = or {i} %bits, %high
        %y = bitcast {i} %both to {f}
        ret {f} %y""")  # fmt: skip
    define(b, "narrow_float8_e4m3fn", f"{f} %x", f"""
        %y = call {f} @limited({f} %x, float 448.0)
        %small = fmul {f} %y, splat (float 0x3870000000000000)
        %all = bitcast {f} %small to {i}
        %bits = and {i} %all, splat (i32 2147483647)
        %last = lshr {i} %bits, splat (i32 20)
        %odd = and {i} %last, splat (i32 1)
        %bias = add {i} %odd, splat (i32 524287)
        %sum = add {i} %bits, %bias
        %rounded = lshr {i} %sum, splat (i32 20)
        %sign = lshr {i} %all, splat (i32 24)
        %high = and {i} %sign, splat (i32 128)
        %both = or {i} %rounded, %high
        %r = trunc {i} %both to {b}
        ret {b} %r""")  # fmt: skip


def _define_shuffles(define: Callable[[str, str, str, str], None], n: int) -> None:
    """What moves lanes."""
    f = f"<{n} x float>"

    def order(lanes: Iterable[int]) -> str:
        return f"<{n} x i32> <{', '.join(f'i32 {k}' for k in lanes)}>"

    for name, lanes in (("evens", range(0, 2 * n, 2)), ("odds", range(1, 2 * n, 2))):
        define(f, name, f"{f} %a, {f} %b", f"""
            %y = shufflevector {f} %a, {f} %b, {order(lanes)}
            ret {f} %y""")  # fmt: skip
    define(f, "twice", f"{f} %x", f"""
        %y = shufflevector {f} %x, {f} poison, {order(k // 2 for k in range(n))}
        ret {f} %y""")  # fmt: skip
    define(f, "turn_pairs", f"{f} %x", f"""
        %m = fneg {f} %x
        %y = shufflevector {f} %x, {f} %m, {order(k - 1 if k % 2 else n + k + 1 for k in range(n))}
        ret {f} %y""")  # fmt: skip
    define("float", "first", f"{f} %x", f"""
        %y = extractelement {f} %x, i64 0
        ret float %y""")  # fmt: skip
    numbers = ", ".join(f"float {k}.0" for k in range(n))
    define(f, "numbers", "", f"ret {f} <{numbers}>")
    define(f, "between", f"{f} %x, i32 %begin, i32 %end", f"""
        %before = call <{n} x i1> @first_{n}(i32 %begin)
        %until = call <{n} x i1> @first_{n}(i32 %end)
        %y = select <{n} x i1> %until, {f} %x, {f} splat (float 0xFFF0000000000000)
        %z = select <{n} x i1> %before, {f} splat (float 0xFFF0000000000000), {f} %y
        ret {f} %z""")  # fmt: skip
    # Neighbours are added, log₂ n times: lane k ends as the sum of vector k.
    lines: list[str] = []
    vectors = [f"%x{k}" for k in range(n)]
    while len(vectors) > 1:
        added = []
        for a, b in zip(vectors[::2], vectors[1::2], strict=True):
            y = f"%y{len(lines)}"
            lines += [f"{y}e = call {f} @evens({f} {a}, {f} {b})", f"{y}o = call {f} @odds({f} {a}, {f} {b})", f"{y} = fadd {f} {y}e, {y}o"]
            added.append(y)
        vectors = added
    define(f, "sums", ", ".join(f"{f} %x{k}" for k in range(n)), "\n".join([*lines, f"ret {f} {vectors[0]}"]))


def _define_elementary(define: Callable[[str, str, str, str], None], n: int) -> None:
    """exp, and what is made of it, to about 1e-7. NaN stays NaN."""
    f, i = f"<{n} x float>", f"<{n} x i32>"

    def constant(x: float) -> str:
        rounded = struct.unpack("f", struct.pack("f", x))[0]
        return f"splat (float 0x{struct.pack('>d', rounded).hex().upper()})"

    # Cephes' expf: x = n ln 2 + r with |r| ≤ ln 2 / 2, a polynomial in r, and n added to the exponent. Adding 1.5·2²³ rounds
    # to the integer n and leaves it in the low bits.
    coefficients = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
    horner = "\n".join(f"%p{k} = call {f} @llvm.fma.v{n}f32({f} {f'%p{k - 1}'}, {f} %r, {f} {constant(c)})" for k, c in enumerate(coefficients) if k)
    horner = horner.replace("%p0", constant(coefficients[0]))
    define(f, "exp", f"{f} %x", f"""
        %above = fcmp ogt {f} %x, {constant(89.0)}
        %c = select <{n} x i1> %above, {f} {constant(89.0)}, {f} %x
        %t = call {f} @llvm.fma.v{n}f32({f} %c, {f} {constant(1.4426950408889634)}, {f} {constant(12582912.0)})
        %n = fsub {f} %t, {constant(12582912.0)}
        %m = fneg {f} %n
        %s = call {f} @llvm.fma.v{n}f32({f} %m, {f} {constant(0.693359375)}, {f} %c)
        %r = call {f} @llvm.fma.v{n}f32({f} %m, {f} {constant(-2.12194440e-4)}, {f} %s)
        {indent(horner, ' ' * 8).strip()}
        %square = fmul {f} %r, %r
        %q = call {f} @llvm.fma.v{n}f32({f} %p5, {f} %square, {f} %r)
        %y = fadd {f} %q, {constant(1.0)}
        %b = bitcast {f} %t to {i}
        %e = shl {i} %b, splat (i32 23)
        %d = add {i} %e, splat (i32 1065353216)
        %scale = bitcast {i} %d to {f}
        %z = fmul {f} %y, %scale
        %below = fcmp olt {f} %x, {constant(-87.33)}
        %result = select <{n} x i1> %below, {f} zeroinitializer, {f} %z
        ret {f} %result""")  # fmt: skip
    define(f, "sigmoid", f"{f} %x", f"""
        %m = fneg {f} %x
        %e = call {f} @exp({f} %m)
        %d = fadd {f} %e, {constant(1.0)}
        %y = fdiv {f} {constant(1.0)}, %d
        ret {f} %y""")  # fmt: skip
    define(f, "tanh", f"{f} %x", f"""
        %t = fmul {f} %x, {constant(2.0)}
        %s = call {f} @sigmoid({f} %t)
        %y = call {f} @llvm.fma.v{n}f32({f} %s, {f} {constant(2.0)}, {f} {constant(-1.0)})
        ret {f} %y""")  # fmt: skip
    # log(1 + e^x) = max(x, 0) + log(1 + u), u = e^−|x| ≤ 1. Cephes' logf of y = 1 + u, halved above √2, and what y lost of u: (u − (y − 1)) / y.
    series = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1,
              3.3333331174e-1)  # fmt: skip
    terms = "\n".join(f"%p{k} = call {f} @llvm.fma.v{n}f32({f} {f'%p{k - 1}'}, {f} %z, {f} {constant(c)})" for k, c in enumerate(series) if k)
    terms = terms.replace("%p0", constant(series[0]))
    define(f, "softplus", f"{f} %x", f"""
        %a = call {f} @llvm.fabs.v{n}f32({f} %x)
        %m = fneg {f} %a
        %u = call {f} @exp({f} %m)
        %y = fadd {f} %u, {constant(1.0)}
        %back = fsub {f} %y, {constant(1.0)}
        %gone = fsub {f} %u, %back
        %lost = fdiv {f} %gone, %y
        %large = fcmp ogt {f} %y, {constant(2**0.5)}
        %half = fmul {f} %y, {constant(0.5)}
        %reduced = select <{n} x i1> %large, {f} %half, {f} %y
        %z = fsub {f} %reduced, {constant(1.0)}
        {indent(terms, ' ' * 8).strip()}
        %square = fmul {f} %z, %z
        %cube = fmul {f} %square, %z
        %high = fmul {f} %cube, %p8
        %low = call {f} @llvm.fma.v{n}f32({f} %square, {f} {constant(-0.5)}, {f} %high)
        %ln = fadd {f} %low, %z
        %whole = fadd {f} %ln, {constant(math.log(2))}
        %log = select <{n} x i1> %large, {f} %whole, {f} %ln
        %log1p = fadd {f} %log, %lost
        %negative = fcmp olt {f} %x, zeroinitializer
        %positive = select <{n} x i1> %negative, {f} zeroinitializer, {f} %x
        %result = fadd {f} %positive, %log1p
        ret {f} %result""")  # fmt: skip
    # Abramowitz & Stegun 7.1.26, to 1.5e-7.
    terms = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
    series = "\n".join(f"%p{k} = call {f} @llvm.fma.v{n}f32({f} {f'%p{k - 1}'}, {f} %t, {f} {constant(c)})" for k, c in enumerate(terms) if k)
    series = series.replace("%p0", constant(terms[0]))
    define(f, "erf", f"{f} %x", f"""
        %a = call {f} @llvm.fabs.v{n}f32({f} %x)
        %u = call {f} @llvm.fma.v{n}f32({f} %a, {f} {constant(0.3275911)}, {f} {constant(1.0)})
        %t = fdiv {f} {constant(1.0)}, %u
        {indent(series, ' ' * 8).strip()}
        %p = fmul {f} %p4, %t
        %square = fmul {f} %x, %x
        %m = fneg {f} %square
        %e = call {f} @exp({f} %m)
        %v = fmul {f} %p, %e
        %w = fsub {f} {constant(1.0)}, %v
        %y = call {f} @llvm.copysign.v{n}f32({f} %w, {f} %x)
        ret {f} %y""")  # fmt: skip
    define(f, "relu", f"{f} %x", f"""
        %negative = fcmp olt {f} %x, zeroinitializer
        %y = select <{n} x i1> %negative, {f} zeroinitializer, {f} %x
        ret {f} %y""")  # fmt: skip
    define(f, "silu", f"{f} %x", f"""
        %s = call {f} @sigmoid({f} %x)
        %y = fmul {f} %x, %s
        ret {f} %y""")  # fmt: skip
    define(f, "swiglu_oai", f"{f} %x, {f} %u", f"""
        %large = fcmp ogt {f} %x, {constant(7.0)}
        %g = select <{n} x i1> %large, {f} {constant(7.0)}, {f} %x
        %above = fcmp ogt {f} %u, {constant(7.0)}
        %m = select <{n} x i1> %above, {f} {constant(7.0)}, {f} %u
        %below = fcmp olt {f} %m, {constant(-7.0)}
        %l = select <{n} x i1> %below, {f} {constant(-7.0)}, {f} %m
        %t = fmul {f} %g, {constant(1.702)}
        %s = call {f} @sigmoid({f} %t)
        %h = fmul {f} %g, %s
        %y = call {f} @llvm.fma.v{n}f32({f} %h, {f} %l, {f} %h)
        ret {f} %y""")  # fmt: skip
    define(f, "gelu", f"{f} %x", f"""
        %t = fmul {f} %x, {constant(0.5**0.5)}
        %e = call {f} @erf({f} %t)
        %d = fadd {f} %e, {constant(1.0)}
        %h = fmul {f} %x, {constant(0.5)}
        %y = fmul {f} %h, %d
        ret {f} %y""")  # fmt: skip
    define(f, "gelu_tanh", f"{f} %x", f"""
        %square = fmul {f} %x, %x
        %k = call {f} @llvm.fma.v{n}f32({f} %square, {f} {constant(0.044715)}, {f} {constant(1.0)})
        %c = fmul {f} %k, {constant(2 * (2 / math.pi) ** 0.5)}
        %t = fmul {f} %x, %c
        %s = call {f} @sigmoid({f} %t)
        %y = fmul {f} %x, %s
        ret {f} %y""")  # fmt: skip


def _define_integers(define: Callable[[str, str, str, str], None], n: int, native_bytes: bool) -> None:
    """Four bytes a lane, and what becomes of them."""
    f, i, b, h = f"<{n} x float>", f"<{n} x i32>", f"<{n} x i8>", f"<{2 * n} x i16>"
    define(i, "load_bytes", "ptr %p", f"""
        %x = load {i}, ptr %p, align 1
        ret {i} %x""")  # fmt: skip
    define(i, "splat_bytes", "ptr %p", f"""
        %e = load i32, ptr %p, align 1
        %a = insertelement {i} poison, i32 %e, i64 0
        %x = shufflevector {i} %a, {i} poison, {i} zeroinitializer
        ret {i} %x""")  # fmt: skip
    define(i, "low_nibbles", f"{i} %x", f"""
        %y = and {i} %x, splat (i32 252645135)
        ret {i} %y""")  # fmt: skip
    define(i, "high_nibbles", f"{i} %x", f"""
        %s = lshr {i} %x, splat (i32 4)
        %y = and {i} %s, splat (i32 252645135)
        ret {i} %y""")  # fmt: skip
    # acc + Σ of four products a lane, w unsigned and x signed. Without the instruction: even and odd bytes apart, as words.
    words = "llvm.x86.avx512.pmaddw.d.512" if n == 16 else "llvm.x86.avx2.pmadd.wd"
    define(i, "dot_bytes", f"{i} %acc, {i} %w, {i} %x", f"""
        %a = bitcast {i} %w to <{4 * n} x i8>
        %b = bitcast {i} %x to <{4 * n} x i8>
        %y = call {i} @llvm.x86.avx512.vpdpbusd.512({i} %acc, <{4 * n} x i8> %a, <{4 * n} x i8> %b)
        ret {i} %y""" if native_bytes else f"""
        %a = bitcast {i} %w to {h}
        %b = bitcast {i} %x to {h}
        %ae = and {h} %a, splat (i16 255)
        %ao = lshr {h} %a, splat (i16 8)
        %bs = shl {h} %b, splat (i16 8)
        %be = ashr {h} %bs, splat (i16 8)
        %bo = ashr {h} %b, splat (i16 8)
        %even = call {i} @{words}({h} %ae, {h} %be)
        %odd = call {i} @{words}({h} %ao, {h} %bo)
        %s = add {i} %even, %odd
        %y = add {i} %acc, %s
        ret {i} %y""")  # fmt: skip
    define(f, "integers_as_floats", f"{i} %x", f"""
        %y = sitofp {i} %x to {f}
        ret {f} %y""")  # fmt: skip
    define(i, "rounded", f"{f} %x", f"""
        %r = call {f} @llvm.rint.v{n}f32({f} %x)
        %y = fptosi {f} %r to {i}
        ret {i} %y""")  # fmt: skip
    define("void", "store_bytes", f"ptr %p, {i} %x", f"""
        %y = trunc {i} %x to {b}
        store {b} %y, ptr %p, align 1
        ret void""")  # fmt: skip
    define("i32", "sum_integers", f"{i} %x", f"""
        %y = call i32 @llvm.vector.reduce.add.v{n}i32({i} %x)
        ret i32 %y""")  # fmt: skip
    define(f, "larger", f"{f} %most, {f} %x", f"""
        %a = call {f} @llvm.fabs.v{n}f32({f} %x)
        %y = call {f} @llvm.maxnum.v{n}f32({f} %most, {f} %a)
        ret {f} %y""")  # fmt: skip
