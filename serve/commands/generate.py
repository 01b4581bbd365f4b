"""ingot generate: one prompt continued, in this process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..flags import CompileFlags, takes_compile_flags
from ..process import age

if TYPE_CHECKING:
    from ingot.runtime.engine import Engine
    from ingot.runtime.llm import RequestOutput
    from ingot.runtime.request import Delta, SamplingParams, TokenLogprob


@takes_compile_flags
def generate_command(
    flags: CompileFlags,
    model_or_artifact: Annotated[str, typer.Argument(help="An artifact's folder or key, or a model, which is compiled when it was not before.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.", show_default=False)] = None,
    prompt_ids: Annotated[str | None, typer.Option(help="Token ids to continue, such as 1,2,3; needs no tokenizer.", show_default=False)] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most probable token.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.", show_default=False)] = None,
    logprobs: Annotated[int | None, typer.Option(min=0, help="Log-probabilities, and those of the N most probable tokens.", show_default=False)] = None,
    prompt_logprobs: Annotated[int | None, typer.Option(min=0, help="The same for the prompt's tokens.", show_default=False)] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end-of-sequence token.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
) -> None:
    """Continue a prompt."""
    given = _parse_ids(prompt_ids) if prompt_ids is not None else prompt
    if given is None or (prompt is not None and prompt_ids is not None):
        raise typer.BadParameter("give one of the two", param_hint="--prompt / --prompt-ids")
    from ..resolve import resolve

    artifact = resolve(model_or_artifact, flags)
    from ingot.runtime.engine import EngineOptions
    from ingot.runtime.load import load_engine
    from ingot.runtime.request import SamplingParams

    from ..progress import StageBar

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, seed=seed, ignore_eos=ignore_eos, logprobs=logprobs, prompt_logprobs=prompt_logprobs
    )
    with StageBar("loading") as bar:
        engine = load_engine(artifact, EngineOptions(), bar.update)
    ready = age()
    if as_json:
        print(json.dumps(_as_json(_run(engine, given, params, lambda delta: None), ready)))
    else:
        _run(engine, given, params, lambda delta: print(delta.text or _numbers(engine, delta), end="", flush=True))
        print()


def _run(engine: Engine, prompt: str | list[int], params: SamplingParams, show: Callable[[Delta], None]) -> RequestOutput:
    """The prompt's continuation; `show` is called with what each step adds."""
    from ingot.runtime.llm import Completion, RequestOutput
    from ingot.runtime.request import Request, RequestError

    if isinstance(prompt, str):
        if engine.tokenizer is None:
            raise RequestError("--prompt: the artifact has no tokenizer; use --prompt-ids")
        prompt = engine.tokenizer.encode(prompt)
    output = RequestOutput("generate", prompt, [Completion(0)])
    begin = time.perf_counter()
    engine.add(Request(output.request_id, prompt, params))
    while engine.has_work:
        for delta in engine.step():
            output.add(delta, time.perf_counter() - begin)
            show(delta)
    if output.outputs[0].finish_reason == "error":
        raise RequestError(str(output.outputs[0].stop_reason))
    return output


def _numbers(engine: Engine, delta: Delta) -> str:
    """Token ids, where there is no tokenizer to make text of them."""
    return "" if engine.tokenizer is not None else "".join(f"{t} " for t in delta.token_ids)


def _as_json(output: RequestOutput, ready: float) -> dict[str, Any]:
    """What `--json` prints. Log-probabilities are natural; `top_…` are [token id, log-probability] pairs, best first."""
    completion, timing = output.outputs[0], output.timing
    return {
        "token_ids": completion.token_ids,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "logprobs": _values(completion.logprobs),
        "top_logprobs": _tops(completion.logprobs),
        "prompt_token_ids": output.prompt_token_ids,
        "prompt_logprobs": _values(output.prompt_logprobs),
        "top_prompt_logprobs": _tops(output.prompt_logprobs),
        "timing": {
            "ready": ready,  # seconds from the start of the process
            "first_token": timing.first_token,  # seconds from then on
            "total": timing.total,
            "tokens_per_second": (len(completion.token_ids) - 1) / (timing.total - timing.first_token) if len(completion.token_ids) > 1 else None,
        },
    }


def _values(logprobs: Sequence[TokenLogprob | None] | None) -> list[float | None] | None:
    return None if logprobs is None else [None if p is None else p.logprob for p in logprobs]


def _tops(logprobs: Sequence[TokenLogprob | None] | None) -> list[Any] | None:
    return None if logprobs is None else [None if p is None else p.top for p in logprobs]


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 1,2,3", param_hint="--prompt-ids") from None
