"""What a replica measures of itself, for Prometheus.

Owns: `Gauges`. Must not know: HTTP, pools. Labels are models and status codes, never anything that a request said.
"""

from __future__ import annotations

import weakref

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Gauges:
    """Counts and times of one replica, in a registry of its own."""

    def __init__(self, gate):
        self._registry = CollectorRegistry()
        to = {"registry": self._registry}
        self._requests = Counter("paretune_requests", "Requests answered", ["model", "status"], **to)
        self._seconds = Histogram("paretune_request_seconds", "First byte in to last byte out", ["model"], buckets=SECONDS, **to)
        self._first = Histogram("paretune_first_token_seconds", "First byte in to first token", ["model"], buckets=SECONDS, **to)
        self._tokens = Counter("paretune_tokens", "Tokens read and written", ["model", "direction"], **to)
        self._batch = Gauge("paretune_batch_requests", "Requests in the engine's last step", ["model"], **to)
        self._largest = Gauge("paretune_batch_largest", "Most requests in one step so far", ["model"], **to)
        Gauge("paretune_running", "Answers being written", **to).set_function(lambda: gate.running)
        Gauge("paretune_queue", "Requests waiting for their turn", **to).set_function(lambda: gate.waiting)
        self._engines: weakref.WeakValueDictionary = weakref.WeakValueDictionary()

    def request(self, model: str | None, status: int, seconds: float) -> None:
        """Counts a request; the model is None where none answered."""
        self._requests.labels(model or "", status).inc()
        if model:
            self._seconds.labels(model).observe(seconds)

    def engine(self, model: str, engine) -> None:
        """Remembers whose batch to look at."""
        self._engines[model] = engine

    def answer(self, model: str, first: float | None, tokens_in: int, tokens_out: int) -> None:
        """Counts the tokens of an answer and the time to its first one."""
        if first is not None:
            self._first.labels(model).observe(first)
        self._tokens.labels(model, "in").inc(tokens_in)
        self._tokens.labels(model, "out").inc(tokens_out)

    def text(self) -> bytes:
        """Returns all of it in Prometheus' text format."""
        for model, engine in list(self._engines.items()):
            self._batch.labels(model).set(engine.batch)
            self._largest.labels(model).set(engine.largest_batch)
        return generate_latest(self._registry)
