"""Prometheus metrics, told by the database: the same from every replica, and right after any restart."""

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from d2lora.outbox import Outbox
from service.dispatch import Dispatcher


class QueueCollector(Collector):
    """Counts the queue of record at every scrape."""

    def __init__(self, outbox: Outbox, dispatcher: Dispatcher) -> None:
        self._outbox, self._dispatcher = outbox, dispatcher

    def describe(self) -> list[Metric]:
        """Return nothing, so that no scrape is made at the registration."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Give the metrics that docs/operating.md lists."""
        census = self._outbox.census()
        units = GaugeMetricFamily("d2lora_units", "Jobs that have not ended, and shards", labels=["queue", "state"])
        for labels, count in census.units.items():
            units.add_metric(list(labels), count)
        oldest = GaugeMetricFamily("d2lora_oldest_free_seconds", "Wait of the oldest free unit", labels=["queue"])
        for queue, seconds in census.oldest_free_seconds.items():
            oldest.add_metric([queue], seconds)
        failed = CounterMetricFamily("d2lora_failures", "Failed jobs", labels=["code"])
        for code, count in census.failed.items():
            failed.add_metric([code], count)
        yield units
        yield oldest
        yield failed
        yield CounterMetricFamily("d2lora_failed_attempts", "Claims whose worker died", value=census.deaths)
        yield GaugeMetricFamily("d2lora_outbox_pending", "Wake-ups not yet published", value=census.pending)
        yield GaugeMetricFamily("d2lora_leader", "Whether this replica leads", value=self._dispatcher.leads)


@contextmanager
def serving_metrics(port: int | None, host: str, outbox: Outbox, dispatcher: Dispatcher) -> Iterator[None]:
    """Serve ``/metrics`` on a port of its own while the block runs; do nothing without a port."""
    if port is None:
        yield
        return
    registry = CollectorRegistry()
    registry.register(QueueCollector(outbox, dispatcher))
    server, thread = start_http_server(port, addr=host, registry=registry)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
