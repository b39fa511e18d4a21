"""What has to be so in the manifests that the chart renders."""

from collections.abc import Iterator, Mapping
from typing import Any

from deploy import variables
from deploy.chart import CUSTOM_KINDS
from deploy.tally import Tally

Manifest = dict[str, Any]

_SERVICE_DRAINS_SECONDS = 25
"""What `python -m service` takes at most: 5 s before it is told to stop, 20 s for open requests."""


def check(tally: Tally, manifests: Mapping[str, list[Manifest]]) -> None:
    """Hold the manifests of every values file against what is promised of each."""
    for values, documents in manifests.items():
        for document in documents:
            tally.check(document["kind"] != "Secret", f"{values}: the chart makes no Secret")
            tally.equal(document["metadata"].get("namespace"), "init", f"{values}: namespace of {_name(document)}")
        for document, template in pods(documents):
            where = f"{values}: {_name(document)}"
            _check_pod(tally, where, template["spec"])
            for container in template["spec"]["containers"]:
                _check_container(tally, where, container)
        for deployment in of_kind(documents, "Deployment"):
            _check_deployment(tally, f"{values}: {_name(deployment)}", deployment, documents)
        _check_hooks(tally, values, documents)
    _check_defaults(tally, manifests)


def of_kind(documents: list[Manifest], kind: str) -> list[Manifest]:
    """Return the manifests of one kind."""
    return [document for document in documents if document["kind"] == kind]


def pods(documents: list[Manifest]) -> Iterator[tuple[Manifest, Manifest]]:
    """Yield every manifest that makes pods with its template (metadata and spec)."""
    for document in documents:
        if document["kind"] == "Pod":
            yield document, document
        elif "template" in document.get("spec", {}):
            yield document, document["spec"]["template"]


def environment(container: Manifest) -> dict[str, str | None]:
    """Return a container's variables; None for a value that comes from a Secret."""
    return {entry["name"]: entry.get("value") for entry in container.get("env", [])}


def matches(selector: Manifest, labels: Mapping[str, str]) -> bool:
    """Return whether a selector of labels finds these."""
    return all(labels.get(name) == value for name, value in (selector or {}).items())


def _name(document: Manifest) -> str:
    return f"{document['kind']}/{document['metadata']['name']}"


def _check_pod(tally: Tally, where: str, spec: Manifest) -> None:
    security = spec["securityContext"]
    tally.check(spec["automountServiceAccountToken"] is False, f"{where}: no service account token")
    tally.check(security["runAsNonRoot"] and security["runAsUser"] >= 10000, f"{where}: not root")
    tally.equal(security["seccompProfile"], {"type": "RuntimeDefault"}, f"{where}: seccomp")
    named = {volume["name"] for volume in spec.get("volumes", [])}
    mounted = {mount["name"] for container in spec["containers"] for mount in container["volumeMounts"]}
    tally.equal(mounted, named, f"{where}: volumes mounted and defined")


def _check_container(tally: Tally, where: str, container: Manifest) -> None:
    security = container["securityContext"]
    tally.check(security["readOnlyRootFilesystem"], f"{where}: read-only root filesystem")
    tally.equal(security["capabilities"], {"drop": ["ALL"]}, f"{where}: capabilities")
    tally.check(security["allowPrivilegeEscalation"] is False, f"{where}: no privilege escalation")
    image = container["image"]
    tally.check("@sha256:" in image or (":" in image and not image.endswith(":latest")), f"{where}: {image} is pinned")
    paths = [mount["mountPath"] for mount in container["volumeMounts"]]
    tally.check({"/tmp", "/scratch"} <= set(paths), f"{where}: /tmp and the images' TMPDIR can be written")
    tally.equal(len(set(paths)), len(paths), f"{where}: every path is mounted once")
    for name in ("requests", "limits"):
        tally.check({"cpu", "memory"} <= set(container["resources"][name]), f"{where}: {name} of cpu and memory")
    for mount in container["volumeMounts"]:
        if mount["name"] == "models":
            tally.check(mount.get("readOnly"), f"{where}: models are mounted read-only")

    given = environment(container)
    tally.equal(len(given), len(container.get("env", [])), f"{where}: every variable is set once")
    tally.none(variables.unknown(given), f"{where}: variables that d2lora does not read")
    tally.none(variables.problems(given), f"{where}: values that d2lora cannot read")
    for entry in container.get("env", []):
        if entry["name"] in variables.SECRET or "value" not in entry:
            from_secret = "value" not in entry and "secretKeyRef" in entry.get("valueFrom", {})
            tally.check(from_secret, f"{where}: {entry['name']} comes from a Secret")


def _check_deployment(tally: Tally, where: str, deployment: Manifest, documents: list[Manifest]) -> None:
    spec, template = deployment["spec"], deployment["spec"]["template"]
    labels, pod = template["metadata"]["labels"], template["spec"]
    (container,) = pod["containers"]
    given = environment(container)
    tally.check(matches(spec["selector"]["matchLabels"], labels), f"{where}: selects its own pods")
    tally.equal(len(pod["topologySpreadConstraints"]), 2, f"{where}: spread over nodes and zones")
    budgets = [
        budget
        for budget in of_kind(documents, "PodDisruptionBudget")
        if matches(budget["spec"]["selector"]["matchLabels"], labels)
    ]
    tally.equal(len(budgets), 1, f"{where}: has one disruption budget")
    probes = {name: container.get(name) for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    grace = pod["terminationGracePeriodSeconds"]
    if labels["app.kubernetes.io/component"] == "api":
        asked = {name: probe["httpGet"]["path"] for name, probe in probes.items()}
        wanted = {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}
        tally.equal(asked, wanted, f"{where}: probes")
        tally.check(grace > _SERVICE_DRAINS_SECONDS, f"{where}: open requests may end")
        tally.equal(container["command"], ["python", "-m", "service"], f"{where}: command")
        _check_service(tally, where, container, labels, documents)
        return
    tally.equal(container["command"], ["python", "-m", "worker", "run"], f"{where}: command")
    for name, probe in probes.items():
        tally.equal(probe["exec"]["command"], ["python", "-m", "worker", "alive"], f"{where}: {name}")
    tally.check(given["D2LORA_WORKER_HEARTBEAT_FILE"], f"{where}: the file that the probes look at is set")
    tally.check(
        grace >= float(given["D2LORA_WORKER_GRACE_SECONDS"] or 0) + 15, f"{where}: work can be handed back in {grace} s"
    )
    if "nvidia.com/gpu" in container["resources"]["limits"]:
        tally.equal(given["D2LORA_WORKER_DEVICE"], "cuda", f"{where}: device")
        keys = {toleration.get("key") for toleration in pod.get("tolerations", [])}
        tally.check("nvidia.com/gpu" in keys, f"{where}: tolerates the taint of GPU nodes")
    scaled = [
        scaler
        for scaler in of_kind(documents, "ScaledObject")
        if scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    ]
    tally.equal("replicas" in spec, not scaled, f"{where}: replicas are set by the chart or by KEDA, not by both")


def _check_service(
    tally: Tally, where: str, container: Manifest, labels: Mapping[str, str], documents: list[Manifest]
) -> None:
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    given = environment(container)
    tally.equal(str(ports["http"]), given["D2LORA_SERVICE_PORT"], f"{where}: port")
    tally.equal(str(ports["metrics"]), given["D2LORA_SERVICE_METRICS_PORT"], f"{where}: metrics port")
    for service in of_kind(documents, "Service"):
        found = matches(service["spec"]["selector"], labels)
        tally.check(found, f"{where}: {service['metadata']['name']} finds the API's pods")
        targets = {port["targetPort"] for port in service["spec"]["ports"]}
        tally.check(targets <= set(ports), f"{where}: {service['metadata']['name']} leads to ports that there are")


def _check_hooks(tally: Tally, values: str, documents: list[Manifest]) -> None:
    (job,) = of_kind(documents, "Job")
    hooks = set(job["metadata"]["annotations"]["helm.sh/hook"].split(","))
    tally.equal(hooks, {"pre-install", "pre-upgrade"}, f"{values}: when the migration runs")
    (migration,) = job["spec"]["template"]["spec"]["containers"]
    tally.equal(set(environment(migration)), {"D2LORA_DATABASE_URL"}, f"{values}: the migration's variables")
    tally.equal(migration["command"], ["python", "-m", "service", "migrate"], f"{values}: the migration's command")
    # Before an installation there is nothing else of the chart in the namespace.
    tally.equal(job["spec"]["template"]["spec"]["serviceAccountName"], "default", f"{values}: the migration's account")
    (test,) = of_kind(documents, "Pod")
    tally.equal(test["metadata"]["annotations"]["helm.sh/hook"], "test", f"{values}: helm test")
    (account,) = of_kind(documents, "ServiceAccount")
    tally.check(account["automountServiceAccountToken"] is False, f"{values}: the account hands out no token")


def _check_defaults(tally: Tally, manifests: Mapping[str, list[Manifest]]) -> None:
    """Hold what is off by default, and what is on when everything is."""
    least = next(documents for values, documents in manifests.items() if "minimal" in values)
    most = next(documents for values, documents in manifests.items() if "everything" in values)
    tally.none({document["kind"] for document in least} & (CUSTOM_KINDS | {"Ingress"}), "kinds that are off by default")
    tally.none((CUSTOM_KINDS | {"Ingress"}) - {document["kind"] for document in most}, "kinds that are never rendered")
    containers = [
        container
        for documents in manifests.values()
        for _, template in pods(documents)
        for container in template["spec"]["containers"]
    ]
    rendered = {name for container in containers for name in environment(container)}
    # STORAGE_ROOT is the local store's, which more than one pod cannot share.
    tally.none(variables.known() - rendered - {"D2LORA_STORAGE_ROOT"}, "settings that the chart cannot set")
