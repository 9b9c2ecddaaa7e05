"""The schemas that objects are held against.

Those of Kubernetes itself come with the package kubernetes-validate. Those of others' kinds are our own, of
the parts that we use, strict: what is not in them is refused. They say what the CRDs of LeaderWorkerSet and
DisaggregatedSet 0.10, KEDA 2.20, the Prometheus operator 0.93 and Gateway API 1.6 take (docs/kubernetes.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from tests.launch.render.clusters import Object

VERSIONS = ("1.35", "1.36", "1.37")
_FOLDER = "kubernetes-json-schema/v{}.0-local-strict"

Schema = Mapping[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "integer", "minimum": 0}
COUNT_OR_SHARE: Schema = {"type": ["integer", "string"]}
ANY: Schema = {}


def _object(required: str = "", **properties: Schema) -> Schema:
    """A mapping with these keys and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def _list(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def _one_of(*values: str) -> Schema:
    return {"enum": [*values]}


_TEMPLATE = _object("spec", metadata={"type": "object"}, spec={"type": "object"})
_SCALING = _object(maxSurge=COUNT_OR_SHARE, maxUnavailable=COUNT_OR_SHARE, partition=NUMBER)
_GROUP_SPEC = _object(
    "leaderWorkerTemplate",
    replicas=NUMBER,
    startupPolicy=_one_of("LeaderCreated", "LeaderReady"),
    rolloutStrategy=_object("type", type=_one_of("RollingUpdate"), rollingUpdateConfiguration=_SCALING),
    leaderWorkerTemplate=_object(
        "workerTemplate",
        size={"type": "integer", "minimum": 1},
        restartPolicy=_one_of("Default", "RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"),
        leaderTemplate=_TEMPLATE,
        workerTemplate=_TEMPLATE,
    ),
)
_ROLE = _object(
    "name",
    name={"type": "string", "maxLength": 63},
    scaling=_object(mode=_one_of("Static", "External")),
    spec=_GROUP_SPEC,
)
_TARGET = _object("name", apiVersion=TEXT, kind=TEXT, name=TEXT)
_TRIGGER = _object(
    "metadata type",
    type=TEXT,
    metricType=TEXT,
    metadata={"type": "object", "additionalProperties": TEXT},
)
_FALLBACK = _object(
    "failureThreshold replicas",
    failureThreshold=NUMBER,
    replicas=NUMBER,
    behavior=_one_of("static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"),
)
_KEY = _object("key", name=TEXT, key=TEXT)
_ENDPOINT = _object(
    port=TEXT,
    path=TEXT,
    interval={"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"},
    scheme=_one_of("http", "https"),
    tlsConfig=_object(insecureSkipVerify={"type": "boolean"}),
    authorization=_object(type=TEXT, credentials=_KEY),
)
_RULE = _object(
    matches=_list(_object(path=_object(type=_one_of("Exact", "PathPrefix"), value=TEXT))),
    backendRefs=_list(_object("name", name=TEXT, port={"type": "integer", "minimum": 1, "maximum": 65535})),
    timeouts=_object(request={"type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"}),
)

OTHERS: Mapping[tuple[str, str], Schema] = {
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): _GROUP_SPEC,
    ("disaggregatedset.x-k8s.io/v1", "DisaggregatedSet"): _object(
        "roles", roles={"type": "array", "items": _ROLE, "minItems": 2, "maxItems": 10}
    ),
    ("keda.sh/v1alpha1", "ScaledObject"): _object(
        "scaleTargetRef triggers",
        scaleTargetRef=_TARGET,
        minReplicaCount=NUMBER,
        maxReplicaCount=NUMBER,
        pollingInterval=NUMBER,
        fallback=_FALLBACK,
        advanced=_object(horizontalPodAutoscalerConfig=_object(behavior=_object(scaleUp=ANY, scaleDown=ANY))),
        triggers=_list(_TRIGGER),
    ),
    ("monitoring.coreos.com/v1", "PodMonitor"): _object(
        "selector podMetricsEndpoints",
        selector=_object(matchLabels=ANY, matchExpressions=ANY),
        podMetricsEndpoints=_list(_ENDPOINT),
    ),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): _object(
        "rules",
        parentRefs=_list(_object("name", name=TEXT, namespace=TEXT)),
        hostnames={"type": "array", "items": {"type": "string", "maxLength": 253}, "maxItems": 16},
        rules=_list(_RULE),
    ),
}


def problems(one: Object) -> list[str]:
    """What the schemas refuse of an object; templates of pods in others' kinds are objects of Kubernetes."""
    own = OTHERS.get((one["apiVersion"], one["kind"]))
    if own is None:
        return [text for version in VERSIONS for text in _refused(_kubernetes(version, one), one)]
    found = _refused(_validator(json.dumps(own)), one["spec"])
    return found + [text for pod in _templates(one["spec"]) for text in problems(_as_pod(pod))]


def _templates(tree: Any) -> list[Object]:
    if isinstance(tree, list):
        return [found for item in tree for found in _templates(item)]
    if not isinstance(tree, dict):
        return []
    own = [value for key, value in tree.items() if key in ("leaderTemplate", "workerTemplate")]
    return own + [
        found
        for key, value in tree.items()
        if key not in ("leaderTemplate", "workerTemplate")
        for found in _templates(value)
    ]


def _as_pod(template: Object) -> Object:
    metadata = {**template["metadata"], "name": "pod"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def _refused(validator: Any, data: Any) -> list[str]:
    return [
        f"{'.'.join(map(str, error.path))}: {error.message[:300]}" for error in validator.iter_errors(data)
    ]


@cache
def _validator(schema: str) -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(json.loads(schema))


def _kubernetes(version: str, one: Object) -> Any:
    api = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", one["apiVersion"])
    return _of_kind(version, f"{one['kind'].lower()}-{api}")


@cache
def _of_kind(version: str, name: str) -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(_read(version, name), registry=_registry(version))


@cache
def _registry(version: str) -> Any:
    from referencing import Registry, Resource

    return Resource.from_contents(_read(version, "_definitions")) @ Registry()


def _read(version: str, name: str) -> Any:
    folder = files("kubernetes_validate") / _FOLDER.format(version)
    return json.loads((folder / f"{name}.json").read_text("utf-8"))
