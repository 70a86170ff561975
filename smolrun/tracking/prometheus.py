"""`tracker.prometheus`: the newest figures of a training run, for Prometheus to scrape.

The driver listens at http://127.0.0.1:PORT/metrics. Beyond this machine every scrape needs the API
key of this account (api_key.py). Labels are the run and, of a rank, its number and host: as many
series as ranks, however long the run.
"""

from __future__ import annotations

import hmac
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from ipaddress import ip_address
from typing import Any
from wsgiref.simple_server import WSGIServer, make_server

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import ThreadingWSGIServer, _SilentHandler, make_wsgi_app
from prometheus_client.registry import Collector

from smolrun.events import (
    EvalDone,
    Event,
    GradientDropped,
    PushDropped,
    RankStep,
    RunStarted,
    StepDone,
    StepSkipped,
)
from smolrun.tracking.api_key import api_key

_RUN = ("run",)
_RANK = ("run", "rank", "host")
_IDLE_S = 10.0  # a connection that says nothing for so long is closed
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
# Name, field, description.
_STEP_GAUGES = (
    ("train_loss", "loss", "Mean loss of the last step"),
    ("train_gradient_norm", "grad_norm", "Gradient norm of the last step, before clipping"),
    ("train_learning_rate", "lr", "Learning rate of the last step"),
    ("train_tokens_per_second", "tokens_per_s", "Targets a second in the last step, of all ranks"),
)
_EVAL_GAUGES = (
    ("eval_loss", "loss", "Loss over the evaluation split"),
    ("eval_accuracy", "accuracy", "Share of right answers over the evaluation split"),
)
_RANK_COUNTERS = (
    ("rank_compute_seconds", "compute_s", "Spent computing"),
    ("rank_wait_seconds", "wait_s", "Spent waiting for other ranks"),
    ("rank_sent_bytes", "bytes_sent", "To other ranks, headers included"),
    ("rank_received_bytes", "bytes_received", "From other ranks, headers included"),
    ("rank_samples", "samples", "Samples that the rank has computed"),
)
_RANK_GAUGES = (
    ("rank_cpu_percent", "cpu_percent", "Load of the process; 100 = one core"),
    ("rank_memory_bytes", "memory_bytes", "Memory of the process"),
    ("rank_device_memory_bytes", "device_memory_bytes", "Memory on the accelerator"),
    ("rank_device_percent", "device_util", "Load of the accelerator; 100 = always busy"),
    ("rank_temperature_celsius", "temperature_c", "Of the hottest sensor of the host"),
    ("rank_throttled", "throttled", "Whether the host slowed itself down"),
)


class TrainingMetrics(Collector):
    """The newest figures; `record` and `collect` are called by different threads."""

    def __init__(self, run: str, hosts: Sequence[str]) -> None:
        """`hosts`: the name of each rank's host."""
        self._run = run
        self._hosts = list(hosts)
        self._lock = threading.Lock()
        self._started: RunStarted | None = None
        self._step: StepDone | None = None
        self._eval: EvalDone | None = None
        self._ranks: dict[int, RankStep] = {}
        self._sums: Counter[tuple[str, int]] = Counter()  # by name and rank

    def record(self, event: Event) -> None:
        """Keep what is newest, and add what is counted."""
        with self._lock:
            if isinstance(event, RankStep) and event.rank < len(self._hosts):
                self._ranks[event.rank] = event
                for name, field, _ in _RANK_COUNTERS:
                    self._sums[name, event.rank] += getattr(event, field) or 0
            elif isinstance(event, StepDone):
                self._step = event
                self._sums["train_tokens", 0] += event.tokens
            elif isinstance(event, EvalDone):
                self._eval = event
            elif isinstance(event, RunStarted):
                self._started = event
            elif isinstance(event, StepSkipped):
                self._sums["train_skipped_steps", 0] += 1
            elif isinstance(event, GradientDropped | PushDropped):
                self._sums["rank_dropped_gradients", event.rank] += 1

    def collect(self) -> Iterator[Metric]:
        """All metrics that have a value."""
        with self._lock:
            return iter([*self._of_run(), *self._of_ranks()])

    def _of_run(self) -> Iterator[Metric]:
        numbers: list[tuple[str, str, float | None]] = []
        if self._started is not None:
            planned = self._started.steps
            numbers += [
                ("train_planned_steps", "Steps that the run is to have", planned),
                ("train_parameters", "Numbers that the model learns", self._started.parameters),
            ]
        if self._step is not None:
            numbers += [("train_steps", "Steps that are done", self._step.step + 1)]
        for event, fields in ((self._step, _STEP_GAUGES), (self._eval, _EVAL_GAUGES)):
            numbers += [(name, text, getattr(event, field, None)) for name, field, text in fields]
        for name, text, value in numbers:
            if value is not None:
                family = GaugeMetricFamily(f"smolrun_{name}", text, labels=_RUN)
                family.add_metric([self._run], value)
                yield family
        yield self._counter("train_tokens", "Targets of all steps", _RUN, [0])
        yield self._counter("train_skipped_steps", "Steps without a finite gradient", _RUN, [0])

    def _of_ranks(self) -> Iterator[Metric]:
        for name, _, text in _RANK_COUNTERS:
            yield self._counter(name, text, _RANK, self._ranks)
        dropped = sorted(rank for name, rank in self._sums if name == "rank_dropped_gradients")
        yield self._counter("rank_dropped_gradients", "That came too late", _RANK, dropped)
        for name, field, text in (("rank_steps", "step", "Steps of the rank"), *_RANK_GAUGES):
            family = GaugeMetricFamily(f"smolrun_{name}", text, labels=_RANK)
            for rank, event in sorted(self._ranks.items()):
                if (value := getattr(event, field)) is not None:
                    family.add_metric(self._labels(rank), value + (field == "step"))
            yield family

    def _counter(self, name: str, text: str, labels: Sequence[str], ranks: Iterable[int]) -> Metric:
        family = CounterMetricFamily(f"smolrun_{name}", text, labels=labels)
        for rank in sorted(ranks):
            family.add_metric(self._labels(rank)[: len(labels)], self._sums[name, rank])
        return family

    def _labels(self, rank: int) -> list[str]:
        host = self._hosts[rank] if rank < len(self._hosts) else ""
        return [self._run, str(rank), host]


WsgiApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class _Handler(_SilentHandler):
    timeout = _IDLE_S


class PrometheusServer:
    """A tracker whose figures Prometheus scrapes; `url` is where."""

    def __init__(self, run: str, hosts: Sequence[str], port: int, bind: str) -> None:
        """OSError if the port is taken, SmolrunError if there can be no API key."""
        self._metrics = TrainingMetrics(run, hosts)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self._metrics)
        self.needs_key = not _is_loopback(bind)
        app = _guarded(make_wsgi_app(registry), api_key()[0] if self.needs_key else None)

        class Server(ThreadingWSGIServer):
            address_family = 10 if ":" in bind else WSGIServer.address_family

        self._server = make_server(bind, port, app, Server, _Handler)
        host = f"[{bind}]" if ":" in bind else bind
        self.url = f"http://{host}:{self._server.server_port}/metrics"
        name, often_s = "smolrun-prometheus", 0.1  # how late it may notice that it is closed
        serve = self._server.serve_forever
        threading.Thread(target=serve, args=(often_s,), name=name, daemon=True).start()

    def record(self, event: Event) -> None:
        """As of a tracker."""
        self._metrics.record(event)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


def _is_loopback(bind: str) -> bool:
    try:
        return bind == "localhost" or ip_address(bind).is_loopback
    except ValueError:
        return False


def _guarded(
    app: Callable[..., Iterable[bytes]], key: str | None
) -> Callable[..., Iterable[bytes]]:
    """Requests with the key; without one, those that name this machine: a page that a browser shows
    may come here by a name of its own (DNS rebinding)."""

    def guarded(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        host = environ.get("HTTP_HOST", "").rpartition(":")
        name = host[0] if host[1] and host[2].isdigit() else environ.get("HTTP_HOST", "")
        kind, _, given = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        is_right = key is not None and hmac.compare_digest(given.strip().encode(), key.encode())
        if key is None and name.lower() not in _LOOPBACK_NAMES:
            status, headers = "403 Forbidden", []
        elif key is not None and not (kind.lower() == "bearer" and is_right):
            status, headers = "401 Unauthorized", [("WWW-Authenticate", "Bearer")]
        else:
            return app(environ, start_response)
        start_response(status, headers)
        return [b""]

    return guarded
