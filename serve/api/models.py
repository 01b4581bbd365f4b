"""/v1/models: the one model that is served."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from ..service import Service

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [_model(request.app.state.service)]}


@router.get("/v1/models/{name:path}")
async def get_model(request: Request, name: str) -> dict[str, Any]:
    service: Service = request.app.state.service
    service.check_model(name)
    return _model(service)


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.model.name, "object": "model", "created": service.created, "owned_by": "ingot", "max_model_len": service.engine().max_model_len}
