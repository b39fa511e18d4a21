"""Datasets whose bytes are on their way."""

from datetime import timedelta

import pytest
from sqlalchemy.exc import IntegrityError

from d2lora.errors import NotFound
from d2lora.initializations import InitializationSpec
from tests.conformance.conftest import add_dataset, describe_dataset

KEY = "t/acme/datasets/ds_1"
OVER = timedelta(seconds=-1)


@pytest.fixture
def dataset():
    return describe_dataset("ds_1")


def test_a_dataset_that_is_announced_is_not_seen_and_stays(store, dataset):
    store.announce_dataset("acme", dataset, KEY)

    assert store.datasets("acme", limit=10) == ([], None)
    for verb in (store.dataset, store.delete_dataset):
        with pytest.raises(NotFound, match="ds_1"):
            verb("acme", "ds_1")
    with pytest.raises(NotFound, match="ds_1"):
        store.create("acme", InitializationSpec(base_model="m", dataset_id="ds_1"))
    assert store.outbox.deleted_datasets() == []


def test_a_dataset_that_was_announced_and_added_is_as_any_other(store, dataset):
    store.announce_dataset("acme", dataset, KEY)
    store.add_dataset("acme", dataset, KEY)

    assert store.datasets("acme", limit=10) == ([dataset], None)
    assert store.dataset("acme", "ds_1").key == KEY
    assert store.outbox.deleted_datasets() == []
    store.delete_dataset("acme", "ds_1")
    assert [one.key for one in store.outbox.deleted_datasets()] == [KEY]


def test_a_dataset_that_is_not_added_in_time_is_removed(store, dataset):
    add_dataset(store, dataset_id="ds_2")
    store.announce_dataset("acme", dataset, KEY, within=OVER)

    (left,) = store.outbox.deleted_datasets()
    assert (left.id, left.key) == ("ds_1", KEY)
    store.outbox.forget(left)

    assert store.outbox.deleted_datasets() == []
    assert [one.id for one in store.datasets("acme", limit=10)[0]] == ["ds_2"]


def test_a_dataset_that_was_added_at_the_last_moment_is_not_forgotten(store, dataset):
    store.announce_dataset("acme", dataset, KEY, within=OVER)
    (left,) = store.outbox.deleted_datasets()
    store.add_dataset("acme", dataset, KEY)

    store.outbox.forget(left)

    assert store.dataset("acme", "ds_1").dataset == dataset


def test_a_dataset_that_is_announced_cannot_be_forgotten(store, dataset):
    store.announce_dataset("acme", dataset, KEY, within=OVER)
    (left,) = store.outbox.deleted_datasets()
    store.outbox.forget(left)
    store.announce_dataset("acme", dataset, KEY)

    store.outbox.forget(left)

    with pytest.raises(IntegrityError):
        store.announce_dataset("acme", dataset, KEY)


@pytest.mark.parametrize("added", [False, True])
def test_a_dataset_that_is_withdrawn_counts_as_deleted_at_once(store, dataset, added):
    store.announce_dataset("acme", dataset, KEY)
    if added:
        store.add_dataset("acme", dataset, KEY)

    store.withdraw_dataset("ds_1")
    store.withdraw_dataset("ds_none")

    assert store.datasets("acme", limit=10) == ([], None)
    assert [one.key for one in store.outbox.deleted_datasets()] == [KEY]
