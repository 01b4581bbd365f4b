"""The engine's process of an encoder: texts of all requests that wait, packed into steps in the order of their arrival."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from ingot.runtime.embedder import Embedder, batches

from .connection import Clients
from .messages import Abort, Embed, Embedded


@dataclass
class _Open:
    """A request of which some texts are not embedded yet."""

    vectors: np.ndarray
    remaining: int


def serve_embeddings(embedder: Embedder, clients: Clients) -> None:
    """Run until ClientGone: take the requests that are there, compute a step of their texts, answer those that are complete."""
    waiting: deque[tuple[str, int, list[int], int]] = deque()  # (request, place in it, text, pooling)
    requests: dict[str, _Open] = {}
    while True:
        for command in clients.receive(wait=not waiting):
            match command:
                case Embed(request_id=name, token_ids=texts, pooling=pooling):
                    requests[name] = _Open(np.empty((len(texts), embedder.info.dimensions), np.float32), len(texts))
                    waiting.extend((name, i, text, pooling) for i, text in enumerate(texts))
                case Abort(request_ids=names):
                    for name in names:
                        if requests.pop(name, None) is not None:
                            clients.forget(name)
        waiting = deque(w for w in waiting if w[0] in requests)
        if not waiting:
            continue
        step = next(batches([len(text) for _, _, text, _ in waiting], embedder.max_num_batched_tokens, embedder.max_num_seqs))
        taken = [waiting.popleft() for _ in step]
        vectors = embedder.step([text for _, _, text, _ in taken], [pooling for *_, pooling in taken])
        for (name, place, _, _), vector in zip(taken, vectors, strict=True):
            request = requests[name]
            request.vectors[place] = vector
            request.remaining -= 1
            if not request.remaining:
                clients.send(clients.forget(name), Embedded(name, requests.pop(name).vectors.tobytes()))
