"""The chart: linted, rendered by both helms, held against Kubernetes' schemas and checkov's rules."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from deploy.tally import Tally
from deploy.tools import ROOT, Outcome, Tools, run

CHART = "helm/d2lora"
HELMS = ("helm3", "helm4")
KUBERNETES = ("1.31", "1.37")
CUSTOM_KINDS = {"ScaledObject", "TriggerAuthentication", "ServiceMonitor", "PrometheusRule"}
"""Kinds that other operators add to a cluster; without a schema at hand, they are held against assertions alone."""

SKIPPED = {
    "CKV_K8S_15": "image.pullPolicy is the operator's; tags are not reused, and a digest can be given",
    "CKV_K8S_35": "settings are read from the environment alone",
    "CKV_K8S_43": "image.*.digest is the operator's; the project publishes no images that could be pinned here",
}
"""Rules of checkov that do not apply, each with its reason."""

REFUSED = {
    "storage.bukcet=x": "bukcet",
    "databse.existingSecret=x": "databse",
    "api.replica=3": "replica",
    "api.service.prot=80": "prot",
    "api.resources.limit.cpu=1": "limit",
    "api.podDisruptionBudget.minAvailable=1": "minAvailable",
    "workerDefaults.graceSecond=3": "graceSecond",
    "workers.cpu.replica=3": "replica",
    "workers.cpu.cache.exisitingClaim=x": "exisitingClaim",
    "workers.gpu-small.tolerations[0].efect=NoSchedule": "efect",
    "workers.gpu_small.replicas=1": "gpu_small",
    "workers.cpu.queues={gpu-smal}": "queues",
    "workers.cpu.device=cdua": "device",
    "networkPolicy.database.prot=1": "prot",
    "networkPolicy.apiFrom[0].podSelectors.matchLabels.a=b": "podSelectors",
    "ingress.tls.secret=x": "secret",
    "keda.enable=true": "enable",
    "prometheusRule.oldestFreeSecond=1": "oldestFreeSecond",
    "image.worker.digest=latest": "digest",
    "api.metrics.port=0": "port",
    "storage.endpointUrl=s3.example.com": "endpointUrl",
}
"""Values that the schema has to refuse, and what the message has to name."""

REQUIRED = ("database.existingSecret", "apiKeys.existingSecret", "storage.bucket")

_OPEN = {"strings", "global", "affinity", "requests", "limits"}
"""Objects of the schema that take any name: labels, resources, and what Kubernetes itself checks."""


def values_files() -> list[str]:
    """Return the values files that every rendering is done with."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / CHART / "ci").glob("*-values.yaml"))


def check(tally: Tally, tools: Tools) -> dict[str, list[dict[str, Any]]]:
    """Return the manifests of each values file, all tools having looked at them."""
    manifests = {}
    with tempfile.TemporaryDirectory() as temporary:
        for values in values_files():
            rendered = {}
            for helm in HELMS:
                lint = run(tools[helm], "lint", "--strict", CHART, "--values", values)
                tally.check(lint.code == 0, f"{helm} lint {values}: {lint.said}")
                outcome = template(tools[helm], "--values", values)
                tally.check(outcome.code == 0, f"{helm} template {values}: {outcome.said}")
                rendered[helm] = _documents(outcome.output) if outcome.code == 0 else []
            tally.check(rendered["helm3"] == rendered["helm4"], f"{values}: both helms render the same")
            manifests[values] = rendered["helm4"]
            path = Path(temporary) / Path(values).name
            path.write_text(yaml.safe_dump_all(rendered["helm4"]))
            _check_schemas(tally, tools, path, rendered["helm4"])
        _check_rules(tally, tools, temporary)
    _check_values(tally, tools)
    return manifests


def template(helm: str, *arguments: str) -> Outcome:
    """Render the chart as release ``rel`` in namespace ``init``."""
    return run(helm, "template", "rel", CHART, "--namespace", "init", *arguments)


def _documents(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


def _check_schemas(tally: Tally, tools: Tools, path: Path, documents: list[dict[str, Any]]) -> None:
    ours = [document for document in documents if document["kind"] not in CUSTOM_KINDS]
    plain = path.with_suffix(".plain.yml")
    plain.write_text(yaml.safe_dump_all(ours))
    for version in KUBERNETES:
        done = run(tools["kubernetes-validate"], "--strict", "-k", version, str(plain))
        passed = (done.output + done.errors).count(" passed for resource ")
        tally.check(done.code == 0 and passed == len(ours), f"{path.name} against Kubernetes {version}: {done.said}")
    plain.unlink()  # checkov would look at it again


def _check_rules(tally: Tally, tools: Tools, directory: str) -> None:
    command = [tools["checkov"], "--directory", directory, "--framework", "kubernetes", "--skip-download"]
    done = run(*command, "--skip-check", ",".join(SKIPPED), "--quiet", "--compact", "--output", "json")
    report = json.loads(done.output)
    tally.check(report["summary"]["passed"] > 500, f"checkov looked at the manifests: {report['summary']}")
    tally.none(
        {f"{fault['check_id']} {fault['check_name']} ({fault['resource']})" for fault in _faults(report)},
        "checkov on the rendered manifests",
    )


def _faults(report: dict[str, Any]) -> list[dict[str, Any]]:
    return report["results"]["failed_checks"]


def _check_values(tally: Tally, tools: Tools) -> None:
    """Hold the schema against values that are wrong, and against the values that there are."""
    least = f"{CHART}/ci/minimal-values.yaml"
    for helm in HELMS:
        for assignment, named in REFUSED.items():
            done = template(tools[helm], "--values", least, "--set", assignment)
            refused = done.code != 0 and named in done.errors and "schema" in done.errors
            tally.check(refused, f"{helm}: --set {assignment} is refused by the schema, naming {named}: {done.said}")
        for name in REQUIRED:
            done = template(tools[helm], "--values", least, "--set", f"{name}=")
            tally.check(done.code != 0 and name in done.errors, f"{helm}: {name} is asked for: {done.said}")
    schema = json.loads((ROOT / CHART / "values.schema.json").read_text())
    tally.none(_open_objects(schema, "values"), "objects of the schema that take unknown names")
    templates = "".join(path.read_text() for path in (ROOT / CHART / "templates").rglob("*.*"))
    defaults = yaml.safe_load((ROOT / CHART / "values.yaml").read_text())
    tally.none({name for name in _names(defaults) if f".{name}" not in templates}, "values that no template reads")


def _open_objects(schema: Any, name: str) -> Iterator[str]:
    """Yield the objects that neither refuse unknown names nor are open on purpose."""
    if isinstance(schema, list):
        for item in schema:
            yield from _open_objects(item, name)
    elif isinstance(schema, dict):
        if schema.get("type") == "object" and schema.get("additionalProperties") is not False and name not in _OPEN:
            yield name
        for key, value in schema.items():
            inside = name if key in {"properties", "definitions", "items", "patternProperties"} else key
            if not (name == "affinity" and key == "properties"):
                yield from _open_objects(value, inside)


def _names(values: dict[str, Any]) -> Iterator[str]:
    """Yield the names of all values; the classes of workers repeat their defaults'."""
    for name, value in values.items():
        if name not in {"requests", "limits", "workers"}:
            yield name
            if isinstance(value, dict):
                yield from _names(value)
