"""Wake-ups through a real server of Redis' protocol."""

import time

import pytest

from cluster import servers
from d2lora.errors import BrokerUnavailable
from d2lora.queue import KEY_PREFIX, Publisher
from d2lora.settings import BrokerSettings


@pytest.fixture
def valkey(tmp_path, guard):
    with servers.serving(servers.valkey(tmp_path / "valkey", guard)) as server:
        yield server


@pytest.fixture
def publisher(valkey):
    with Publisher(BrokerSettings(url=valkey.url())) as publisher:
        yield publisher


def test_a_queue_that_nobody_used_is_empty(publisher):
    assert publisher.waiting("cpu") == 0


def test_wake_ups_wait_in_their_queue(publisher):
    publisher.publish("cpu", "init_1")
    publisher.publish("cpu", "init_2")
    publisher.publish("gpu-small", "init_3")

    assert [publisher.waiting(queue) for queue in ("cpu", "gpu-small", "gpu-large")] == [2, 1, 0]


def test_a_message_carries_an_id_and_no_pickle_under_our_own_prefix(publisher, valkey):
    import json

    import redis

    publisher.publish("cpu", "init_1")

    with redis.Redis(port=valkey.port, password=valkey.password) as client:
        message = json.loads(client.lindex(f"{KEY_PREFIX}cpu", 0))
        assert all(key.startswith(KEY_PREFIX.encode()) for key in client.scan_iter())
    assert message["content-type"] == "application/json"
    assert "init_1" in message["headers"]["kwargsrepr"]
    assert len(json.dumps(message)) < 1500  # docs/operating.md counts on it


def test_a_server_that_is_away_is_said_to_be_and_used_again_when_it_is_back(publisher, valkey):
    publisher.publish("cpu", "init_1")
    valkey.process.kill()

    started = time.monotonic()
    with pytest.raises(BrokerUnavailable):
        publisher.publish("cpu", "init_2")
    with pytest.raises(BrokerUnavailable):
        publisher.waiting("cpu")
    assert time.monotonic() - started < 5

    valkey.start()
    publisher.publish("cpu", "init_3")
    assert publisher.waiting("cpu") >= 1  # the append-only file may have lost the last second


@pytest.mark.timeout(120)
def test_a_server_that_does_not_answer_is_given_up_on(publisher, valkey):
    publisher.publish("cpu", "init_1")
    valkey.process.pause()

    started = time.monotonic()
    try:
        with pytest.raises(BrokerUnavailable):
            publisher.publish("cpu", "init_2")
    finally:
        valkey.process.resume()

    assert time.monotonic() - started < 60
    assert publisher.waiting("cpu") >= 1
