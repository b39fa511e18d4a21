"""One cluster for all scenarios; each heals what it broke before it judges."""

import os
import random
import secrets
from pathlib import Path

import pytest

from tests.chaos.arena import running_arena
from tests.chaos.tally import Tally
from tests.chaos.verdict import query, settle

SEED = int(os.environ.get("SEED") or secrets.randbelow(10**6))
TALLY = Tally(SEED)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):  # this hook sees the items of the whole run
            item.add_marker(pytest.mark.chaos)


@pytest.fixture(scope="session")
def tally():
    return TALLY


@pytest.fixture(scope="session")
def whole_arena(tmp_path_factory, tally):
    """Two replicas of the API, two workers, and the adapters that undisturbed jobs end with."""
    with running_arena(tmp_path_factory.mktemp("chaos"), tally, replicas=2, workers=2) as arena:
        jobs = [job for kind in arena.datasets for job in arena.submit(kind)]
        settle(arena, jobs)
        for job in jobs:
            files = query(arena, "SELECT result FROM initializations WHERE id = %s", job.id)[0]["result"]["files"]
            (adapter,) = (file["sha256"] for file in files if file["name"] == "adapter_model.safetensors")
            arena.adapters[job.kind] = adapter
        yield arena


@pytest.fixture
def arena(whole_arena):
    """The cluster, whole and idle."""
    whole_arena.heal()
    whole_arena.ready()
    yield whole_arena
    whole_arena.heal()


@pytest.fixture
def rng(request):
    """Randomness of this scenario, the same for the same seed."""
    return random.Random(f"{SEED}:{request.node.name}")
