"""The fields that completions and chat completions share."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

from ingot.runtime.request import SamplingParams

from .body import RequestBody
from .errors import ApiError

Int = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
MAX_LOGPROBS = 20


def one_of(kinds: str) -> WrapValidator:
    """For a union: one error that says what may stand there, not one for each member."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            raise PydanticCustomError("kind", "must be {kinds}", {"kinds": kinds}) from error

    return WrapValidator(validate)


TokenKey = Annotated[str, Field(pattern=r"^\d{1,10}$")]
_SAME_NAME = (
    "n", "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "bad_words",
    "allowed_token_ids",
)  # fmt: skip


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class SamplingRequest(RequestBody):
    """Fields of a request that say how to sample and how to answer.

    Types are strict (a number in quotes is an error) and numbers finite; `SamplingParams` checks their ranges. A field that
    is unknown and harmless is ignored; one that would change the answer and is not served is refused by name: `unsupported`
    lists these with the values that ask for nothing.
    """

    model_config = ConfigDict(extra="allow")
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "response_format": (None, {"type": "text"}),
        "structured_outputs": (None,),
        "guided_json": (None,),
        "guided_regex": (None,),
        "guided_choice": (None,),
        "guided_grammar": (None,),
        "prompt_logprobs": (None, 0),
    }

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Annotated[str | Annotated[list[str], Field(max_length=16)] | None, one_of("a string or a list of at most 16")] = None
    stop_token_ids: list[Token] | None = None
    ignore_eos: bool = False
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[TokenKey, float] | None, one_of("an object of numbers by token id")] = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    # vLLM's, beyond OpenAI's
    repetition_penalty: float | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[Token] | None = None
    priority: Int = 0  # lower goes first
    use_beam_search: bool = False  # with best_of or else n beams
    length_penalty: float | None = None
    early_stopping: Annotated[bool | Literal["never"] | None, one_of('true, false or "never"')] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """ApiError, naming the field, if the request asks for what is not served or contradicts itself."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options needs stream to be true", param="stream_options", code="invalid_value")
        for name, nothing in self.unsupported.items():
            value = (self.model_extra or {}).get(name)
            if value not in nothing:
                raise ApiError(400, f"{name} is not supported", param=name, code="unsupported_parameter")
        if self.stream and (self.use_beam_search or self.best_of not in (None, self.n or 1)):
            name = "use_beam_search" if self.use_beam_search else "best_of"
            raise ApiError(400, f"stream: with {name} the answers are known at the end only", param="stream", code="invalid_value")

    def params(self, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None = None) -> SamplingParams:
        """As the engine takes it; what was not given has the engine's defaults. RequestError names a number out of its range."""
        names = _SAME_NAME + (("length_penalty", "early_stopping") if self.use_beam_search else ("best_of",))
        given = {name: getattr(self, name) for name in names if getattr(self, name) not in (None, [])}
        if self.use_beam_search:
            given["beam_width"] = self.best_of or self.n or 1
        return SamplingParams(
            **given,
            max_tokens=max_tokens,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
