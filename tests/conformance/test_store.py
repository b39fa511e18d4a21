import base64
import itertools
import secrets
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, event, select, update

import d2lora
from d2lora.claims import Standing
from d2lora.database import migrate
from d2lora.errors import Conflict, IdempotencyMismatch, NotFound, NumericalFailure, RequestInvalid, StoreUnavailable
from d2lora.initializations import (
    Dpo,
    HeldOut,
    InitializationSpec,
    Mean,
    Orpo,
    Phase,
    Progress,
    Result,
    ResultSummary,
    State,
    UpGrad,
)
from d2lora.methods import Gaussian, Kaiming, Warmup
from d2lora.roles import FIELDS, Role, with_dataset_ids
from d2lora.settings import DatabaseSettings
from d2lora.store import Store, _digest
from d2lora.tables import InitializationRow, Table
from tests.conformance.conftest import add_dataset

LEASE = timedelta(seconds=60)
OVER = timedelta(seconds=-1)
PROBLEM = NumericalFailure("a layer is not finite").problem()
RESULT = Result(
    files=[],
    summary=ResultSummary(
        start="zero",
        start_reason="because",
        objectives=["sft"],
        objectives_reason="r",
        weights={"sft": 1.0},
        cosines={},
        held_out={"sft": HeldOut(base=1, adapter=1, rows=1)},
        rows_used=1,
        rows_truncated=0,
        rows_dropped=0,
        fingerprint="f",
    ),
)


def claim(store, *, lease=LEASE, max_attempts=3, worker="w"):
    return store.leases.claim(worker, lease=lease, max_attempts=max_attempts)


def state_of(store, job):
    return store.get("acme", job.id).state


def types_of(store, job):
    return [event.type for event in store.events("acme", job.id)]


def test_a_new_job_is_queued_with_its_first_event(store, spec):
    job, new = store.create("acme", spec)

    assert new
    assert (job.state, job.attempt, job.spec) == (State.QUEUED, 0, spec)
    assert types_of(store, job) == ["queued"]
    assert store.get("acme", job.id) == job


def test_a_job_of_an_unknown_dataset_is_not_made(store):
    with pytest.raises(NotFound):
        store.create("acme", InitializationSpec(base_model="m", dataset_id="ds_none"))

    assert store.page("acme", limit=10) == ([], None)


def naming(spec, field, dataset_id):
    """The request with another dataset at a field, also one inside an object."""
    fields = spec.model_dump(exclude_unset=True)
    if field.startswith("method."):
        fields["method"] = field.removeprefix("method.").removesuffix("_dataset_id")
    role = next(role for role, path in FIELDS.items() if path == field)
    return InitializationSpec.model_validate(with_dataset_ids(fields, {role: dataset_id}))


@pytest.mark.parametrize("field", FIELDS.values())
def test_a_job_with_another_dataset_that_is_unknown_or_foreign_is_not_made(store, spec, field):
    add_dataset(store, tenant="other", dataset_id="ds_2")

    for dataset_id in ("ds_none", "ds_2"):
        with pytest.raises(NotFound, match=dataset_id):
            store.create("acme", naming(spec, field, dataset_id))

    assert store.page("acme", limit=10) == ([], None)


@pytest.mark.parametrize("role", Role)
def test_a_claim_carries_every_other_dataset_by_its_role(store, spec, role):
    add_dataset(store, dataset_id="ds_2", content=b"more rows")
    store.create("acme", naming(spec, FIELDS[role], "ds_2"))

    held = claim(store)

    assert [one.key for one in held.datasets] == ["t/acme/datasets/ds_1"]
    assert {role: (one.key, one.dataset.id) for role, one in held.extras.items()} == {
        role: ("t/acme/datasets/ds_2", "ds_2")
    }


def test_a_claim_carries_all_datasets_that_the_adapter_is_made_from_in_order(store, spec):
    add_dataset(store, dataset_id="ds_2", content=b"more rows")
    add_dataset(store, tenant="other", dataset_id="ds_3")

    def naming_all(*ids, **more):
        datasets = [{"dataset_id": dataset_id, **more} for dataset_id in ids]
        return InitializationSpec.model_validate({"base_model": "m", "datasets": datasets})

    for unknown in ("ds_none", "ds_3"):
        with pytest.raises(NotFound, match=unknown):
            store.create("acme", naming_all("ds_1", unknown))
        with pytest.raises(NotFound, match=unknown):
            store.create("acme", naming_all("ds_1", "ds_2", eval_dataset_id=unknown))
    store.create("acme", naming_all("ds_2", "ds_1", eval_dataset_id="ds_1"))

    held = claim(store)

    assert [one.key for one in held.datasets] == ["t/acme/datasets/ds_2", "t/acme/datasets/ds_1"]
    assert held.spec == naming_all("ds_2", "ds_1", eval_dataset_id="ds_1")
    assert {index: one.key for index, one in held.evaluations.items()} == dict.fromkeys((0, 1), "t/acme/datasets/ds_1")


def test_a_claim_runs_the_oldest_job_and_carries_what_it_needs(store, spec):
    first, _ = store.create("acme", spec)
    store.create("acme", spec)

    held = claim(store)

    assert (held.id, held.attempt, held.spec) == (first.id, 1, spec)
    assert [one.key for one in held.datasets] == ["t/acme/datasets/ds_1"]
    job = store.get("acme", first.id)
    assert (job.state, job.attempt) == (State.RUNNING, 1)
    assert job.started_at is not None


def test_a_held_job_cannot_be_claimed_and_none_is_none(store, spec):
    store.create("acme", spec)

    assert claim(store) is not None
    assert claim(store) is None


def test_a_job_can_be_claimed_by_its_id(store, spec):
    store.create("acme", spec)
    second, _ = store.create("acme", spec)

    held = store.leases.claim("w", lease=LEASE, max_attempts=3, initialization_id=second.id)

    assert held.id == second.id
    assert store.leases.claim("w", lease=LEASE, max_attempts=3, initialization_id=second.id) is None


def test_racing_workers_claim_each_job_once(database, store, spec):
    jobs = {store.create("acme", spec)[0].id for _ in range(20)}
    claimed, errors = [], []

    def work():
        try:
            with Store(database) as own:
                while held := claim(own):
                    claimed.append(held.id)
        except Exception as error:  # a thread's own failure would go unseen
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not errors
    assert sorted(claimed) == sorted(jobs)


def test_a_job_whose_lease_is_over_is_claimed_again_with_the_next_attempt(store, spec):
    store.create("acme", spec)
    first = claim(store, lease=OVER)

    second = claim(store)

    assert (second.id, second.attempt) == (first.id, 2)


@pytest.mark.parametrize("verb", ["renew", "succeed", "fail", "cancelled", "hand_back", "retry"])
def test_an_attempt_that_was_given_up_on_changes_nothing(store, spec, verb):
    job, _ = store.create("acme", spec)
    old = claim(store, lease=OVER)
    claim(store)
    before = store.get("acme", job.id)

    outcome = {
        "renew": lambda: store.leases.renew(old, lease=LEASE, progress=Progress(phase=Phase.FACTORS, done=1, total=2)),
        "succeed": lambda: store.leases.succeed(old, RESULT, "prefix"),
        "fail": lambda: store.leases.fail(old, PROBLEM),
        "cancelled": lambda: store.leases.cancelled(old),
        "hand_back": lambda: store.leases.hand_back(old),
        "retry": lambda: store.leases.retry(old, PROBLEM, max_attempts=3, pause=LEASE),
    }[verb]()

    assert outcome in {False, Standing.LOST}
    assert store.get("acme", job.id) == before


def test_a_renewed_lease_holds_and_shows_progress(store, spec):
    job, _ = store.create("acme", spec)
    held = claim(store, lease=timedelta(seconds=0.3))
    progress = Progress(phase=Phase.STATISTICS, done=3, total=10, seconds_left=1.5)

    standing = store.leases.renew(held, lease=LEASE, progress=progress)
    time.sleep(0.4)

    assert standing is Standing.HELD
    assert claim(store) is None
    assert store.get("acme", job.id).progress == progress


def test_success_leaves_a_result_and_nothing_else_can_follow(store, spec):
    job, _ = store.create("acme", spec)
    held = claim(store)

    assert store.leases.succeed(held, RESULT, "prefix/")

    job = store.get("acme", job.id)
    assert (job.state, job.result, job.progress) == (State.SUCCEEDED, RESULT, None)
    assert job.succeeded_at is not None
    assert store.files_prefix("acme", job.id) == "prefix/"
    assert not store.leases.succeed(held, RESULT, "other/")
    assert not store.leases.fail(held, PROBLEM)
    assert claim(store) is None
    assert types_of(store, job) == ["queued", "running", "succeeded"]


def test_failure_leaves_its_problem(store, spec):
    job, _ = store.create("acme", spec)

    assert store.leases.fail(claim(store), PROBLEM)

    job = store.get("acme", job.id)
    assert (job.state, job.error) == (State.FAILED, PROBLEM)
    with pytest.raises(Conflict, match="failed"):
        store.files_prefix("acme", job.id)


def test_a_job_whose_workers_keep_dying_fails_and_says_so(store, spec):
    job, _ = store.create("acme", spec)
    for attempt in (1, 2, 3):
        assert claim(store, lease=OVER, max_attempts=3).attempt == attempt

    assert claim(store, max_attempts=3) is None

    job = store.get("acme", job.id)
    assert (job.state, job.error.code) == (State.FAILED, "worker_lost")


def test_work_that_is_handed_back_is_free_at_once_and_no_failure(store, spec):
    store.create("acme", spec)
    for attempt in range(1, 6):
        held = claim(store, max_attempts=2)
        assert held.attempt == attempt
        assert store.leases.hand_back(held)


def test_a_retry_waits_and_is_bounded(store, spec):
    job, _ = store.create("acme", spec)

    assert store.leases.retry(claim(store), PROBLEM, max_attempts=2, pause=timedelta(seconds=0.3))
    assert state_of(store, job) is State.QUEUED
    assert claim(store) is None
    time.sleep(0.4)
    assert store.leases.retry(claim(store), PROBLEM, max_attempts=2, pause=LEASE)

    assert (state_of(store, job), store.get("acme", job.id).error) == (State.FAILED, PROBLEM)


def test_a_queued_job_is_cancelled_at_once(store, spec):
    job, _ = store.create("acme", spec)

    assert store.cancel("acme", job.id).state is State.CANCELLED
    assert store.cancel("acme", job.id).state is State.CANCELLED
    assert claim(store) is None


def test_a_running_job_is_asked_to_stop_and_then_is_cancelled(store, spec):
    job, _ = store.create("acme", spec)
    held = claim(store)

    assert store.cancel("acme", job.id).state is State.CANCELLING
    assert store.leases.renew(held, lease=LEASE, progress=None) is Standing.CANCELLING
    assert store.leases.cancelled(held)

    assert types_of(store, job) == ["queued", "running", "cancelling", "cancelled"]


def test_a_result_that_comes_after_the_wish_to_cancel_is_dropped(store, spec):
    job, _ = store.create("acme", spec)
    held = claim(store)
    store.cancel("acme", job.id)

    assert not store.leases.succeed(held, RESULT, "prefix/")

    assert (state_of(store, job), store.get("acme", job.id).result) == (State.CANCELLED, None)


def test_a_cancelling_job_whose_worker_died_is_cancelled_by_the_next_claim(store, spec):
    job, _ = store.create("acme", spec)
    claim(store, lease=OVER)
    store.cancel("acme", job.id)

    assert claim(store) is None
    assert state_of(store, job) is State.CANCELLED


@pytest.mark.parametrize(
    "settle", [lambda s, c: s.leases.succeed(c, RESULT, "p"), lambda s, c: s.leases.fail(c, PROBLEM)]
)
def test_a_job_that_has_ended_cannot_be_cancelled(store, spec, settle):
    job, _ = store.create("acme", spec)
    settle(store, claim(store))

    with pytest.raises(Conflict):
        store.cancel("acme", job.id)


def test_the_same_key_and_request_make_one_job(store, spec):
    first, new = store.create("acme", spec, idempotency_key="k")
    second, again = store.create("acme", spec, idempotency_key="k")

    assert (new, again) == (True, False)
    assert first.id == second.id
    assert store.create("acme", spec, idempotency_key="other")[0].id != first.id


def test_a_key_with_another_request_is_refused(store, spec):
    store.create("acme", spec, idempotency_key="k")

    with pytest.raises(IdempotencyMismatch):
        store.create("acme", spec.model_copy(update={"seed": 1}), idempotency_key="k")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"objectives": [Dpo()]}, {"objectives": [Orpo()]}),
        ({"combination": UpGrad()}, {"combination": Mean()}),
        ({"method": Kaiming()}, {"method": Gaussian()}),
    ],
)
def test_requests_that_differ_in_the_kind_of_an_object_alone_are_different(store, spec, one, other):
    store.create("acme", spec.model_copy(update=one), idempotency_key="k")

    with pytest.raises(IdempotencyMismatch):
        store.create("acme", spec.model_copy(update=other), idempotency_key="k")
    assert not store.create("acme", spec.model_copy(update=one), idempotency_key="k")[1]


def test_a_stored_request_leaves_out_the_options_that_are_off(store, spec):
    job, _ = store.create("acme", spec)

    with store._engine.connect() as connection:
        stored = connection.execute(
            select(InitializationRow.__table__.c.spec).where(InitializationRow.__table__.c.id == job.id)
        ).scalar_one()
    # A worker of an earlier version would refuse the job for a field that it does not know.
    off = {"rounds", "whitening", "retain_dataset_id", "second_pass_above", "datasets", "keep_statistics"}
    assert off.isdisjoint(stored)
    assert InitializationSpec.model_validate(stored) == spec


@pytest.mark.parametrize(
    ("method", "direction", "scale"),
    [
        ("gradient", "gradient", "rows"),
        (Kaiming(), "orthogonalized", "outputs"),
        (Warmup.model_validate({"warmup_dataset_id": "ds_1", "from": "gradient"}), "gradient", "rows"),
    ],
)
def test_a_request_of_the_time_before_a_field_means_what_was_done_then(store, spec, method, direction, scale):
    """Methods that do not read a field keep its default: a request that named it could not be read."""
    asked = InitializationSpec(**spec.model_dump(include={"base_model", "dataset_id"}), method=method)
    job, _ = store.create("acme", asked)
    with store._engine.begin() as connection:
        stored = connection.execute(select(InitializationRow.spec)).scalar_one()
        assert ("direction" in stored) == (direction == "gradient")
        assert ("lora_a_scale" in stored) == (scale == "rows")
        old = {name: value for name, value in stored.items() if name not in {"direction", "lora_a_scale"}}
        connection.execute(update(InitializationRow).values(spec=old))

    shown = [store.get("acme", job.id), *store.page("acme", limit=10)[0], claim(store)]
    assert [(one.spec.direction, one.spec.lora_a_scale) for one in shown] == [(direction, scale)] * 3


@pytest.mark.parametrize("more", [{}, {"retain_dataset_id": "ds_1"}])
def test_a_request_is_the_same_whether_it_names_the_direction_that_it_would_get_or_not(store, spec, more):
    plain = InitializationSpec(**spec.model_dump(include={"base_model", "dataset_id"}), **more)
    named = InitializationSpec(**plain.model_dump(include={"base_model", "dataset_id", "direction"}), **more)
    job, _ = store.create("acme", plain, idempotency_key="k")

    assert store.create("acme", named, idempotency_key="k") == (job, False)
    if not more:
        with pytest.raises(IdempotencyMismatch):
            store.create("acme", named.model_copy(update={"direction": "gradient"}), idempotency_key="k")


@pytest.mark.parametrize(
    ("more", "digest"),
    [
        ({}, "650f86aa7b7067a010a5711493b051267d48e28ddd3689ab265f727ecc913618"),
        ({"retain_dataset_id": "ds_2"}, "ab6ec0470e333715d7a602d869107b836a68c223fe1d753b5e927b06adb02cff"),
    ],
)
def test_a_key_from_before_there_was_a_direction_still_finds_its_job(more, digest):
    """These are what the version without that field has stored for these requests."""
    assert _digest(InitializationSpec(base_model="some/model", dataset_id="ds_1", **more)) == digest


def test_racing_requests_with_one_key_make_one_job(database, store, spec):
    made, errors = set(), []

    def submit():
        try:
            with Store(database) as own:
                made.add(own.create("acme", spec, idempotency_key="k")[0].id)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=submit) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not errors
    assert len(made) == 1


def test_keys_belong_to_their_tenant(store, spec):
    add_dataset(store, tenant="other", dataset_id="ds_2")
    first, _ = store.create("acme", spec, idempotency_key="k")

    second, new = store.create("other", spec.model_copy(update={"dataset_id": "ds_2"}), idempotency_key="k")

    assert new
    assert first.id != second.id


def test_another_tenants_things_do_not_exist(store, spec):
    job, _ = store.create("acme", spec)

    for verb in (
        lambda: store.get("other", job.id),
        lambda: store.cancel("other", job.id),
        lambda: store.events("other", job.id),
        lambda: store.files_prefix("other", job.id),
        lambda: store.dataset("other", "ds_1"),
        lambda: store.create("other", spec),
    ):
        with pytest.raises(NotFound):
            verb()
    assert store.page("other", limit=5) == ([], None)
    assert store.datasets("other", limit=5) == ([], None)


def test_pages_cover_everything_once_also_while_jobs_are_added(store, spec):
    jobs = [store.create("acme", spec)[0].id for _ in range(7)]
    seen, cursor = [], None

    for _ in itertools.count():
        page, cursor = store.page("acme", limit=3, cursor=cursor)
        seen += [job.id for job in page]
        store.create("acme", spec)
        if cursor is None:
            break

    assert seen == jobs[::-1]


def test_pages_can_be_of_one_state(store, spec):
    store.create("acme", spec)
    second, _ = store.create("acme", spec)
    store.cancel("acme", second.id)

    page, _ = store.page("acme", limit=5, state=State.CANCELLED)

    assert [job.id for job in page] == [second.id]


def test_a_cursor_of_somebody_elses_making_is_refused(store):
    with pytest.raises(RequestInvalid, match="cursor"):
        store.page("acme", limit=5, cursor="bm90IGEgY3Vyc29y")


def test_events_are_numbered_and_can_be_continued(store, spec):
    job, _ = store.create("acme", spec)
    store.leases.fail(claim(store), PROBLEM)

    events = store.events("acme", job.id)

    assert [event.seq for event in events] == [1, 2, 3]
    assert events[-1].data["error"]["code"] == "numerical_failure"
    assert store.events("acme", job.id, after=2) == events[2:]


def test_a_transaction_that_breaks_leaves_no_trace(store, spec, monkeypatch):
    job, _ = store.create("acme", spec)
    held = claim(store)

    def broken(*_arguments):
        raise RuntimeError

    monkeypatch.setattr("d2lora.transitions.add_event", broken)
    with pytest.raises(RuntimeError):
        store.leases.succeed(held, RESULT, "prefix/")
    monkeypatch.undo()

    assert state_of(store, job) is State.RUNNING
    assert types_of(store, job) == ["queued", "running"]


@pytest.mark.parametrize(("before", "after"), list(itertools.product(State, State)))
def test_only_legal_moves_are_possible(before, after):
    legal = {
        ("queued", "running"),
        ("queued", "cancelled"),
        ("queued", "failed"),
        ("running", "running"),
        ("running", "queued"),
        ("running", "cancelling"),
        ("running", "succeeded"),
        ("running", "failed"),
        ("cancelling", "cancelled"),
        ("succeeded", "expired"),
    }

    assert before.can_become(after) is ((before.value, after.value) in legal)


def test_the_migrations_make_the_tables_that_the_store_uses(store):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with store._engine.connect() as connection:
        difference = compare_metadata(MigrationContext.configure(connection), Table.metadata)

    assert difference == []


def test_saying_a_success_again_is_no_error_and_another_attempts_is(store, spec):
    """A commit that broke off may have happened: who says it again must not take its own files for leftovers."""
    store.create("acme", spec)
    late = claim(store, lease=OVER)
    held = claim(store)
    assert store.leases.succeed(held, RESULT, "prefix-2/")

    assert store.leases.succeed(held, RESULT, "prefix-2/")
    assert not store.leases.succeed(late, RESULT, "prefix-1/")


def test_a_database_that_is_away_is_said_to_be():
    with pytest.raises(StoreUnavailable), Store(DatabaseSettings(url="postgresql+psycopg://nobody@127.0.0.1:1/x")) as s:
        s.ping()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_database_that_is_in_use_is_upgraded_and_downgraded(kind, request, tmp_path):
    url = f"sqlite:///{tmp_path / 'old.db'}"
    if kind == "postgresql":
        url = request.getfixturevalue("postgresql").create_database(f"old_{secrets.token_hex(6)}")
    engine = create_engine(url)
    if kind == "sqlite":

        @event.listens_for(engine, "connect")
        def enforce(connection, _):
            connection.execute("PRAGMA foreign_keys=ON")

    def step(verb, revision):
        config = Config()
        config.set_main_option("script_location", str(Path(d2lora.__file__).parent / "migrations"))
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            verb(config, revision)

    step(command.upgrade, "0001")
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO initializations (id, tenant, state, spec, attempt, failures, created_at) VALUES"
            " ('init_1', 'acme', 'queued', '{\"base_model\": \"m\", \"dataset_id\": \"ds_1\"}', 0, 0,"
            " '2026-01-01 00:00:00')"
        )
        connection.exec_driver_sql(
            "INSERT INTO events (initialization_id, seq, at, type, data) VALUES"
            " ('init_1', 1, '2026-01-01 00:00:00', 'queued', '{}')"
        )

    step(command.upgrade, "head")
    with Store(DatabaseSettings(url=url)) as store:
        job = store.get("acme", "init_1")
        assert (job.state, len(store.events("acme", job.id))) == (State.QUEUED, 1)
    step(command.downgrade, "0001")

    with engine.begin() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM events").scalar() == 1
    engine.dispose()


def test_an_older_version_works_on_a_newer_database(database, store, spec):
    with store._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")

    migrate(database)

    assert store.create("acme", spec)[1]


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)  # SQLite has no locks on rows
def test_a_job_that_somebody_holds_locked_is_waited_for_ten_seconds(database, store, spec):
    job, _ = store.create("acme", spec)
    with store._engine.begin() as connection:
        connection.exec_driver_sql(f"SELECT * FROM initializations WHERE id = '{job.id}' FOR UPDATE")

        started = time.monotonic()
        with pytest.raises(StoreUnavailable):
            store.cancel("acme", job.id)
        assert 5 < time.monotonic() - started < 25
        assert store.outbox.forgotten("cpu", waiting=0, silent_for=timedelta(0)) == 0  # it waits for nobody


def test_ids_and_cursors_that_no_database_can_hold_name_nothing(store, spec):
    job, _ = store.create("acme", spec)
    for ask in (store.dataset, store.delete_dataset, store.get, store.cancel, store.events, store.files_prefix):
        with pytest.raises(NotFound):
            ask("acme", f"{job.id}\0")

    now = job.created_at
    for written in (f"{now} init", f"{now.isoformat()} init\0", "0001-01-01T00:00:00+23:59 init", "2026-01-01 init"):
        cursor = base64.urlsafe_b64encode(written.encode()).decode()
        with pytest.raises(RequestInvalid, match="cursor"):
            store.page("acme", limit=1, cursor=cursor)
