import threading
import time
from datetime import timedelta

import pytest

from d2lora.database import migrate
from d2lora.errors import BrokerUnavailable, StorageUnavailable
from d2lora.initializations import InitializationSpec, State
from d2lora.settings import BrokerSettings, DatabaseSettings, DispatchSettings
from d2lora.storage import LocalStorage, dataset_key, initialization_prefix, shards_prefix
from d2lora.store import Store
from service.dispatch import Dispatcher, dispatching
from tests.conformance.conftest import add_dataset
from tests.conformance.test_store import LEASE, OVER, RESULT, state_of

FAST = DispatchSettings(publish_seconds=0.01, reconcile_seconds=0.01, leader_seconds=0.3, tidy_seconds=0.01)


class Broker:
    """Keeps messages in a list, and can be away."""

    def __init__(self):
        self.messages, self.is_away, self.closed = [], False, False

    def publish(self, queue, initialization_id):
        if self.is_away:
            raise BrokerUnavailable("away")
        self.messages.append((queue, initialization_id))

    def waiting(self, queue):
        if self.is_away:
            raise BrokerUnavailable("away")
        return sum(to == queue for to, _ in self.messages)

    def close(self):
        self.closed = True


@pytest.fixture
def store(tmp_path):
    settings = DatabaseSettings(url=f"sqlite:///{tmp_path / 'd2lora.db'}")
    migrate(settings)
    with Store(settings) as store:
        yield store


@pytest.fixture
def spec(store):
    add_dataset(store)
    return InitializationSpec(base_model="some/model", dataset_id="ds_1")


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path / "objects")


@pytest.fixture
def broker():
    return Broker()


@pytest.fixture
def dispatcher(store, storage, broker):
    return Dispatcher(store.outbox, storage, broker, FAST)


def keys(storage):
    return {str(path.relative_to(storage._root)) for path in storage._root.rglob("*") if path.is_file()}


def put(storage, tmp_path, key):
    path = tmp_path / "file"
    path.write_bytes(b"x")
    storage.put_file(key, path, "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881")


def take(store, lease=LEASE):
    return store.leases.claim("w", lease=lease, max_attempts=3)


def test_wake_ups_reach_the_broker_once(store, spec, dispatcher, broker):
    job, _ = store.create("acme", spec, queue="gpu-small")

    assert dispatcher.publish() == 1
    assert dispatcher.publish() == 0

    assert broker.messages == [("gpu-small", job.id)]


def test_wake_ups_stay_while_the_broker_is_away(store, spec, dispatcher, broker):
    job, _ = store.create("acme", spec)
    broker.is_away = True
    with pytest.raises(BrokerUnavailable):
        dispatcher.publish()

    broker.is_away = False

    assert dispatcher.publish() == 1
    assert broker.messages == [("cpu", job.id)]


def test_what_was_published_before_the_broker_went_away_is_not_published_again(store, spec, dispatcher, broker):
    jobs = [store.create("acme", spec)[0].id for _ in range(3)]
    publish = broker.publish

    def twice(queue, initialization_id):
        broker.is_away = len(broker.messages) == 2
        publish(queue, initialization_id)

    broker.publish = twice
    with pytest.raises(BrokerUnavailable):
        dispatcher.publish()
    broker.publish, broker.is_away = publish, False
    dispatcher.publish()

    assert [initialization for _, initialization in broker.messages] == jobs


def test_a_broker_that_was_emptied_is_told_again(store, spec, dispatcher, broker):
    job, _ = store.create("acme", spec)
    dispatcher.publish()
    broker.messages.clear()
    time.sleep(0.05)

    dispatcher.reconcile()
    dispatcher.publish()

    assert broker.messages == [("cpu", job.id)]


def test_without_a_broker_the_outbox_stays_empty(store, spec, storage):
    store.create("acme", spec)
    dispatcher = Dispatcher(store.outbox, storage, None, FAST)

    dispatcher.publish()
    dispatcher.reconcile()

    assert store.outbox.due() == []


def test_after_a_jobs_end_only_its_result_stays(store, spec, storage, tmp_path, dispatcher):
    job, _ = store.create("acme", spec)
    take(store, OVER)
    held = take(store)
    result = initialization_prefix("acme", job.id, 2)
    put(storage, tmp_path, initialization_prefix("acme", job.id, 1) + "adapter.safetensors")
    put(storage, tmp_path, result + "manifest.json")
    put(storage, tmp_path, shards_prefix("acme", job.id) + "split-1/rows-0.safetensors")
    dispatcher.tidy()
    assert len(keys(storage)) == 3  # it runs

    store.leases.succeed(held, RESULT, result)
    time.sleep(0.05)
    dispatcher.tidy()

    assert keys(storage) == {result + "manifest.json"}


def test_a_storage_that_is_away_is_tidied_later(store, spec, storage, tmp_path, broker):
    job, _ = store.create("acme", spec)
    put(storage, tmp_path, shards_prefix("acme", job.id) + "split-1/rows-0.safetensors")
    store.cancel("acme", job.id)
    time.sleep(0.05)

    class Away(LocalStorage):
        def delete_prefix(self, prefix):
            raise StorageUnavailable("away")

    Dispatcher(store.outbox, Away(storage._root), broker, FAST).tidy()
    assert len(keys(storage)) == 1
    Dispatcher(store.outbox, storage, broker, FAST).tidy()

    assert keys(storage) == set()


def test_old_results_are_removed_when_retention_is_set(store, spec, storage, tmp_path, broker):
    job, _ = store.create("acme", spec)
    result = initialization_prefix("acme", job.id, 1)
    put(storage, tmp_path, result + "manifest.json")
    store.leases.succeed(take(store), RESULT, result)
    dispatcher = Dispatcher(store.outbox, storage, broker, FAST.model_copy(update={"retention_days": 1e-9}))

    dispatcher.tidy()

    assert state_of(store, job) is State.EXPIRED
    assert keys(storage) == set()


def test_a_running_dispatcher_leads_publishes_and_resigns(store, spec, storage, dispatcher, broker):
    stop = threading.Event()
    thread = threading.Thread(target=dispatcher.run, args=(stop,))
    thread.start()
    job, _ = store.create("acme", spec)
    deadline = time.monotonic() + 10
    while not broker.messages and time.monotonic() < deadline:
        time.sleep(0.01)

    assert dispatcher.leads
    assert not store.outbox.lead("other", lease=LEASE)
    stop.set()
    thread.join(10)

    assert broker.messages == [("cpu", job.id)]
    assert store.outbox.lead("other", lease=LEASE)


def test_a_replica_that_does_not_lead_does_nothing(store, spec, storage, dispatcher, broker):
    store.outbox.lead("other", lease=timedelta(seconds=60))
    store.create("acme", spec)
    stop = threading.Event()
    thread = threading.Thread(target=dispatcher.run, args=(stop,))
    thread.start()
    time.sleep(0.2)
    stop.set()
    thread.join(10)

    assert broker.messages == []
    assert len(store.outbox.due()) == 1


def test_a_dispatcher_survives_a_broker_that_is_away(store, spec, storage, dispatcher, broker, caplog):
    broker.is_away = True
    store.create("acme", spec)
    stop = threading.Event()
    thread = threading.Thread(target=dispatcher.run, args=(stop,))
    thread.start()
    time.sleep(0.3)
    broker.is_away = False
    deadline = time.monotonic() + 10
    while not broker.messages and time.monotonic() < deadline:
        time.sleep(0.01)
    stop.set()
    thread.join(10)

    assert len(broker.messages) == 1
    assert [record.message for record in caplog.records].count("broker_unavailable") == 1


def test_dispatching_ends_with_its_block(store, storage):
    with dispatching(store.outbox, storage, BrokerSettings(), FAST) as dispatcher:
        deadline = time.monotonic() + 10
        while not dispatcher.leads and time.monotonic() < deadline:
            time.sleep(0.01)

    assert store.outbox.lead("other", lease=LEASE)
    assert "dispatcher" not in [thread.name for thread in threading.enumerate()]


def test_files_that_cannot_be_removed_leave_the_others_to_be_tidied(store, spec, storage, tmp_path, broker):
    stuck, other = (store.create("acme", spec)[0] for _ in range(2))
    for job in (stuck, other):
        put(storage, tmp_path, shards_prefix("acme", job.id) + "split-1/rows-0.safetensors")
        store.cancel("acme", job.id)
    time.sleep(0.05)

    class Stubborn(LocalStorage):
        def delete_prefix(self, prefix):
            if stuck.id in prefix:
                raise StorageUnavailable("kept")
            super().delete_prefix(prefix)

    Dispatcher(store.outbox, Stubborn(storage._root), broker, FAST).tidy()

    assert [stuck.id in key for key in keys(storage)] == [True]


def test_a_dataset_that_cannot_be_removed_leaves_the_others_to_be_removed(store, storage, tmp_path, broker):
    for name in ("ds_2", "ds_3"):
        add_dataset(store, dataset_id=name)
        put(storage, tmp_path, dataset_key("acme", name))
        store.delete_dataset("acme", name)

    class Stubborn(LocalStorage):
        def delete_prefix(self, prefix):
            if "ds_2" in prefix:
                raise StorageUnavailable("kept")
            super().delete_prefix(prefix)

    Dispatcher(store.outbox, Stubborn(storage._root), broker, FAST).tidy()

    assert keys(storage) == {dataset_key("acme", "ds_2")}
    assert [one.id for one in store.outbox.deleted_datasets()] == ["ds_2"]


def test_while_the_broker_is_away_a_cancelled_job_ends_whose_worker_has_died(store, spec, dispatcher, broker):
    broker.is_away = True
    job, _ = store.create("acme", spec)
    take(store, lease=OVER)
    store.cancel("acme", job.id)
    stop = threading.Event()
    thread = threading.Thread(target=dispatcher.run, args=(stop,))
    thread.start()
    end = time.monotonic() + 5
    while state_of(store, job) is not State.CANCELLED and time.monotonic() < end:
        time.sleep(0.01)
    stop.set()
    thread.join()

    assert state_of(store, job) is State.CANCELLED
    assert len(store.outbox.due()) == 1
