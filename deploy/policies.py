"""What has to be so in the chart's network policies, autoscaling and monitoring."""

import json
import re
from collections.abc import Mapping
from typing import Any

from deploy.manifests import Manifest, environment, matches, of_kind, pods
from deploy.tally import Tally
from deploy.tools import ROOT


def exported() -> set[str]:
    """Return the names of the metrics that the API serves, as Prometheus sees them."""
    text = (ROOT / "service" / "metrics.py").read_text()
    found = re.findall(r'(Counter|Gauge)MetricFamily\(\s*"(\w+)"', text)
    return {f"{name}_total" if kind == "Counter" else name for kind, name in found}


def check(tally: Tally, manifests: Mapping[str, list[Manifest]]) -> None:
    """Hold the manifests of every values file against what is promised of each."""
    for values, documents in manifests.items():
        _check_network(tally, values, documents)
        for scaler in of_kind(documents, "ScaledObject"):
            _check_scaler(tally, f"{values}: {scaler['metadata']['name']}", scaler, documents)
        _check_monitoring(tally, values, documents)


def _check_network(tally: Tally, values: str, documents: list[Manifest]) -> None:
    policies = of_kind(documents, "NetworkPolicy")
    for document, template in pods(documents):
        where = f"{values}: network of {document['metadata']['name']}"
        labels = template["metadata"]["labels"]
        found = [policy["spec"] for policy in policies if matches(policy["spec"]["podSelector"]["matchLabels"], labels)]
        denies = [spec for spec in found if "ingress" not in spec and "egress" not in spec]
        tally.equal([spec["policyTypes"] for spec in denies], [["Ingress", "Egress"]], f"{where}: all is denied first")
        tally.equal(len(found), 2, f"{where}: then one policy allows")
        ingress = [rule for spec in found for rule in spec.get("ingress", [])]
        component = labels["app.kubernetes.io/component"]
        tally.equal(bool(ingress), component == "api", f"{where}: only the API is called")
        egress = {port["port"] for spec in found for rule in spec.get("egress", []) for port in rule["ports"]}
        tally.equal(egress, _destinations(component, template, documents), f"{where}: ports it may go to")
        for rule in (rule for spec in found for rule in spec.get("egress", [])):
            for peer in rule.get("to", []):
                if peer.get("ipBlock", {}).get("cidr") == "0.0.0.0/0":
                    excepted = peer["ipBlock"]["except"]
                    tally.check("169.254.0.0/16" in excepted, f"{where}: the cloud's metadata stay out of reach")


def _destinations(component: str, template: Manifest, documents: list[Manifest]) -> set[int]:
    """Return the ports that a pod needs, from the addresses and switches in its own variables."""
    (container,) = template["spec"]["containers"]
    given = environment(container)
    wanted = {53}
    if component == "test":
        return wanted | {8000}
    everything = any(document["kind"] == "Ingress" for document in documents)
    if "D2LORA_DATABASE_URL" in given:
        wanted.add(5432)
    if "D2LORA_BROKER_URL" in given:
        wanted.add(6380 if everything else 6379)
    if "D2LORA_STORAGE_BUCKET" in given:
        wanted.add(8333 if everything else 443)
    if given.get("HF_HUB_OFFLINE") == "0":
        wanted.add(443)
    return wanted


def _check_scaler(tally: Tally, where: str, scaler: Manifest, documents: list[Manifest]) -> None:
    spec = scaler["spec"]
    targets = [
        deployment
        for deployment in of_kind(documents, "Deployment")
        if deployment["metadata"]["name"] == spec["scaleTargetRef"]["name"]
    ]
    tally.equal(len(targets), 1, f"{where}: scales a Deployment that there is")
    (trigger,) = spec["triggers"]
    tally.equal(trigger["type"], "postgresql", f"{where}: trigger")
    query = trigger["metadata"]["query"]
    for part in ("FROM initializations", "'queued'", "'running'"):
        tally.check(part in query, f"{where}: {part} in {query}")
    (container,) = targets[0]["spec"]["template"]["spec"]["containers"]
    queues = json.loads(environment(container)["D2LORA_WORKER_QUEUES"] or "[]")
    _, _, asked = query.partition("AND queue IN")
    tally.equal(re.findall(r"'([a-z-]+)'", asked), queues, f"{where}: counts the jobs that its workers take")
    authentications = {
        document["metadata"]["name"]: document for document in of_kind(documents, "TriggerAuthentication")
    }
    reference: Any = authentications.get(trigger["authenticationRef"]["name"], {}).get("spec", {})
    parameters = [entry["parameter"] for entry in reference.get("secretTargetRef", [])]
    tally.equal(parameters, ["connection"], f"{where}: the connection comes from a Secret")


def _check_monitoring(tally: Tally, values: str, documents: list[Manifest]) -> None:
    services = of_kind(documents, "Service")
    for monitor in of_kind(documents, "ServiceMonitor"):
        found = [
            service
            for service in services
            if matches(monitor["spec"]["selector"]["matchLabels"], service["metadata"]["labels"])
        ]
        tally.equal(len(found), 1, f"{values}: the ServiceMonitor finds one Service")
        ports = {port["name"] for service in found for port in service["spec"]["ports"]}
        asked = {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]}
        tally.check(asked <= ports, f"{values}: the ServiceMonitor asks ports that there are")
    for rule in of_kind(documents, "PrometheusRule"):
        for alarm in rule["spec"]["groups"][0]["rules"]:
            names = set(re.findall(r"([a-z_0-9]+)\{", alarm["expr"]))
            tally.check(names and names <= exported() | {"up"}, f"{values}: {alarm['alert']} reads {sorted(names)}")
            tally.equal(alarm["labels"]["severity"] in {"warning", "critical"}, True, f"{values}: {alarm['alert']}")
