"""The flags of `ingot compile`, which every verb that may have to compile takes too."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_type_hints

import typer

_PANEL = "Compilation"


def _option(*names: str, help: str, **kwargs: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=_PANEL, show_default=False, **kwargs)


@dataclass(frozen=True)
class CompileFlags:
    """What was given on the command line; a flag that was not given is None, and the compiler's default applies."""

    target: Annotated[str | None, _option("--target", help="auto, cpu, or what need not be here: sm_90, x86-64-v3, cpu:avx2+fma, …")] = None
    dtype: Annotated[str | None, _option("--dtype", help="auto, bfloat16, float16 or float32.")] = None
    quantize: Annotated[str | None, _option("--quantize", help="none, fp8, int8, int4-g32, -g64 or -g128; with --calibrate int4-g128-gptq or -awq.")] = None
    quantize_exclude: Annotated[str | None, _option("--quantize-exclude", help="Weights that stay: regular expressions, with commas between.")] = None
    calibrate: Annotated[str | None, _option("--calibrate", help="A text file, like what the model will read, to round weights with.")] = None
    kv_cache_dtype: Annotated[str | None, _option("--kv-cache-dtype", help="auto (as the checkpoint says), a dtype, or fp8 or int8: quantized.")] = None
    max_num_seqs: Annotated[int | None, _option("--max-num-seqs", min=1, help="Most sequences in one step.")] = None
    max_num_batched_tokens: Annotated[int | None, _option("--max-num-batched-tokens", min=1, help="Most tokens in one step.")] = None
    deterministic: Annotated[bool, _option("--deterministic", help="A request's tokens do not depend on its batch.")] = False
    dummy_weights: Annotated[bool, _option("--dummy-weights", help="Random weights: the artifact stores a seed.")] = False
    defer_gate: Annotated[bool, _option("--defer-gate", help="Compare no kernel with its reference now; `ingot artifacts verify --gate` does it.")] = False
    tune: Annotated[bool, _option("--tune", help="Measure every kernel, whatever the tuning table says.")] = False
    trust_remote_code: Annotated[bool, _option("--trust-remote-code", help="Run modeling code that comes with the checkpoint.")] = False

    @property
    def given(self) -> dict[str, Any]:
        """The flags that were given, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) not in (None, False)}

    @property
    def argv(self) -> list[str]:
        """The flags that were given, as arguments of `ingot compile`."""
        argv = []
        for name, value in self.given.items():
            argv.append("--" + name.replace("_", "-"))
            if value is not True:
                argv.append(str(value))
        return argv


def takes_compile_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that has a `flags: CompileFlags` parameter each of the compile flags as an option instead."""
    hints = get_type_hints(CompileFlags, include_extras=True)
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "flags"]
    flags = [inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name]) for f in fields(CompileFlags)]

    @functools.wraps(command)
    def wrapper(**kwargs: Any) -> None:
        command(flags=CompileFlags(**{p.name: kwargs.pop(p.name) for p in flags}), **kwargs)

    positional = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    wrapper.__signature__ = inspect.Signature(positional + flags)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in positional + flags}
    del wrapper.__wrapped__  # typer would look through it
    return wrapper
