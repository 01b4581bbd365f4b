"""POST /v1/embeddings."""

from __future__ import annotations

import base64

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response

from ingot.runtime.embedder import check_text, pooling_index, unit

from ..protocol.embedding import EmbeddingList, EmbeddingObject, EmbeddingRequest, EmbeddingUsage
from ..protocol.errors import ApiError
from ..service import Service
from .exchange import answer, read, until_disconnect

router = APIRouter()


@router.post("/v1/embeddings")
async def embeddings(request: Request) -> Response:
    """Vectors of one or several texts; the texts of requests that come together share steps."""
    service: Service = request.app.state.service
    service.engine()
    info = service.check_embeds()
    body = await read(request, EmbeddingRequest)
    service.check_model(body.model)
    if body.dimensions is not None and body.dimensions > info.dimensions:
        raise ApiError(400, f"dimensions is {body.dimensions}; {service.model.name} has {info.dimensions}", param="dimensions", code="invalid_value")
    texts = [await _token_ids(service, text, body.truncate) for text in body.texts]
    if not texts:
        raise ApiError(400, "input is empty: it needs at least one text", param="input", code="invalid_value")
    vectors = await until_disconnect(request, service.client.embed(texts, pooling_index(body.pooling or info.pooling)))
    vectors = vectors[:, : body.dimensions]
    if info.normalize if body.normalize is None else body.normalize:
        vectors = unit(vectors)
    tokens = sum(map(len, texts))
    data = [EmbeddingObject(index=i, embedding=_encode(v, body.encoding_format)) for i, v in enumerate(vectors)]
    return answer(EmbeddingList(data=data, model=service.model.name, usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)))


async def _token_ids(service: Service, text: str | list[int], truncate: bool) -> list[int]:
    """A text's token ids, checked. ApiError or RequestError, both 400."""
    info, longest = service.check_embeds(), service.engine().max_model_len
    ids = await service.encode(text, max_length=longest if truncate else None) if isinstance(text, str) else text
    if truncate:
        ids = ids[:longest]
    if len(ids) > longest:
        message = f"a text has {len(ids)} tokens and {service.model.name} takes {longest}; shorten it, or set truncate to true"
        raise ApiError(400, message, param="input", code="context_length_exceeded")
    check_text(ids, longest, service.model.vocab_size, info.padding_id)
    return ids


def _encode(vector: np.ndarray, encoding: str) -> list[float] | str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if encoding == "base64" else vector.tolist()
