"""What no schema says of objects, but must hold among them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.launch.render.clusters import Object

_is_name = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?").fullmatch  # RFC 1035, the narrowest for objects
_is_value = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?").fullmatch
_is_key = re.compile(
    r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
).fullmatch
_is_port_name = re.compile(r"(?=.*[a-z])[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?").fullmatch
_refers = re.compile(r"(?<!\$)(?:\$\$)*\$\(([A-Za-z_][A-Za-z0-9_]*)\)")

MAX_HASHED = 52  # StatefulSets put a hash of 10 characters behind a name in a label
GIVEN_BY_LWS = {"LWS_LEADER_ADDRESS", "LWS_WORKER_INDEX", "LWS_GROUP_SIZE"}
LEADER = {"leaderworkerset.sigs.k8s.io/worker-index": "0"}


def faults(found: Sequence[Object], needed: set[str]) -> list[str]:
    """What does not fit together; `needed` are the Secrets that users are told to make."""
    return [
        *_names(found),
        *_services(found),
        *_budgets(found),
        *_pods(found, needed),
        *_scalers(found),
        *_rest(found),
    ]


def templates(found: Sequence[Object]) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    """All templates of pods: of which object, and whether they serve requests."""
    for one in found:
        name, spec = one["metadata"]["name"], one.get("spec", {})
        if one["kind"] == "Deployment":
            yield name, spec["template"], True
        elif one["kind"] == "LeaderWorkerSet":
            yield from _group(name, spec)
        elif one["kind"] == "DisaggregatedSet":
            for role in spec["roles"]:
                yield from _group(f"{name}/{role['name']}", role["spec"])


def _group(name: str, spec: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    group = spec["leaderWorkerTemplate"]
    leader = group.get("leaderTemplate", group["workerTemplate"])
    yield name, {**leader, "metadata": {"labels": {**leader["metadata"]["labels"], **LEADER}}}, True
    if "leaderTemplate" in group:
        yield f"{name} (others)", group["workerTemplate"], False


def _names(found: Sequence[Object]) -> Iterator[str]:
    for one in found:
        kind, name = one["kind"], one["metadata"]["name"]
        if not _is_name(name):
            yield f"{kind} {name!r}: no name"
        if kind in ("LeaderWorkerSet", "DisaggregatedSet") and len(name) > MAX_HASHED:
            yield f"{kind} {name!r}: too long"
        for labels in _all_labels(one):
            yield from (
                f"{kind} {name}: label {k}={v}"
                for k, v in labels.items()
                if not (_is_key(k) and _is_value(v))
            )
    pairs = [(one["kind"], one["metadata"]["name"]) for one in found]
    yield from (f"{pair} is there twice" for pair in set(pairs) if pairs.count(pair) > 1)


def _all_labels(one: Object) -> Iterator[Mapping[str, str]]:
    yield one["metadata"]["labels"]
    for _, template, _ in templates([one]):
        yield template["metadata"]["labels"]


def _services(found: Sequence[Object]) -> Iterator[str]:
    for service in (one for one in found if one["kind"] == "Service"):
        name, selector = service["metadata"]["name"], service["spec"]["selector"]
        chosen = [template for _, template, _ in templates(found) if _matches(selector, template)]
        if len(chosen) != 1:
            yield f"Service {name}: selects {len(chosen)} kinds of pods"
        for template in chosen:
            names = {port["name"] for port in _ports(template)}
            yield from (f"Service {name}: no port {p}" for p in _targets(service) if p not in names)
    for name, template, serves in templates(found):
        selects = [
            one for one in found if one["kind"] == "Service" and _matches(one["spec"]["selector"], template)
        ]
        if len(selects) != int(serves):
            yield f"{name}: {len(selects)} services select it"


def _targets(service: Object) -> list[str]:
    return [port["targetPort"] for port in service["spec"]["ports"]]


def _matches(selector: Mapping[str, str], template: Mapping[str, Any]) -> bool:
    return selector.items() <= template["metadata"]["labels"].items()


def _ports(template: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    (container,) = template["spec"]["containers"]
    return list(container.get("ports", []))


def _budgets(found: Sequence[Object]) -> Iterator[str]:
    for one in found:
        if one["kind"] == "PodDisruptionBudget":
            spec, name = one["spec"], one["metadata"]["name"]
            if spec.get("maxUnavailable") != 1 or "minAvailable" in spec:
                yield f"PodDisruptionBudget {name}: may block a node for ever"
            if not any(
                _matches(spec["selector"]["matchLabels"], template) for _, template, _ in templates(found)
            ):
                yield f"PodDisruptionBudget {name}: protects nobody"
        elif one["kind"] == "Deployment" and not _matches(
            one["spec"]["selector"]["matchLabels"], one["spec"]["template"]
        ):
            yield f"Deployment {one['metadata']['name']}: does not select its own pods"


def _pods(found: Sequence[Object], needed: set[str]) -> Iterator[str]:
    for name, template, serves in templates(found):
        spec = template["spec"]
        (container,) = spec["containers"]
        ports = {port["name"] for port in _ports(template)}
        yield from (f"{name}: port {port!r}" for port in ports if not _is_port_name(port))
        numbers = [port["containerPort"] for port in _ports(template)]
        if len(set(numbers)) != len(numbers):
            yield f"{name}: a port is there twice"
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            if kind in container and container[kind]["httpGet"]["port"] not in ports:
                yield f"{name}: {kind} asks at a port that there is not"
        if serves and not {"readinessProbe", "livenessProbe"} <= container.keys():
            yield f"{name}: has no probes"
        yield from (f"{name}: {fault}" for fault in _references(container, spec, found, needed))
        yield from (f"{name}: {fault}" for fault in _safety(container, spec))
        yield from (f"{name}: {fault}" for fault in _grace(container, spec))


def _references(container: Object, spec: Object, found: Sequence[Object], needed: set[str]) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounts = [mount["name"] for mount in container["volumeMounts"]]
    if set(mounts) != volumes.keys():
        yield f"mounts {mounts} of {sorted(volumes)}"
    there = {(one["kind"], one["metadata"]["name"]) for one in found}
    for volume in volumes.values():
        if "configMap" in volume and ("ConfigMap", volume["configMap"]["name"]) not in there:
            yield f"no ConfigMap {volume['configMap']['name']}"
        if "secret" in volume and volume["secret"]["secretName"] not in needed:
            yield f"nobody is told of the Secret {volume['secret']['secretName']}"
    sources = [one["valueFrom"] for one in container["env"] if "valueFrom" in one]
    secrets = [source["secretKeyRef"]["name"] for source in sources if "secretKeyRef" in source]
    yield from (f"nobody is told of the Secret {name}" for name in secrets if name not in needed)
    pulls = [one["name"] for one in spec.get("imagePullSecrets", [])]
    yield from (f"nobody is told of the Secret {name}" for name in pulls if name not in needed)
    account = spec.get("serviceAccountName")
    if account is None and spec["automountServiceAccountToken"]:
        yield "has the token of an account"
    if account is not None and ("ServiceAccount", account) not in there:
        yield f"no ServiceAccount {account}"
    yield from _variables(container)


def _variables(container: Object) -> Iterator[str]:
    names = [one["name"] for one in container["env"]]
    if len(names) != len(set(names)):
        yield f"variables twice: {sorted(name for name in names if names.count(name) > 1)}"
    before: set[str] = set(GIVEN_BY_LWS)
    for one in container["env"]:
        used = set(_refers.findall(one.get("value", "")))
        yield from (f"{one['name']} refers to {name} before it is there" for name in used - before)
        before.add(one["name"])
    for word in container["command"]:
        yield from (f"the command refers to {name}" for name in set(_refers.findall(word)) - before)


def _safety(container: Object, spec: Object) -> Iterator[str]:
    pod, own = spec["securityContext"], container["securityContext"]
    if (
        not pod["runAsNonRoot"]
        or pod["runAsUser"] == 0
        or pod["seccompProfile"] != {"type": "RuntimeDefault"}
    ):
        yield "may run as root, or without a filter of system calls"
    if own["allowPrivilegeEscalation"] or own["capabilities"]["drop"] != ["ALL"]:
        yield "may get more rights"
    lost = {t["key"]: t.get("tolerationSeconds") for t in spec["tolerations"]}
    if lost.get("node.kubernetes.io/not-ready") != 30 or lost.get("node.kubernetes.io/unreachable") != 30:
        yield "stays on a lost node"


def _grace(container: Object, spec: Object) -> Iterator[str]:
    stop = container.get("lifecycle", {}).get("preStop", {})
    command = stop.get("exec", {}).get("command", [])
    waits = int(command[-1]) if command else stop.get("sleep", {}).get("seconds", 0)
    if spec["terminationGracePeriodSeconds"] <= waits:
        yield "is killed while it still drains"


def _scalers(found: Sequence[Object]) -> Iterator[str]:
    roles = {
        f"{one['metadata']['name']}-{role['name']}": role
        for one in found
        if one["kind"] == "DisaggregatedSet"
        for role in one["spec"]["roles"]
    }
    scaled: set[tuple[str, str]] = set()
    for one in found:
        if one["kind"] not in ("HorizontalPodAutoscaler", "ScaledObject"):
            continue
        target = one["spec"]["scaleTargetRef"]
        kind, name = target["kind"], target["name"]
        if (kind, name) in scaled:
            yield f"{kind} {name} is scaled twice"
        scaled.add((kind, name))
        if kind == "DisaggregatedSetRoleScaler":
            spec = roles[name]["spec"] if roles.get(name, {}).get("scaling") == {"mode": "External"} else None
        else:
            same = [o for o in found if (o["kind"], o["metadata"]["name"]) == (kind, name)]
            spec = same[0]["spec"] if same and same[0]["apiVersion"] == target["apiVersion"] else None
        if spec is None or "replicas" in spec:
            yield f"{one['kind']} {one['metadata']['name']} fights with {kind} {name}"
    counted = [one for one in found if one["kind"] in ("Deployment", "LeaderWorkerSet")]
    for kind, name, spec in ((one["kind"], one["metadata"]["name"], one["spec"]) for one in counted):
        if "replicas" not in spec and (kind, name) not in scaled:
            yield f"{name} has no replicas"


def _rest(found: Sequence[Object]) -> Iterator[str]:
    there = {(one["kind"], one["metadata"]["name"]) for one in found}
    namespaces = {one["metadata"]["namespace"] for one in found}
    if len(namespaces) != 1:
        yield f"namespaces {sorted(namespaces)}"
    for one in found:
        name = one["metadata"]["name"]
        if one["kind"] == "RoleBinding":
            refers = [(one["roleRef"]["kind"], one["roleRef"]["name"])]
            refers += [(subject["kind"], subject["name"]) for subject in one["subjects"]]
            yield from (f"RoleBinding {name}: no {refer}" for refer in refers if refer not in there)
        elif one["kind"] == "HTTPRoute":
            for backend in one["spec"]["rules"][0]["backendRefs"]:
                (service,) = (
                    o for o in found if (o["kind"], o["metadata"]["name"]) == ("Service", backend["name"])
                )
                if backend["port"] not in [port["port"] for port in service["spec"]["ports"]]:
                    yield f"HTTPRoute {name}: no port {backend['port']}"
        elif one["kind"] == "PodMonitor":
            yield from _monitored(one, found)


def _monitored(monitor: Object, found: Sequence[Object]) -> Iterator[str]:
    selector = monitor["spec"]["selector"]
    chosen = [
        template
        for _, template, serves in templates(found)
        if serves and _matches(selector["matchLabels"], template) and _expressed(selector, template)
    ]
    wanted = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    if not chosen or any(not wanted <= {port["name"] for port in _ports(template)} for template in chosen):
        yield f"PodMonitor {monitor['metadata']['name']}: finds no port"


def _expressed(selector: Mapping[str, Any], template: Mapping[str, Any]) -> bool:
    labels = template["metadata"]["labels"]
    return all(labels.get(one["key"]) in one["values"] for one in selector.get("matchExpressions", []))
