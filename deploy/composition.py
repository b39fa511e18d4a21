"""docker-compose.yml, understood by the real compose, and what has to be so in it."""

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from deploy import dotenv, variables
from deploy.tally import Tally
from deploy.tools import ROOT, Outcome, Tools, run

SERVICES = {"postgres", "redis", "seaweedfs", "migrate", "service", "worker"}
SECRETS = {"POSTGRES_PASSWORD", "REDIS_PASSWORD", "S3_ACCESS_KEY_ID", "S3_SECRET_ACCESS_KEY", "API_KEYS"}


def check(tally: Tally, tools: Tools) -> None:
    """Hold the compose file, with and without its profile, against what is promised of each service."""
    example = (ROOT / ".env.example").read_text()
    with tempfile.TemporaryDirectory() as temporary:
        secrets = Path(temporary) / "env"
        secrets.write_text(dotenv.dotenv(example))
        default = _config(tally, tools, secrets)
        gpu = _config(tally, tools, secrets, "--profile", "gpu")
        for missing in sorted(SECRETS):
            secrets.write_text(re.sub(rf"^{missing}=.*", "", dotenv.dotenv(example), flags=re.MULTILINE))
            refused = compose(tools, secrets, "config", "--quiet")
            tally.check(refused.code != 0 and missing in refused.errors, f"compose asks for {missing}")
    tally.equal(set(default["services"]), SERVICES, "compose: services by default")
    tally.equal(set(gpu["services"]), SERVICES | {"worker-gpu"}, "compose: services with the profile gpu")
    for name, service in gpu["services"].items():
        _check_service(tally, f"compose: {name}", name, service)
    _check_parts(tally, gpu["services"])
    text = (ROOT / "docker-compose.yml").read_text()
    used = set(re.findall(r"(?<!\$)\$\{([A-Z0-9_]+)", text))
    tally.equal(used, set(re.findall(r"^([A-Z0-9_]+)=", example, re.MULTILINE)), "compose and .env.example: variables")
    tally.equal(set(re.findall(r"\$\{([A-Z0-9_]+):\?", text)), SECRETS, "compose: variables without a default")
    tally.none(re.findall(r"\$\{\w*(?:PASSWORD|SECRET|KEY)\w*:-[^}]+\}", text), "default secrets")


def compose(tools: Tools, secrets: Path, *arguments: str) -> Outcome:
    """Run compose on the shipped file with nothing in the environment that could fill in for the file of secrets."""
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    return run(tools["docker-compose"], "--env-file", str(secrets), *arguments, environment=environment)


def _config(tally: Tally, tools: Tools, secrets: Path, *arguments: str) -> dict[str, Any]:
    done = compose(tools, secrets, *arguments, "config", "--format", "json")
    tally.check(done.code == 0 and "warn" not in done.errors.lower(), f"compose config {arguments}: {done.said}")
    return json.loads(done.output)


def _check_service(tally: Tally, where: str, name: str, service: dict[str, Any]) -> None:
    tally.check(service["read_only"], f"{where}: read-only root filesystem")
    tally.equal(service["cap_drop"], ["ALL"], f"{where}: capabilities")
    tally.check("cap_add" not in service and not service.get("privileged"), f"{where}: no capability is given back")
    tally.equal(service["security_opt"], ["no-new-privileges:true"], f"{where}: no new privileges")
    tally.check(not service["image"].endswith(":latest") and ":" in service["image"], f"{where}: image has a version")
    tally.equal(service["restart"], "no" if name == "migrate" else "unless-stopped", f"{where}: restarts")
    tally.check("/tmp" in service["tmpfs"], f"{where}: /tmp can be written")
    for port in service.get("ports", []):
        tally.equal(port.get("host_ip"), "127.0.0.1", f"{where}: port {port['target']} is for this machine alone")
    health = service["healthcheck"]
    if name != "migrate":
        tally.check(health["test"] and not health.get("disable"), f"{where}: health check")
        tally.check("stop_grace_period" in service, f"{where}: time to stop")
    for volume in service.get("volumes", []):
        if volume["type"] == "bind":
            tally.check(volume.get("read_only"), f"{where}: {volume['target']} is mounted read-only")
    given = service.get("environment", {})
    tally.none(variables.unknown(given), f"{where}: variables that d2lora does not read")
    tally.none(variables.problems(given), f"{where}: values that d2lora cannot read")
    if "build" not in service and name != "migrate":  # the images that are not ours run as root unless told otherwise
        tally.check(re.fullmatch(r"[1-9]\d*:[1-9]\d*", service.get("user", "")), f"{where}: runs as a numeric user")


def _check_parts(tally: Tally, services: dict[str, Any]) -> None:
    for name in ("service", "worker", "worker-gpu"):
        conditions = {other: needed["condition"] for other, needed in services[name]["depends_on"].items()}
        tally.equal(conditions.pop("migrate"), "service_completed_successfully", f"compose: {name} waits for migrate")
        tally.equal(set(conditions.values()), {"service_healthy"}, f"compose: {name} waits for {sorted(conditions)}")
    for name in ("worker", "worker-gpu"):
        grace = float(services[name]["environment"]["D2LORA_WORKER_GRACE_SECONDS"])
        tally.check(_seconds(services[name]["stop_grace_period"]) >= grace + 15, f"compose: {name} can hand work back")
        tally.equal(
            services[name]["healthcheck"]["test"][1:], ["python", "-m", "worker", "alive"], f"compose: {name}'s health"
        )
        caches = {volume["target"]: volume["source"] for volume in services[name]["volumes"]}
        tally.equal(caches["/cache"], "huggingface", f"compose: {name} keeps downloaded models")
    tally.check(_seconds(services["service"]["stop_grace_period"]) > 25, "compose: open requests may end")
    tally.equal(services["migrate"]["command"], ["python", "-m", "service", "migrate"], "compose: migrate's command")
    reserved = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    tally.equal([device["driver"] for device in reserved], ["nvidia"], "compose: worker-gpu reserves a GPU")
    redis = " ".join(services["redis"]["entrypoint"])
    for setting in ("requirepass $$REDIS_PASSWORD", "appendonly yes", "maxmemory-policy noeviction"):
        tally.check(setting in redis, f"compose: redis has {setting}")
    store = services["seaweedfs"]
    tally.check("-bucket=d2lora" in store["command"], "compose: the bucket is made")
    tally.check(
        {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= set(store["environment"]), "compose: the store has keys"
    )


def _seconds(duration: str) -> float:
    """Return the seconds of a duration as compose prints it, such as 1m30s."""
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)([hms])", duration))
