"""The body of a request."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class RequestBody(BaseModel):
    """Types are strict (a number in quotes is an error) and numbers finite."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    def check(self) -> None:
        """ApiError, naming the field, if fields contradict each other or ask for what is not served."""
