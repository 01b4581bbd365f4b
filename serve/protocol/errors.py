"""OpenAI's error body, and the exceptions that become one."""

from __future__ import annotations

from typing import Any

import pydantic


class ApiError(Exception):
    """Answered with `status` and OpenAI's error body; `param` names the field of the request that is wrong."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 404: "not_found_error"}.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def from_validation(error: pydantic.ValidationError) -> ApiError:
    """A 400 that names the first wrong field and what is wrong with it."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = ".".join(map(str, first["loc"]))
    others = error.error_count() - 1
    more = f" (and {others} more)" if others else ""
    return ApiError(400, f"{path or 'body'}: {first['msg']}{more}", param=path or None, code="invalid_value")
