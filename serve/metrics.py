"""What /metrics tells Prometheus."""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections import Counter
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from ingot.runtime.engine import EngineStats

from .launch import SHARED_METRICS

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKENS = tuple(2**i for i in range(0, 18))


class _Histogram(Histogram):
    """One that can be told of many observations at once."""

    def observe_many(self, amount: float, count: int) -> None:
        """`count` observations of `amount`."""
        self._sum.inc(amount * count)
        self._buckets[bisect_left(self._upper_bounds, amount)].inc(count)


class Metrics:
    """One registry a server, so that two servers in a process do not mix.

    Of a server with several processes each one counts, and each one tells the sum (prometheus_client's multiprocess mode).
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry: dict[str, Any] = {"registry": self._registry}
        self.requests = prometheus_client.Counter("ingot_requests", "Requests to the engine by how they ended", ["finish_reason"], **registry)
        self.prompt_tokens = prometheus_client.Counter("ingot_prompt_tokens", "Prompt tokens of the requests begun", **registry)
        self.generation_tokens = prometheus_client.Counter("ingot_generation_tokens", "Tokens generated", **registry)
        self.embedded_texts = prometheus_client.Counter("ingot_embedded_texts", "Texts embedded", **registry)
        self.prompt_length = Histogram("ingot_request_prompt_tokens", "Prompt tokens a request", buckets=_TOKENS, **registry)
        self.generation_length = Histogram("ingot_request_generation_tokens", "Tokens generated a request", buckets=_TOKENS, **registry)
        self.first_token = Histogram("ingot_time_to_first_token_seconds", "From a request's begin to its first token", buckets=_SECONDS, **registry)
        self.inter_token = _Histogram("ingot_inter_token_latency_seconds", "Between two tokens of a request", buckets=_SECONDS, **registry)
        self.end_to_end = Histogram("ingot_request_latency_seconds", "From a request's begin to its end", buckets=_SECONDS, **registry)
        latest = registry | {"multiprocess_mode": "mostrecent"}
        self.ready_seconds = Gauge("ingot_ready_seconds", "From the server's start to ready", **latest)
        self.start_seconds = Gauge("ingot_engine_start_seconds", "What the engine's process did until it was ready", ["stage"], **latest)
        self.sequences = Gauge("ingot_sequences", "Sequences in the engine", ["state"], **latest)
        self.pages = Gauge("ingot_kv_pages", "Pages of the KV cache", ["group", "state"], **latest)
        self.preemptions = Gauge("ingot_preemptions", "Sequences that had to be computed again since the start", **latest)
        self.prefix_queries = Gauge("ingot_prefix_cache_query_tokens", "Prompt tokens looked up in the prefix cache since the start", **latest)
        self.prefix_hits = Gauge("ingot_prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache since the start", **latest)
        self.stats: EngineStats | None = None  # the engine's last
        self.gaps: Counter[float] = Counter()  # between tokens, since `generated` was called

    def begin(self, num_prompt_tokens: int, n: int) -> list[Timer]:
        """A request begins; a timer for each of its continuations."""
        self.prompt_tokens.inc(num_prompt_tokens)
        self.prompt_length.observe(num_prompt_tokens)
        return [Timer(self) for _ in range(n)]

    def generated(self, num_tokens: int) -> None:
        """A step of the engine was delivered."""
        self.generation_tokens.inc(num_tokens)
        for seconds, count in self.gaps.items():
            self.inter_token.observe_many(seconds, count)
        self.gaps.clear()

    def embedded(self, texts: list[list[int]], seconds: float) -> None:
        """A request for embeddings was answered."""
        self.requests.labels("embedded").inc()
        self.embedded_texts.inc(len(texts))
        self.end_to_end.observe(seconds)
        for text in texts:
            self.prompt_tokens.inc(len(text))
            self.prompt_length.observe(len(text))

    def text(self) -> bytes:
        """Prometheus' text format."""
        if self.stats is not None:
            self._show(self.stats)
        if SHARED_METRICS not in os.environ:
            return generate_latest(self._registry)
        everybody = CollectorRegistry()
        MultiProcessCollector(everybody)
        return generate_latest(everybody)

    def _show(self, stats: EngineStats) -> None:
        self.sequences.labels("running").set(stats.running)
        self.sequences.labels("waiting").set(stats.waiting)
        for group, (used, total) in stats.pages.items():
            self.pages.labels(group, "used").set(used)
            self.pages.labels(group, "free").set(total - used)
        self.preemptions.set(stats.preemptions)
        self.prefix_queries.set(stats.prefix_query_tokens)
        self.prefix_hits.set(stats.prefix_hit_tokens)


class Timer:
    """Times one continuation of a request."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._begin = self._last = time.perf_counter()
        self._count = 0
        self._ended = False

    def tokens(self, count: int, now: float) -> None:
        """`count` tokens came together, at `now` of `time.perf_counter`."""
        if not count:
            return
        if self._count == 0:
            self._metrics.first_token.observe(now - self._begin)
        else:
            self._metrics.gaps[(now - self._last) / count] += 1
        self._last = now
        self._count += count

    def end(self, reason: str) -> None:
        """It ended; a second end does not count."""
        if self._ended:
            return
        self._ended = True
        self._metrics.requests.labels(reason).inc()
        self._metrics.generation_length.observe(self._count)
        self._metrics.end_to_end.observe(time.perf_counter() - self._begin)
