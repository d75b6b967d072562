"""What `/metrics` tells of a server, in a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

TOKENS = [2.0**power for power in range(6, 21)]
ROWS = [2.0**power for power in range(10)]
SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]


class Metrics:
    """Counters and histograms since the start."""

    def __init__(self) -> None:
        self.registry = of = CollectorRegistry()
        self.requests = Counter(
            "kd_serve_requests", "Requests answered, by status", ["status"], registry=of
        )
        self.rows = Counter("kd_serve_rows", "Rows answered", registry=of)
        self.response_tokens = Counter(
            "kd_serve_response_tokens", "Response tokens answered", registry=of
        )
        self.batch_tokens = Histogram(
            "kd_serve_batch_tokens", "Tokens of the rows of a forward", buckets=TOKENS, registry=of
        )
        self.batch_rows = Histogram(
            "kd_serve_batch_rows", "Rows of a forward", buckets=ROWS, registry=of
        )
        self.forward_seconds = Histogram(
            "kd_serve_forward_seconds", "Time of a forward", buckets=SECONDS, registry=of
        )
        self.queue_tokens = Gauge(
            "kd_serve_queue_tokens", "Tokens that wait for a forward", registry=of
        )

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)
