"""ingot generate: one prompt continued, in this process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..flags import CompileFlags, takes_compile_flags
from ..process import Stages, age

if TYPE_CHECKING:
    from ingot.runtime.engine import Engine
    from ingot.runtime.llm import RequestOutput
    from ingot.runtime.request import Delta, SamplingParams, TokenLogprob


def _option(help: str) -> Any:
    return typer.Option(help=help, show_default=False)


@takes_compile_flags
def generate_command(
    flags: CompileFlags,
    model_or_artifact: Annotated[str, typer.Argument(help="An artifact's folder or key, or a model, which is compiled when it was not before.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.", show_default=False)] = None,
    prompt_ids: Annotated[str | None, typer.Option(help="Token ids to continue, such as 1,2,3; needs no tokenizer.", show_default=False)] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most probable token.")] = 0.0,
    top_k: Annotated[int | None, _option("Draw from the K most probable tokens.")] = None,
    top_p: Annotated[float | None, _option("Draw from the most probable tokens whose probabilities make P.")] = None,
    min_p: Annotated[float | None, _option("Draw from tokens with P times the probability of the most probable one.")] = None,
    seed: Annotated[int | None, _option("Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, _option("End before this text; may be given again.")] = None,
    min_tokens: Annotated[int | None, _option("Fewest tokens to generate.")] = None,
    repetition_penalty: Annotated[float | None, _option("Above 1: discourage tokens of the prompt and the output.")] = None,
    presence_penalty: Annotated[float | None, _option("Above 0: discourage tokens of the output.")] = None,
    frequency_penalty: Annotated[float | None, _option("Above 0: discourage them by how often they came.")] = None,
    logit_bias: Annotated[list[str] | None, _option("ID:NUMBER is added to the logit of a token; may be given again.")] = None,
    bad_word: Annotated[list[str] | None, _option("Never generate this word; may be given again.")] = None,
    allowed_token_ids: Annotated[str | None, _option("Token ids such as 1,2,3: generate no others.")] = None,
    best_of: Annotated[int | None, _option("Generate so many continuations, print the most probable one.")] = None,
    beam_width: Annotated[int | None, _option("Search the most probable continuation with so many beams.")] = None,
    length_penalty: Annotated[float | None, _option("Of beam search: above 0 favours long continuations.")] = None,
    early_stopping: Annotated[bool, typer.Option("--early-stopping", help="Of beam search: end with as many continuations as beams.")] = False,
    logprobs: Annotated[int | None, typer.Option(min=0, help="Log-probabilities, and those of the N most probable tokens.", show_default=False)] = None,
    prompt_logprobs: Annotated[int | None, typer.Option(min=0, help="The same for the prompt's tokens.", show_default=False)] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end-of-sequence token.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
) -> None:
    """Continue a prompt."""
    given = _parse_ids(prompt_ids, "--prompt-ids") if prompt_ids is not None else prompt
    if given is None or (prompt is not None and prompt_ids is not None):
        raise typer.BadParameter("give one of the two", param_hint="--prompt / --prompt-ids")
    from ingot.runtime.request import SamplingParams

    asked: dict[str, Any] = {
        "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed, "stop": stop, "min_tokens": min_tokens, "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty, "logit_bias": dict(map(_parse_bias, logit_bias or [])),
        "bad_words": bad_word, "best_of": best_of, "beam_width": beam_width, "length_penalty": length_penalty, "early_stopping": early_stopping,
        "allowed_token_ids": _parse_ids(allowed_token_ids, "--allowed-token-ids") if allowed_token_ids is not None else None,
        "logprobs": logprobs, "prompt_logprobs": prompt_logprobs, "ignore_eos": ignore_eos,
    }  # fmt: skip
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, **{k: v for k, v in asked.items() if v is not None})

    from ..resolve import resolve

    stages = Stages("python")
    artifact = resolve(model_or_artifact, flags)
    from ingot.ops.garbage import uncollected

    from ..prepare import prepare

    with uncollected():
        prepare(stages)
        from ingot.runtime.engine import EngineOptions
        from ingot.runtime.load import load_engine

        from ..progress import StageBar

    with StageBar("loading") as bar:
        engine = load_engine(artifact, EngineOptions(), stages.watching(bar.update))
    stages.enter("ready")
    ready = age()
    if as_json:
        print(json.dumps(_as_json(_run(engine, given, params, lambda delta: None), ready, stages.seconds)))
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


def _as_json(output: RequestOutput, ready: float, stages: dict[str, float]) -> dict[str, Any]:
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
            "stages": stages,  # what they were spent on, in order
            "first_token": timing.first_token,  # seconds from then on
            "total": timing.total,
            "tokens_per_second": (len(completion.token_ids) - 1) / (timing.total - timing.first_token) if len(completion.token_ids) > 1 else None,
        },
    }


def _values(logprobs: Sequence[TokenLogprob | None] | None) -> list[float | None] | None:
    return None if logprobs is None else [None if p is None else p.logprob for p in logprobs]


def _tops(logprobs: Sequence[TokenLogprob | None] | None) -> list[Any] | None:
    return None if logprobs is None else [None if p is None else p.top for p in logprobs]


def _parse_ids(text: str, flag: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 1,2,3", param_hint=flag) from None


def _parse_bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition(":")
    try:
        return int(token), float(bias)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a token id and a number such as 42:-1.5", param_hint="--logit-bias") from None
