"""Statistics that a job keeps, and what is deleted with a dataset."""

from contextlib import suppress
from datetime import timedelta

import pytest

import d2lora.store
from d2lora.claims import StoredFile, StoredStatistics
from d2lora.errors import Conflict, NotFound
from d2lora.initializations import InitializationSpec
from d2lora.kept_statistics import KeptStatistics
from d2lora.states import State
from tests.conformance.conftest import add_dataset
from tests.conformance.test_store import LEASE, RESULT, claim, state_of

DIGEST = "0" * 64
SOON = timedelta(seconds=0)


def statistics_below(prefix):
    file = StoredFile(name="index.json", key=f"{prefix}statistics/index.json", sha256=DIGEST)
    return StoredStatistics(r=4, rows=9, size=123, files=[file])


@pytest.fixture
def kept(store, spec):
    """A job that has succeeded and keeps its statistics."""
    job, _ = store.create("acme", spec.model_copy(update={"keep_statistics": True}))
    assert store.leases.succeed(claim(store), RESULT, "prefix/", statistics_below("prefix/"))
    for leftover in store.outbox.leftovers(settled_for=SOON):
        store.outbox.cleaned(leftover)
    return store.get("acme", job.id)


def based_on(job, dataset_id="ds_1"):
    return InitializationSpec(base_model="some/model", dataset_id=dataset_id, based_on=job.id)


def test_what_is_kept_is_told_without_its_places_and_a_claim_has_those(store, kept):
    assert kept.statistics == KeptStatistics(r=4, rows=9, size=123)
    store.create("acme", based_on(kept))

    assert claim(store).statistics == statistics_below("prefix/")


def test_a_job_that_keeps_nothing_has_none_and_its_stored_request_does_not_say_so(store, spec):
    job, _ = store.create("acme", spec)
    held = claim(store)
    store.leases.succeed(held, RESULT, "prefix/")

    assert store.get("acme", job.id).statistics is None
    assert held.statistics is None
    with store._engine.connect() as connection:
        stored = connection.exec_driver_sql("SELECT spec FROM initializations").scalar_one()
    assert "keep_statistics" not in str(stored)
    assert "based_on" not in str(stored)


def test_another_tenants_statistics_are_not_handed_out(store, kept):
    add_dataset(store, tenant="other", dataset_id="ds_2")
    store.create("other", based_on(kept, "ds_2"))

    assert claim(store).statistics is None


def test_a_deleted_dataset_is_gone_and_so_are_the_statistics_of_it(store, kept):
    store.delete_dataset("acme", "ds_1")

    assert store.datasets("acme", limit=10) == ([], None)
    for verb in (store.dataset, store.delete_dataset):
        with pytest.raises(NotFound, match="ds_1"):
            verb("acme", "ds_1")
    with pytest.raises(NotFound, match="ds_1"):
        store.create("acme", based_on(kept))
    after = store.get("acme", kept.id)
    assert (after.state, after.result, after.statistics) == (State.SUCCEEDED, RESULT, None)


def test_a_request_that_is_based_on_deleted_statistics_gets_none(store, kept):
    add_dataset(store, dataset_id="ds_2")
    store.delete_dataset("acme", "ds_1")
    store.create("acme", based_on(kept, "ds_2"))

    assert claim(store).statistics is None


def test_deletion_leaves_leftovers_until_statistics_and_bytes_are_removed(store, kept):
    assert store.outbox.leftovers(settled_for=SOON) == []
    store.delete_dataset("acme", "ds_1")

    (leftover,) = store.outbox.leftovers(settled_for=SOON)
    assert (leftover.id, leftover.kept, leftover.keeps_statistics) == (kept.id, "prefix/", False)
    (dataset,) = store.outbox.deleted_datasets()
    assert (dataset.id, dataset.key) == ("ds_1", "t/acme/datasets/ds_1")
    store.outbox.cleaned(leftover)
    store.outbox.forget(dataset)

    assert store.outbox.leftovers(settled_for=SOON) == []
    assert store.outbox.deleted_datasets() == []


def test_statistics_that_were_deleted_while_a_job_was_tidied_are_tidied_again(store, spec):
    store.create("acme", spec.model_copy(update={"keep_statistics": True}))
    store.leases.succeed(claim(store), RESULT, "prefix/", statistics_below("prefix/"))
    (before,) = store.outbox.leftovers(settled_for=SOON)
    assert before.keeps_statistics
    store.delete_dataset("acme", "ds_1")

    store.outbox.cleaned(before)

    assert [one.keeps_statistics for one in store.outbox.leftovers(settled_for=SOON)] == [False]


def test_a_dataset_in_use_is_not_deleted_and_no_other_tenants_is(store, spec):
    job, _ = store.create("acme", spec)

    with pytest.raises(Conflict, match=job.id):
        store.delete_dataset("acme", "ds_1")
    with pytest.raises(NotFound):
        store.delete_dataset("other", "ds_1")
    store.cancel("acme", job.id)
    store.delete_dataset("acme", "ds_1")

    assert store.datasets("acme", limit=10) == ([], None)


@pytest.mark.parametrize(
    "fields",
    [
        {"eval_dataset_id": "ds_2"},
        {"method": {"type": "warmup", "warmup_dataset_id": "ds_2"}},
        {"dataset_id": None, "datasets": [{"dataset_id": "ds_1"}, {"dataset_id": "ds_2"}]},
    ],
    ids=["evaluation", "warmup", "datasets"],
)
def test_a_dataset_is_in_use_in_whichever_field_a_live_job_names_it(store, spec, fields):
    add_dataset(store, dataset_id="ds_2")
    plain = spec.model_dump(exclude_unset=True)
    store.create("acme", InitializationSpec.model_validate({**plain, **fields}))

    with pytest.raises(Conflict):
        store.delete_dataset("acme", "ds_2")


def test_a_label_that_equals_a_datasets_id_is_no_use_of_it(store, spec):
    add_dataset(store, dataset_id="ds_2")
    store.create("acme", spec.model_copy(update={"metadata": {"was": "ds_2"}}))

    store.delete_dataset("acme", "ds_2")


def test_a_dataset_whose_statistics_a_live_job_is_based_on_is_in_use(store, kept):
    add_dataset(store, dataset_id="ds_2")
    child, _ = store.create("acme", based_on(kept, "ds_2"))

    with pytest.raises(Conflict, match=child.id):
        store.delete_dataset("acme", "ds_1")
    assert store.get("acme", kept.id).statistics is not None


def test_statistics_expire_with_the_adapter(store, kept):
    store.outbox.expire(retention=SOON)

    assert state_of(store, kept) is State.EXPIRED
    assert store.get("acme", kept.id).statistics is None
    assert [one.kept for one in store.outbox.leftovers(settled_for=LEASE)] == [None]


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)  # SQLite has one writer at a time
def test_a_job_that_ends_while_its_dataset_is_deleted_keeps_no_statistics_of_it(store, kept, monkeypatch):
    job, _ = store.create("acme", kept.spec)
    held = claim(store)

    def succeed_meanwhile(*arguments):
        if state_of(store, job) is State.RUNNING:
            assert store.leases.succeed(held, RESULT, "other/", statistics_below("other/"))
        return mentions(*arguments)

    mentions = d2lora.store._mentions
    monkeypatch.setattr(d2lora.store, "_mentions", succeed_meanwhile)
    with suppress(Conflict):
        store.delete_dataset("acme", "ds_1")

    deleted = store.datasets("acme", limit=10)[0] == []
    keeping = [one.id for one in store.page("acme", limit=10)[0] if one.statistics is not None]
    assert (deleted, len(keeping)) in {(True, 0), (False, 2)}
