"""The Dockerfiles, linted, and what has to be so in them."""

import json
import re

from deploy.tally import Tally
from deploy.tools import ROOT, Tools, run

DOCKERFILES = ("service/Dockerfile", "worker/Dockerfile")


def check(tally: Tally, tools: Tools) -> None:
    """Hold both Dockerfiles against hadolint, checkov and what is promised of each."""
    standins = (ROOT / "deploy" / "standins").glob("*.Dockerfile")
    for path in (*DOCKERFILES, *(str(path.relative_to(ROOT)) for path in standins)):
        lint = run(tools["hadolint"], path)
        tally.check(lint.code == 0, f"hadolint {path}: {lint.said}")
    for path in DOCKERFILES:
        _check_dockerfile(tally, path)
    options = ("--framework", "dockerfile", "--skip-download", "--quiet", "--compact", "--output", "json")
    done = run(tools["checkov"], "--file", *DOCKERFILES, *options)
    report = json.loads(done.output)
    tally.check(report["summary"]["passed"] > 50, f"checkov looked at the Dockerfiles: {report['summary']}")
    faults = {f"{fault['check_id']} {fault['file_path']}" for fault in report["results"]["failed_checks"]}
    tally.none(faults, "checkov on the Dockerfiles")
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    tally.equal(ignored[0], "*", ".dockerignore: nothing goes to the builder unless it is named")
    named = {line[1:] for line in ignored if line.startswith("!")}
    wanted = {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "d2lora", "service", "worker"}
    tally.equal(named, wanted, ".dockerignore: what goes to the builder")


def _check_dockerfile(tally: Tally, path: str) -> None:
    text = (ROOT / path).read_text()
    builder, _, final = text.rpartition("\nFROM ")
    room = path.partition("/")[0]
    tally.check("FROM ${PYTHON_IMAGE} AS builder" in builder, f"{path}: has a stage that builds")
    users = re.findall(r"^USER (.+)$", final, re.MULTILINE)
    tally.check(users and re.fullmatch(r"[1-9]\d{4,}:[1-9]\d{4,}", users[-1]), f"{path}: runs as {users}")
    tally.check("HEALTHCHECK" in final, f"{path}: health check")
    tally.check("PYTHONPATH=/app" in final, f"{path}: our code is found in /app")
    tally.check("PIP_CONSTRAINT=/build/constraints.txt" in builder, f"{path}: exact versions")
    extras = set(re.findall(r"\['optional-dependencies'\]\['(\w+)'\]", text))
    tally.equal(extras, {room}, f"{path}: extras that are installed")
    copied = set(re.findall(r"^COPY (\w+) /app", final, re.MULTILINE))
    tally.equal(copied, {room}, f"{path}: code that is copied")
    tally.check("pip" not in final, f"{path}: nothing is installed in the last stage")
