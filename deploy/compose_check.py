"""``python -m deploy.compose_check [--install]``: build the shipped images, start the shipped compose file, run a job.

It needs root and a few packages of Debian, and takes minutes. What stands in for images that cannot be pulled is said
at the end.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import yaml

from cluster.processes import free_ports
from d2lora.client import Client
from d2lora.initializations import InitializationSpec, LoraSpec, State
from deploy import chart, composition, dotenv, manifests
from deploy.podman import BASE, PACKAGES, STANDINS, Podman, missing_packages
from deploy.tally import Tally
from deploy.tools import ROOT, Tools, fetch, run

DIRECTORY = ROOT / ".compose-check"
PROJECT = "d2lora-check"
OURS = {"docker.io/library/d2lora-service:local": "service", "docker.io/library/d2lora-worker:local": "worker"}


def main() -> int:
    """Return 0 if the job's adapter arrives and every check holds; the last line has the figures."""
    start = time.monotonic()
    missing = missing_packages()
    if missing and "--install" in sys.argv:
        subprocess.run(["apt-get", "update", "--quiet"], check=True)
        subprocess.run(["apt-get", "install", "--yes", "--no-install-recommends", *missing], check=True)
    elif missing or os.geteuid() != 0:
        sys.stderr.write(
            f"needs root and Debian's {', '.join(missing or PACKAGES)}; make compose-check INSTALL=--install\n"
        )
        return 2
    tools, podman, tally = fetch(), Podman(DIRECTORY), Tally()
    podman.prepare()
    built = build(podman)
    compose = Compose(tools, podman, DIRECTORY)
    with podman.serving():
        compose.run("down", "--volumes", "--timeout", "5")  # what a run that was killed has left
        try:
            figures = exercise(tally, podman, compose)
        except Exception as error:  # noqa: BLE001  # whatever fell short is said, counted, and torn down
            tally.check(holds=False, what=f"the run came to its end: {error!r}")
            print(compose.run("logs", "--no-color", "--tail", "40", check=False)[-8000:])
            figures = "not finished"
        finally:
            compose.run("down", "--volumes", "--timeout", "60")
        left = podman.run("podman", "ps", "--all", "--quiet").split()
        tally.none(left + podman.run("podman", "volume", "ls", "--quiet").split(), "containers and volumes left behind")
    for image in (BASE, *STANDINS):
        print(f"substitute: {image} was built here by deploy/podman.py, not pulled")
    print(
        f"compose-check: {tally} ({built}, {len(STANDINS) + 1} images substituted; {figures}) "
        f"in {time.monotonic() - start:.0f} s"
    )
    return int(bool(tally.failures))


def build(podman: Podman) -> str:
    """Build what is not there yet, and the shipped images in any case; return the figures."""
    if not podman.has(BASE):
        print(f"making {BASE}", flush=True)
        podman.make_base()
    standins = ROOT / "deploy" / "standins"
    for image, dockerfile in STANDINS.items():
        print(f"building {image}", flush=True)
        podman.build(standins / dockerfile, image, standins)
    figures = []
    for image, room in OURS.items():
        print(f"building {image}", flush=True)
        start = time.monotonic()
        podman.build(ROOT / room / "Dockerfile", image, ROOT)
        size = int(podman.run("podman", "image", "inspect", "--format", "{{.Size}}", image))
        figures.append(f"{room} image {size / 1e6:.0f} MB in {time.monotonic() - start:.0f} s")
    return ", ".join(figures)


class Compose:
    """The real compose, on the shipped file, over podman's socket."""

    def __init__(self, tools: Tools, podman: Podman, directory: Path) -> None:
        """Write the file of secrets and the override, which has nothing but limits that podman's service wants."""
        self.models = directory / "models"
        self.ports = dict(zip(("API", "METRICS", "S3", "POSTGRES", "REDIS"), free_ports(5), strict=True))
        text = dotenv.dotenv((ROOT / ".env.example").read_text())
        values = {f"{name}_PORT": str(port) for name, port in self.ports.items()}
        values |= {"MODELS_DIR": str(self.models), "S3_PUBLIC_URL": f"http://127.0.0.1:{self.ports['S3']}"}
        for name, value in values.items():
            text = re.sub(rf"^{name}=.*$", f"{name}={value}", text, flags=re.MULTILINE)
        self.secrets = directory / "env"
        self.secrets.touch(mode=0o600)
        self.secrets.write_text(text)
        self.key = json.loads(re.search(r"^API_KEYS='(.*)'$", text, re.MULTILINE).group(1))["default"]  # type: ignore[union-attr]  # dotenv wrote it
        self.url = f"http://127.0.0.1:{self.ports['API']}"
        limits = {"ulimits": {"nofile": 4096, "nproc": 4096}}
        override = directory / "override.json"
        override.write_text(json.dumps({"services": dict.fromkeys(sorted(composition.SERVICES), limits)}))
        self._command = [tools["docker-compose"], "--env-file", str(self.secrets), "--project-name", PROJECT]
        self._command += ["--file", str(ROOT / "docker-compose.yml"), "--file", str(override)]
        self._environment = {"PATH": os.environ["PATH"], "HOME": "/root", "DOCKER_HOST": podman.socket}

    def run(self, *arguments: str, check: bool = True) -> str:
        """Return what compose says.

        Raises:
            RuntimeError: it failed, and ``check`` is set.
        """
        done = subprocess.run(
            [*self._command, *arguments], cwd=ROOT, env=self._environment, capture_output=True, text=True, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"compose {' '.join(arguments)}: {(done.stdout + done.stderr)[-2000:]}")
        return done.stdout + done.stderr

    def up(self) -> float:
        """Start everything; return the seconds until compose says that all are healthy."""
        start = time.monotonic()
        self.run("up", "--detach", "--no-build", "--pull", "never", "--wait", "--wait-timeout", "240")
        return time.monotonic() - start

    def containers(self) -> list[dict[str, Any]]:
        """Return the containers as compose lists them."""
        return [
            json.loads(line) for line in self.run("ps", "--all", "--format", "json").splitlines() if line[:1] == "{"
        ]


def exercise(tally: Tally, podman: Podman, compose: Compose) -> str:
    """Start, run a job, stop and start again, and fetch its adapter once more; return the figures."""
    rows = _write_model_and_rows(compose.models)
    seconds = compose.up()
    states = {container["Service"]: container for container in compose.containers()}
    tally.equal(set(states), composition.SERVICES, "services that were started")
    for name, container in states.items():
        if name == "migrate":
            tally.equal((container["State"], container["ExitCode"]), ("exited", 0), "migrate ended well")
            continue
        tally.equal((container["State"], container["Health"]), ("running", "healthy"), f"{name} is healthy")
        _check_confinement(tally, podman, name, container["Name"])
    tally.equal(httpx.get(f"{compose.url}/readyz").status_code, 200, "the service is ready")
    tally.equal(httpx.get(f"{compose.url}/v1/initializations").status_code, 401, "nobody gets in without a key")
    store = f"http://127.0.0.1:{compose.ports['S3']}/d2lora"
    tally.equal(httpx.get(store).status_code, 403, "nobody reads the bucket without a signature")

    _run_charts_test(tally, compose)

    with Client(compose.url, api_key=compose.key) as client:
        begun = time.monotonic()
        dataset = client.upload_dataset(rows)
        spec = InitializationSpec(base_model="/models/tiny", dataset_id=dataset.id, lora=LoraSpec(r=2))
        job = client.wait(client.submit(spec).id, poll=0.2, timeout=300)
        took = time.monotonic() - begun
        tally.equal(job.state, State.SUCCEEDED, f"the job ended well, else {job.error}")
        first = _pull(tally, client, job.id, DIRECTORY / "adapter")
        metrics = httpx.get(f"http://127.0.0.1:{compose.ports['METRICS']}/metrics", follow_redirects=True).text
        tally.check("d2lora_leader" in metrics and "d2lora_units" in metrics, "metrics are served")

        begun = time.monotonic()
        compose.run("stop", "worker", "service")
        stopped = time.monotonic() - begun
        codes = {one["Service"]: one["ExitCode"] for one in compose.containers() if one["Service"] in OURS.values()}
        # 143: ended by the SIGTERM that it was told to stop with, after its own work; 137 would be the SIGKILL.
        tally.check(
            set(codes) == set(OURS.values()) and set(codes.values()) <= {0, 143}, f"ends by themselves: {codes}"
        )
        compose.run("down")
        again = compose.up()
        tally.equal(client.get(job.id).state, State.SUCCEEDED, "the job is remembered after a restart of everything")
        second = _pull(tally, client, job.id, DIRECTORY / "adapter-again")
        tally.equal(second, first, "the adapter is the same after a restart of everything")
    return (
        f"{len(states)} services up in {seconds:.0f} s and again in {again:.0f} s, stopped in {stopped:.0f} s, "
        f"1 job {job.state} in {took:.0f} s, "
        f"{len(first)} files with their checksums"
    )


def _write_model_and_rows(models: Path) -> Path:
    """Write a tiny random Llama where the containers look for models; return a file of rows."""
    from tests.support.models import tiny_llama, tiny_tokenizer  # noqa: PLC0415  # seconds of imports

    shutil.rmtree(models, ignore_errors=True)
    tiny_llama().save_pretrained(models / "tiny")
    tiny_tokenizer().save_pretrained(models / "tiny")
    for path in (models, *models.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)  # the containers' user is neither its owner nor of its group
    rows = [{"prompt": f"item {i}:", "chosen": " yes yes", "rejected": f" no {i}"} for i in range(24)]
    path = DIRECTORY / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _check_confinement(tally: Tally, podman: Podman, name: str, container: str) -> None:
    user, writable = podman.run(
        "podman", "exec", container, "sh", "-c", "id -u; touch /here 2>/dev/null && echo yes || echo no"
    ).split()
    tally.check(int(user) > 0, f"{name} runs as user {user}")
    tally.equal(writable, "no", f"{name} can write to its root filesystem")
    status = podman.run("podman", "exec", container, "cat", "/proc/self/status")
    facts = dict(re.findall(r"^(CapEff|CapBnd|NoNewPrivs):\s*(\w+)$", status, re.MULTILINE))
    tally.equal(facts, {"CapEff": "0" * 16, "CapBnd": "0" * 16, "NoNewPrivs": "1"}, f"{name} has no privileges")


def _run_charts_test(tally: Tally, compose: Compose) -> None:
    """Run what `helm test` would run in its pod."""
    rendered = chart.template(fetch()["helm4"], "--values", chart.values_files()[0]).output
    (pod,) = manifests.of_kind([document for document in yaml.safe_load_all(rendered) if document], "Pod")
    (container,) = pod["spec"]["containers"]
    environment = {**os.environ, "API_URL": compose.url, "API_KEY": compose.key}
    done = run(sys.executable, "-c", *container["args"], environment=environment)
    tally.check(done.code == 0 and "can be listed" in done.output, f"the chart's test passes: {done.said}")


def _pull(tally: Tally, client: Client, initialization_id: str, directory: Path) -> dict[str, str]:
    """Return the sha256 of every file of the adapter, which is fetched anew."""
    shutil.rmtree(directory, ignore_errors=True)
    files = client.pull(initialization_id, directory)
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    manifest = json.loads((directory / "manifest.json").read_text())
    for entry in manifest["files"]:
        tally.equal(found[entry["name"]], entry["sha256"], f"checksum of {entry['name']}")
    tally.check(
        {"adapter_model.safetensors", "adapter_config.json", "report.json"} <= set(found), "the adapter's files"
    )
    return found


if __name__ == "__main__":
    sys.exit(main())
