"""The chart's query for KEDA, asked of a real PostgreSQL."""

import re
from pathlib import Path

import pytest
import yaml
from sqlalchemy import text, update

from d2lora.database import open_engine, writing
from d2lora.initializations import State
from d2lora.store import Store
from d2lora.tables import InitializationRow, ShardRow

TEMPLATE = Path(__file__).resolve().parents[2] / "helm" / "d2lora" / "templates" / "keda.yaml"


def query(*queues):
    """The rendered query, without helm: what stands between the braces is the choice of queues."""
    folded = re.search(r"query: >-\n(.*?)\n +targetQueryValue", TEMPLATE.read_text(), re.DOTALL).group(1)
    choice = f" AND queue IN ({','.join(repr(queue) for queue in queues)})" if queues else ""
    plain = re.sub(r"\s*\{\{- with .*\}\}$", lambda _: choice, folded)
    return yaml.safe_load(f"query: >-\n{plain}")["query"]


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_keda_counts_queued_jobs_running_jobs_and_open_shards(database, store: Store, spec):
    engine = open_engine(database)

    def count(*queues):
        with engine.connect() as connection:
            return connection.execute(text(query(*queues))).scalar_one()

    assert count() == 0
    jobs = [store.create("acme", spec, queue="cpu" if i < 3 else "gpu-small")[0].id for i in range(5)]
    assert (count(), count("cpu"), count("gpu-small"), count("cpu", "gpu-large")) == (5, 3, 2, 3)

    with writing(engine) as session:
        for job, state in zip(jobs, (State.RUNNING, State.RUNNING, State.SUCCEEDED), strict=False):
            session.execute(update(InitializationRow).where(InitializationRow.id == job).values(state=state))
        for number, outcome in enumerate([None, None, None, {"done": True}]):
            session.add(
                ShardRow(
                    initialization_id=jobs[0],
                    number=number,
                    kind="statistics",
                    made_by=1,
                    task={},
                    inputs=[],
                    outcome=outcome,
                )
            )

    assert (count("cpu"), count("gpu-small")) == (3 + 1, 2)
    engine.dispose()
