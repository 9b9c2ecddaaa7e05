"""`baton render` makes Kubernetes objects of a config; these options say how."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from orchestrator.config.base import Model

MAX_NAME = 12  # what is put behind it must fit into 63 characters
MAX_PODS = 4096

_is_label = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?").fullmatch
_is_namespace = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?").fullmatch
_is_object = re.compile(
    r"(?=.{1,253}\Z)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
).fullmatch
_is_quantity = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?").fullmatch
_is_variable = re.compile(r"[A-Za-z_][A-Za-z0-9_]*").fullmatch
_is_qualified = re.compile(
    r"((?=[^/]{1,253}/)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?"
    r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
).fullmatch
_is_label_value = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?").fullmatch
_is_image = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*").fullmatch
_is_key = re.compile(r"[A-Za-z0-9._-]{1,253}").fullmatch
_is_host = re.compile(
    r"(?=.{1,253}\Z)(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
).fullmatch


def _short_name(value: str) -> str:
    if not _is_label(value) or len(value) > MAX_NAME:
        raise ValueError(f"expected at most {MAX_NAME} lower-case letters, digits and hyphens, got {value!r}")
    return value


def _namespace(value: str) -> str:
    if not _is_namespace(value):
        raise ValueError(f"expected the name of a namespace, such as llm-serving, got {value!r}")
    return value


def _object_name(value: str) -> str:
    if not _is_object(value):
        raise ValueError(
            f"expected the name of an object: lower-case letters, digits, - and ., got {value!r}"
        )
    return value


def _gateway(value: str) -> str:
    namespace, slash, name = value.rpartition("/")
    if not _is_object(name) or (slash and not _is_namespace(namespace)):
        raise ValueError(f"expected the name of a Gateway, or NAMESPACE/NAME, got {value!r}")
    return value


def _secret_key(value: str) -> str:
    name, slash, key = value.partition("/")
    if not slash or not _is_object(name) or not _is_key(key):
        raise ValueError("expected SECRET/KEY: the name of a Secret, and the key in it; never what is in it")
    return value


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _quantity(value: str) -> str:
    if not _is_quantity(value):
        raise ValueError(f"expected a quantity of Kubernetes, such as 4, 500m or 16Gi, got {value!r}")
    return value


def _variable(value: str) -> str:
    if not _is_variable(value):
        raise ValueError(f"expected the name of a variable, got {value!r}")
    return value


def _qualified(value: str) -> str:
    if not _is_qualified(value):
        raise ValueError(f"expected a name such as nvidia.com/gpu, got {value!r}")
    return value


def _label_value(value: str) -> str:
    if not _is_label_value(value):
        raise ValueError(
            f"expected the value of a label: at most 63 letters, digits, -, _ and ., got {value!r}"
        )
    return value


def _image(value: str) -> str:
    if not _is_image(value):
        raise ValueError(f"expected an image, such as registry.example/baton-worker:1, got {value!r}")
    return value


def _hostname(value: str) -> str:
    if not _is_host(value):
        raise ValueError(f"expected a host name in lower case, or *.NAME, got {value!r}")
    return value


def _server(value: str) -> str:
    if not re.fullmatch(r"https?://[^\s@?#]+", value):
        raise ValueError("expected http(s)://HOST:PORT, without a user or a query")
    return value


def _absolute(value: str) -> str:
    if not value.startswith("/") or ".." in value.split("/") or not value.isprintable():
        raise ValueError(f"expected an absolute path of the nodes, got {value!r}")
    return value


def _model_place(value: str) -> str:
    if not value.isprintable() or value.startswith((".", "~", "-")):
        raise ValueError(f"expected an absolute path in the pods, or ORG/NAME of the hub, got {value!r}")
    return value


ShortName = Annotated[str, AfterValidator(_short_name)]
Namespace = Annotated[str, AfterValidator(_namespace)]
ObjectName = Annotated[str, AfterValidator(_object_name)]
GatewayName = Annotated[str, AfterValidator(_gateway)]
SecretKey = Annotated[str, AfterValidator(_secret_key)]
Quantity = Annotated[str, BeforeValidator(_as_text), AfterValidator(_quantity)]
PodVariable = Annotated[str, AfterValidator(_variable)]
ResourceName = Annotated[str, AfterValidator(_qualified)]
LabelValue = Annotated[str, BeforeValidator(_as_text), AfterValidator(_label_value)]
Image = Annotated[str, AfterValidator(_image)]
HostName = Annotated[str, AfterValidator(_hostname)]
Server = Annotated[str, AfterValidator(_server)]
HostPath = Annotated[str, AfterValidator(_absolute)]
ModelPlace = Annotated[str, Field(min_length=1), AfterValidator(_model_place)]


class PodConfig(Model):
    """Pods of one kind have these resources, variables and nodes."""

    cpu: Quantity | None = Field(
        None,
        description="Each pod asks for this much CPU. Without it a worker on a GPU asks for 4, one on CPUs "
        "for 2, a simulated one for 100m, and an orchestrator for one for each of its processes.",
    )
    memory: Quantity | None = Field(
        None,
        description="Each pod asks for this much memory, and is ended above it. Without it a worker on a GPU "
        "asks for 32Gi, one on CPUs for 8Gi, a simulated one for 256Mi, an orchestrator for 1Gi, and all may "
        "use more.",
    )
    resources: dict[ResourceName, Quantity] = Field(
        {}, description="Each pod gets these resources too, such as `rdma/hca: 1`."
    )
    env: dict[PodVariable, Annotated[str, BeforeValidator(_as_text)]] = Field(
        {}, description="Each pod gets these environment variables, none of which may hold a secret."
    )
    secret_env: dict[PodVariable, SecretKey] = Field(
        {},
        description="Each pod gets these environment variables out of Secrets: `HF_TOKEN: my-secret/token`.",
    )
    node_selector: dict[ResourceName, LabelValue] = Field(
        {}, description="Pods run on nodes with these labels only."
    )


class SecretsConfig(Model):
    """Secrets are named here, never what is in them. You create them before the objects are applied."""

    worker_key: ObjectName | None = Field(
        "baton-worker-key",
        description="The key `key` of this Secret is the credential between orchestrators and workers "
        "(BATON_WORKER_API_KEY). If it is null, workers ask for none.",
    )
    api_keys: ObjectName | None = Field(
        None,
        description="The key `keys` of this Secret is the file of API keys (orchestrator.api_keys_file) that "
        "orchestrators read. Without it, this is baton-api-keys if the config names such a file.",
    )
    metrics_key: ObjectName = Field(
        "baton-metrics-key",
        description="The key `key` of this Secret is an API key with the scope `metrics`, which Prometheus "
        "sends; it is not used without API keys.",
    )
    tls: ObjectName = Field(
        "baton-tls",
        description="This Secret of type kubernetes.io/tls holds the certificate of orchestrator.tls.",
    )
    hf_token: ObjectName | None = Field(
        None, description="The key `token` of this Secret is the token of the hub (HF_TOKEN) for workers."
    )


class VolumesConfig(Model):
    """Workers keep downloaded models and compiled kernels in a volume, which is mounted at /cache."""

    claim: ObjectName | None = Field(
        None,
        description="The volume is of this PersistentVolumeClaim, which all workers share (ReadWriteMany).",
    )
    host_path: HostPath | None = Field(
        None,
        description="The volume is this folder of each node; the user 10001 must be able to write there.",
    )
    size: Quantity = Field(
        "200Gi",
        description="Without claim and host_path the volume is of the pod's own and ends with it; it has at "
        "most this size.",
    )
    shm: Quantity = Field(
        "16Gi", description="The shared memory (/dev/shm) of a worker has at most this size; it is memory."
    )


class PullConfig(Model):
    """Nodes get images as this says."""

    policy: Literal["IfNotPresent", "Always", "Never"] = Field(
        "IfNotPresent", description="Images are pulled if they are not there, always, or never."
    )
    secrets: list[ObjectName] = Field([], description="Images are pulled with these Secrets.")


class KubernetesRenderConfig(Model):
    """`baton render` makes Kubernetes objects or a Helm chart of this file."""

    name: ShortName = Field("baton", description="This is what the names of all objects begin with.")
    namespace: Namespace = Field("default", description="All objects are in this namespace.")
    image: Image = Field(description="Workers run this image: the target `worker` of Baton's Dockerfile.")
    orchestrator_image: Image | None = Field(
        None,
        description="Orchestrators run this image: the target `orchestrator` of Baton's Dockerfile. Without "
        "it they run that of the workers, which holds Baton too.",
    )
    pull: PullConfig = Field(PullConfig(), description="This section says how nodes get images.")
    plugin: bool = Field(
        True,
        description="The image of the workers has Baton's plugin. Without it workers are plain vLLM, probed "
        "at /health, and cannot be asked to drain.",
    )
    orchestrators: int = Field(
        2,
        ge=1,
        le=MAX_PODS,
        description="At least this many orchestrators run; they need not know each other.",
    )
    max_orchestrators: int = Field(
        8,
        ge=1,
        le=MAX_PODS,
        description="At most this many orchestrators run, by their use of CPU; if that is not more than "
        "`orchestrators`, their number is fixed.",
    )
    workload: Literal["deployment", "lws", "disaggregatedset"] = Field(
        "deployment",
        description="The workers of a role are a Deployment, a LeaderWorkerSet (lws), or those of prefill "
        "and decode are a DisaggregatedSet, which rolls them together. An engine that spans several pods is "
        "a LeaderWorkerSet in any case.",
    )
    gpu_resource: ResourceName = Field("nvidia.com/gpu", description="GPUs are asked for under this name.")
    gpus_per_pod: int = Field(
        8,
        ge=1,
        le=1024,
        description="A pod has at most this many GPUs; an engine with more spans several pods.",
    )
    spare_gpus: bool = Field(
        True,
        description="There are GPUs for one more pod in each pool, so that a new worker starts before an old "
        "one ends. Without them the old one is drained and ends first.",
    )
    autoscale: Literal["none", "hpa", "keda"] = Field(
        "none",
        description="Pools whose replicas have min and max follow baton_wanted_workers: by a "
        "HorizontalPodAutoscaler on an external metric (hpa), a ScaledObject of KEDA (keda), or not.",
    )
    prometheus: Server = Field(
        "http://prometheus-operated.monitoring.svc:9090",
        description="KEDA asks this Prometheus for baton_wanted_workers.",
    )
    monitoring: bool = Field(
        True, description="PodMonitors have Prometheus (its operator) read the metrics of all pods."
    )
    monitoring_namespace: Namespace = Field(
        "monitoring", description="Pods of this namespace may read metrics; it is where Prometheus runs."
    )
    network_policy: bool = Field(
        True, description="NetworkPolicies are made, so that pods reach only what they need."
    )
    service_type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = Field(
        "ClusterIP", description="The Service of the orchestrators is of this type."
    )
    gateway: GatewayName | None = Field(
        None,
        description="An HTTPRoute is made from this Gateway to the orchestrators: NAME or NAMESPACE/NAME.",
    )
    hostnames: list[HostName] = Field(
        [], max_length=16, description="The HTTPRoute is for these names; without any for all."
    )
    models: dict[str, ModelPlace] = Field(
        {},
        description="Pods load these models, by their names, from another place than `path` says: "
        "`qwen: /cache/models/qwen`.",
    )
    volumes: VolumesConfig = Field(
        VolumesConfig(), description="This section says which volume keeps the models that workers load."
    )
    secrets: SecretsConfig = Field(SecretsConfig(), description="This section says which Secrets pods use.")
    worker_pod: PodConfig = Field(PodConfig(), description="This section describes the pods of workers.")
    orchestrator_pod: PodConfig = Field(
        PodConfig(), description="This section describes the pods of orchestrators."
    )
