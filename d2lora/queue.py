"""The wire between service and workers: names, Celery's settings for both sides, and publishing.

A message is a wake-up: it carries an initialization's ID and the version of its own form, nothing else. The database
decides what there is to do, so a lost or doubled message costs time only.
"""

from typing import Any, Self

from celery import Celery
from kombu.exceptions import OperationalError

from d2lora.errors import BrokerUnavailable
from d2lora.settings import BrokerSettings

TASK = "d2lora.work"
"""Name of the only task."""

MESSAGE_FORMAT = 1
"""Raised when a message's meaning changes; workers ignore those of a version that they do not know."""

KEY_PREFIX = "d2lora:"
"""Of all keys in Redis, so that one server can serve others as well."""


def celery_settings(broker: BrokerSettings, *, visibility_seconds: int) -> dict[str, Any]:
    """Return what both sides tell Celery; ``visibility_seconds`` must outlast any claim."""
    assert broker.url is not None
    return {
        "broker_url": broker.url.get_secret_value(),
        # With a result backend, publishing blocks for many seconds while Redis is down; states live in the database.
        "result_backend": None,
        "task_ignore_result": True,
        # No pickle: whoever can write to the broker must not be able to run code in a worker.
        "task_serializer": "json",
        "accept_content": ["json"],
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "broker_transport_options": {
            # After this time Redis hands an unacknowledged message out again; the lease, which is shorter, decides.
            "visibility_timeout": visibility_seconds,
            "global_keyprefix": KEY_PREFIX,
            "socket_keepalive": True,
            "socket_connect_timeout": 5,
            # A server that accepts and does not answer would block for ever. It must be longer than the poll of 1 s.
            "socket_timeout": 15,
            "retry_on_timeout": False,
        },
    }


class Publisher:
    """Publishes wake-ups; close it, or use it as a context manager."""

    def __init__(self, broker: BrokerSettings) -> None:
        self._app = Celery("d2lora", set_as_current=False)
        self._app.conf.update(celery_settings(broker, visibility_seconds=3600))
        # The outbox is our retry: a broker that is away should cost no more than a refused connection.
        self._app.conf.broker_transport_options |= {"max_retries": 1, "interval_start": 0, "interval_max": 0.1}
        self._connection = self._app.connection_for_write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection back."""
        self._connection.release()

    def publish(self, queue: str, initialization_id: str) -> None:
        """Send a wake-up.

        Raises:
            BrokerUnavailable: it may or may not have arrived.
        """
        try:
            self._app.send_task(
                TASK,
                kwargs={"initialization_id": initialization_id, "message_format": MESSAGE_FORMAT},
                queue=queue,
                connection=self._connection,
                retry=False,
                ignore_result=True,
            )
        except (OperationalError, OSError) as error:
            self._reconnect()
            raise BrokerUnavailable("the broker cannot be reached") from error

    def waiting(self, queue: str) -> int:
        """Return how many messages nobody has taken yet.

        Raises:
            BrokerUnavailable: it does not answer.
        """
        try:
            # Not passively: kombu 5.7 looks for the list without our prefix then, and finds none.
            declared = self._connection.default_channel.queue_declare(queue)
        except (OperationalError, OSError, *self._connection.connection_errors) as error:
            self._reconnect()
            raise BrokerUnavailable("the broker cannot be reached") from error
        return int(declared.message_count)

    def _reconnect(self) -> None:
        """Start with a fresh connection next time; what is left of this one may be waiting for an answer."""
        self._connection.release()
        self._connection = self._app.connection_for_write()
