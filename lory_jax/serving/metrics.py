"""What Prometheus reads from `/metrics`."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from lory_jax.serving.engine import Engine

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Counters of one server, in a registry of their own."""

    media_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self, engine: Engine):
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "lory_requests",
            "Requests for completions by model and HTTP status; 499: the client went away",
            ["model", "status"],
            registry=registry,
        )
        self.prompt_tokens = Counter("lory_prompt_tokens", "Tokens of prompts", registry=registry)
        self.generated_tokens = Counter(
            "lory_generated_tokens", "Tokens of continuations", registry=registry
        )
        self._seconds = Histogram(
            "lory_request_seconds",
            "From the head of a request to the end of its answer",
            buckets=SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "lory_first_token_seconds",
            "From the head of a request to its first token",
            buckets=SECONDS,
            registry=registry,
        )
        for name, meaning, value in (
            ("lory_waiting_texts", "Texts in the queue", lambda: engine.waiting),
            ("lory_active_texts", "Texts being continued", lambda: engine.active),
            ("lory_slots", "Texts that can be continued at a time", lambda: engine.slots),
        ):
            Gauge(name, meaning, registry=registry).set_function(value)

    def finished(self, model: str, status: int, begun: float) -> None:
        """Counts a request; `begun` is when it came, by `time.monotonic`."""
        self._requests.labels(model, str(status)).inc()
        self._seconds.observe(time.monotonic() - begun)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
