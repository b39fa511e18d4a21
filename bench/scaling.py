"""How much faster two workers are than one on the same sharded job, through the real cluster.

    python -m bench.scaling [--turns 3] [--rows 320] [--shards 8]

PostgreSQL, Valkey, SeaweedFS, the API and one or two workers with one thread each, on a random Llama of width 256. The
statistics phase lasts from the event ``split`` to the event ``gathered``, the whole job from its first claim to its
end. Every turn runs the job with one worker and with two, both with the model loaded. A ratio is the median of the
ratios within a turn, its spread half the distance from the smallest to the largest. It needs two idle cores: other load
takes them from the second worker. The last line is one JSON object; the exit status is 1 below ``AIM``.
"""

import argparse
import json
import os
import secrets
import sys
import tempfile
from pathlib import Path
from statistics import median

from cluster.processes import Guard, free_ports, stopping
from cluster.stack import running_servers, service, wait_for_service, wait_for_worker, worker
from cluster.tiny_model import tiny_llama, tiny_tokenizer
from d2lora.client import Client
from d2lora.initializations import InitializationSpec, LoraSpec
from d2lora.settings import DatabaseSettings
from d2lora.store import Store

AIM = 1.8
"""Statistics phase of one worker over that of two."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--shards", type=int, default=8)
    arguments = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as name, Guard() as guard:
        times = measure(Path(name), guard, arguments)
    statistics, whole = ratio(times, "statistics"), ratio(times, "whole")
    result = {
        "turns": arguments.turns,
        "rows": arguments.rows,
        "shards": arguments.shards,
        "seconds": times,
        "statistics_ratio": statistics[0],
        "statistics_spread": statistics[1],
        "whole_ratio": whole[0],
        "whole_spread": whole[1],
        "aim": AIM,
        "reached": statistics[0] >= AIM,
    }
    print(f"statistics: two workers {statistics[0]:.2f} +- {statistics[1]:.2f} times as fast as one; aim {AIM}")
    print(f"whole job:  two workers {whole[0]:.2f} +- {whole[1]:.2f} times as fast as one")
    print(json.dumps(result))
    return 0 if result["reached"] else 1


def measure(directory: Path, guard: Guard, arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Return the seconds of every turn by number of workers."""
    tiny_llama(layers=4, hidden=256).save_pretrained(directory / "model")
    tiny_tokenizer().save_pretrained(directory / "model")
    rows = directory / "rows.jsonl"
    tokens = write_rows(rows, arguments.rows)
    times: dict[str, list[dict[str, float]]] = {"one": [], "two": []}
    with running_servers(directory, guard) as servers:
        key, (port,) = f"d2l_{secrets.token_urlsafe(32)}", free_ports(1)
        environment = {
            **servers.environment(),
            "D2LORA_MODELS_ROOTS": json.dumps([str(directory)]),
            "D2LORA_WORKER_SHARD_TOKENS": str(tokens // arguments.shards),
            "D2LORA_WORKER_MODEL_CACHE_GIB": "1",
        }
        api = service("service", port, key, environment, directory / "service.log", guard)
        first, second = (
            worker(f"worker-{number}", environment, directory / f"worker-{number}.log", guard) for number in (1, 2)
        )
        with stopping([api, first, second]), Store(DatabaseSettings(url=servers.database.url())) as store:
            api.start()
            wait_for_service(api, f"http://127.0.0.1:{port}")
            first.start()
            wait_for_worker(first)
            with Client(f"http://127.0.0.1:{port}", api_key=key) as client:
                dataset = client.upload_dataset(rows).id
                spec = InitializationSpec(base_model=str(directory / "model"), dataset_id=dataset, lora=LoraSpec(r=8))
                for turn in range(arguments.turns):
                    second.start()
                    wait_for_worker(second)
                    run(client, store, spec)  # both workers load the model
                    times["two"].append(run(client, store, spec))
                    second.stop()
                    times["one"].append(run(client, store, spec))
                    print(f"turn {turn + 1}: one worker {times['one'][-1]}, two workers {times['two'][-1]}", flush=True)
    return times


def run(client: Client, store: Store, spec: InitializationSpec) -> dict[str, float]:
    """Run the job and return the seconds of its statistics and of all of it."""
    job = client.wait(client.submit(spec).id, poll=0.2, timeout=1800)
    if job.error is not None:
        raise SystemExit(f"the job failed with {job.error.code}: {job.error.detail}")
    at: dict[str, float] = {}
    for event in store.events("local", job.id):
        at.setdefault(event.type, event.at.timestamp())
    return {
        "statistics": round(at["gathered"] - at["split"], 2),
        "whole": round(at["succeeded"] - at["running"], 2),
    }


def ratio(times: dict[str, list[dict[str, float]]], what: str) -> tuple[float, float]:
    """Return the median of one worker's seconds over two's, and half the distance between the extremes."""
    values = [one[what] / two[what] for one, two in zip(times["one"], times["two"], strict=True)]
    return round(median(values), 3), round((max(values) - min(values)) / 2, 3)


def write_rows(path: Path, count: int) -> int:
    """Write preference rows of characters, and return about how many tokens they are."""
    rows = [
        {
            "prompt": f"{number} plus {number + 1}?" + " and so on" * 4,
            "chosen": f"{2 * number + 1}" + ", right" * 4,
            "rejected": "no" + ", wrong" * 4,
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return sum(2 * len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"]) + 2 for row in rows)


if __name__ == "__main__":
    sys.exit(main())
