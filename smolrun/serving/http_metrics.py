"""Measurements of the server for Prometheus, under our names and, for boards that exist, vLLM's.

One instance a server; all calls are on the event loop's thread. Times are of one monotonic clock,
the frontend's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from smolrun.serving.messages import Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_GAP_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
# Ours -> vLLM's, as its dashboards know them.
ALIASES = {
    "smolrun_requests_running": "vllm:num_requests_running",
    "smolrun_requests_waiting": "vllm:num_requests_waiting",
    "smolrun_cache_usage_ratio": "vllm:kv_cache_usage_perc",
    "smolrun_prompt_tokens": "vllm:prompt_tokens",
    "smolrun_generated_tokens": "vllm:generation_tokens",
    "smolrun_cache_queries": "vllm:prefix_cache_queries",
    "smolrun_cached_tokens": "vllm:prefix_cache_hits",
    "smolrun_requests_finished": "vllm:request_success",
    "smolrun_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "smolrun_inter_token_seconds": "vllm:inter_token_latency_seconds",
    "smolrun_request_seconds": "vllm:e2e_request_latency_seconds",
    "smolrun_request_prompt_tokens": "vllm:request_prompt_tokens",
    "smolrun_request_generated_tokens": "vllm:request_generation_tokens",
}
# Of StageStats: name, field, description.
_STAGE_COUNTERS = (
    ("compute_seconds", "compute_s", "In which a stage computed"),
    ("wait_seconds", "wait_s", "In which a stage had nothing to compute"),
    ("network_seconds", "network_s", "In which messages to a stage arrived"),
    ("tokens", "tokens", "Tokens that went through the layers of a stage"),
    ("sent_bytes", "sent_bytes", "From a rank to other ranks"),
)
_STAGE_GAUGES = (
    ("weight_bytes", "Memory of the weights of a stage"),
    ("cache_bytes", "Memory of the keys and values of a stage when all slots are full"),
    ("memory_bytes", "Memory of the process of a rank"),
)


class ServingMetrics:
    """What is counted here; what the engine counts comes with `stats`."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry(auto_describe=False)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"smolrun_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"smolrun_{name}", text, buckets=buckets, registry=registry)

        self.ready = Gauge("smolrun_ready", "Whether requests are answered", registry=registry)
        self.loaded = Gauge("smolrun_loaded", "Whether the model is in memory", registry=registry)
        self.memory_low = Gauge(
            "smolrun_memory_low", "Whether a host lacks memory for a request", registry=registry
        )
        self.open = Gauge("smolrun_requests_open", "Answers not delivered", registry=registry)
        self.running = Gauge("smolrun_requests_running", "Choices that run", registry=registry)
        self.waiting = Gauge("smolrun_requests_waiting", "Choices that wait", registry=registry)
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.generated_tokens = counter("generated_tokens", "Tokens of answers")
        self.cache_queries = counter("cache_queries", "Tokens of prompts that were looked up")
        self.cached_tokens = counter("cached_tokens", "Tokens of prompts that were not computed")
        self.finished = counter("requests_finished", "Choices by their end", ("finished_reason",))
        self.refused = counter("requests_refused", "Requests that found no room", ("code",))
        self.first_token = histogram("time_to_first_token_seconds", "Of a request", _SECONDS)
        self.inter_token = histogram("inter_token_seconds", "Between tokens", _GAP_SECONDS)
        self.request_seconds = histogram("request_seconds", "From its start to its end", _SECONDS)
        self.request_prompt = histogram("request_prompt_tokens", "Of a request", _TOKENS)
        self.request_generated = histogram("request_generated_tokens", "Of a request", _TOKENS)
        self.lost_replicas = counter("replica_losses", "Times that a replica was lost", ("rank",))
        self.moved = counter("requests_moved", "Requests that another replica continued")
        self.resumed_streams = counter("streams_resumed", "Answers that a client resumed")
        self.kept_streams = Gauge(
            "smolrun_streams_kept", "Answers kept without a connection", registry=registry
        )
        self.kept_bytes = Gauge(
            "smolrun_streams_bytes", "Of the events of all that may be resumed", registry=registry
        )
        gauge, ranks = Gauge, ("rank",)
        self._up = gauge("smolrun_rank_up", "Whether it takes requests", ranks, registry=registry)
        self._running_on = gauge(
            "smolrun_rank_choices", "Choices that run or wait on it", ranks, registry=registry
        )
        self.stats: Mapping[int, Stats] = {}  # by rank

    def note_ranks(
        self, ranks: Iterable[int], there: Collection[int], load: Mapping[int, int]
    ) -> None:
        """Which engines are there, and the choices of each."""
        for rank in ranks:
            self._up.labels(str(rank)).set(rank in there)
            self._running_on.labels(str(rank)).set(load.get(rank, 0))

    def text(self) -> bytes:
        """All of it, in the format of Prometheus."""
        exposed = CollectorRegistry(auto_describe=False)
        exposed.register(_WithAliases(self._registry, self.stats))
        return generate_latest(exposed)


class _WithAliases(Collector):
    def __init__(self, registry: CollectorRegistry, stats: Mapping[int, Stats]) -> None:
        self._registry = registry
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Every metric, and again under vLLM's name where it has one."""
        metrics = [*self._registry.collect(), *_engine_metrics(self._stats)]
        for metric in metrics:
            yield metric
            alias = ALIASES.get(metric.name)
            if alias is not None:
                copy = Metric(alias, metric.documentation, metric.type, metric.unit)
                copy.samples = [
                    sample._replace(name=sample.name.replace(metric.name, alias, 1))
                    for sample in metric.samples
                ]
                yield copy


def _engine_metrics(stats: Mapping[int, Stats]) -> Iterator[Metric]:
    """Of the engines, and of their stages, labelled by rank and host."""
    if not stats:
        return
    usage = sum(one.cache_usage for one in stats.values()) / len(stats)
    yield GaugeMetricFamily("smolrun_cache_usage_ratio", "Of keys and values", usage)
    labels = ("rank", "host", "stage")
    families: list[tuple[CounterMetricFamily | GaugeMetricFamily, str]] = [
        (CounterMetricFamily(f"smolrun_stage_{name}", text, labels=labels), key)
        for name, key, text in _STAGE_COUNTERS
    ]
    families += [
        (GaugeMetricFamily(f"smolrun_stage_{key}", text, labels=labels), key)
        for key, text in _STAGE_GAUGES
    ]
    for family, key in families:
        for stage in (stage for one in stats.values() for stage in one.stages):
            name = f"{stage.first_layer}-{stage.last_layer}"
            family.add_metric([str(stage.rank), stage.host, name], getattr(stage, key))
        yield family
