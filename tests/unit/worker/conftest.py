"""Rows, examples, batches and objectives for the worker's tests, and a queue with one job."""

import dataclasses
import hashlib
import random
from datetime import UTC, datetime
from typing import get_args

import pytest
import torch

from d2lora.database import migrate
from d2lora.datasets import Dataset
from d2lora.initializations import Dpo, DpoLoss, InitializationSpec
from d2lora.settings import DatabaseSettings
from d2lora.storage import LocalStorage, dataset_key
from d2lora.store import Store
from tests.support.models import VOCABULARY
from tests.support.reference import ReferenceRow
from worker.batches import make_batches
from worker.data import Example, TokenSequence


def reference_rows(count: int, *, paired: bool, seed: int = 0, longest: int = 9) -> list[ReferenceRow]:
    source = random.Random(seed)
    draw = lambda: [source.randrange(3, VOCABULARY) for _ in range(source.randint(1, longest))]
    return [ReferenceRow(draw(), draw(), draw() if paired else None) for _ in range(count)]


def labeled_rows(count: int, *, seed: int = 0) -> list[ReferenceRow]:
    """About a third desirable, at least one of each label."""
    return [
        dataclasses.replace(row, desirable=index % 3 == 0)
        for index, row in enumerate(reference_rows(count, paired=False, seed=seed))
    ]


def as_examples(rows: list[ReferenceRow]) -> list[Example]:
    def sequence(prompt, completion):
        return TokenSequence(prompt + completion, [False] * len(prompt) + [True] * len(completion))

    return [
        Example(
            digest=f"{row.prompt}{row.chosen}{row.rejected}{row.desirable}",
            chosen=sequence(row.prompt, row.chosen),
            rejected=sequence(row.prompt, row.rejected) if row.rejected else None,
            desirable=row.desirable,
        )
        for row in rows
    ]


def one_fold(rows: list[ReferenceRow], *, max_tokens: int = 10_000):
    return make_batches(as_examples(rows), [0] * len(rows), max_tokens=max_tokens, pad_token_id=0)


def all_dpo_losses(*, beta: float) -> list[Dpo]:
    smoothing = {"robust": 0.1, "exo_pair": 1e-3}  # as their papers recommend
    return [
        Dpo(beta=beta, loss_type=loss_type, label_smoothing=smoothing.get(loss_type)) for loss_type in get_args(DpoLoss)
    ]


@pytest.fixture(scope="session", autouse=True)  # as long as any other fixture, which may compute too
def _one_thread():
    """Tiny models are slower on several threads, and sums come out in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


ROWS = b'{"text": "hello"}\n'


@pytest.fixture
def store(tmp_path):
    settings = DatabaseSettings(url=f"sqlite:///{tmp_path / 'd2lora.db'}")
    migrate(settings)
    with Store(settings) as store:
        yield store


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path / "objects")


def add_dataset(store, storage, directory, dataset_id, content):
    path = directory / f"{dataset_id}.jsonl"
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    dataset = Dataset(
        id=dataset_id,
        created_at=datetime.now(UTC),
        format="jsonl",
        row_schema="text",
        rows=1,
        size=len(content),
        sha256=digest,
        objectives=["sft"],
    )
    storage.put_file(dataset_key("acme", dataset_id), path, digest)
    store.add_dataset("acme", dataset, dataset_key("acme", dataset_id))


@pytest.fixture
def job(store, storage, tmp_path):
    add_dataset(store, storage, tmp_path, "ds_1", ROWS)
    return store.create("acme", InitializationSpec(base_model="m", dataset_id="ds_1"))[0]
