"""All objects are made of this: the config, and for each pool that Baton starts what its pods run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from launch.engines import ENGINES
from launch.engines.base import PlanError, Span, Surroundings
from launch.plan import ProcessSpec, orchestrator_process, worker_process
from launch.render.errors import RenderError
from launch.render.names import MAX_SHORT_SLUG, digest, slug
from launch.render.tree import Value
from orchestrator.config.addresses import WorkerAddress, WorkerPlace
from orchestrator.config.kubernetes import KubernetesRenderConfig
from orchestrator.config.options import Config, ModelConfig, PoolConfig, WorkerConfig, split_address
from orchestrator.wire.info import WORKER_KEY_ENV, Role

# Every pod has all ports to itself.
WORKER_PORT = 8100
SIDE_CHANNEL_PORT = 9100
LISTEN_PORT = 8000
ADMIN_PORT = 8001

CONFIG_FILE = "/etc/baton/config/baton.yaml"

# Kubernetes puts the values of these in their places when it starts a pod.
POD_IP = "$(POD_IP)"
WORKER_KEY = f"$({WORKER_KEY_ENV})"
LEADER_ADDRESS = "$(LWS_LEADER_ADDRESS)"
WORKER_INDEX = "$(LWS_WORKER_INDEX)"
EXPANDED = (POD_IP, WORKER_KEY, LEADER_ADDRESS, WORKER_INDEX)

_LISTEN = "0.0.0.0"
_LEADER_RANK = "0"
_REVISION_DIGITS = 10
_NO_SECTION = (
    "launch.kubernetes is missing: name the image of the workers, in the file or with "
    "--set launch.kubernetes.image=IMAGE"
)


@dataclass(frozen=True, slots=True)
class RolePool:
    """The workers of one role of a model, as pods."""

    model: ModelConfig
    role: Role
    pool: PoolConfig
    name: str  # of its objects
    leader: ProcessSpec  # what the pod runs that serves requests
    follower: ProcessSpec | None  # what the other pods of an engine run
    span: int  # pods of one engine
    least: int  # replicas
    most: int | None  # None: their number is fixed
    is_plain: bool  # vLLM without our plugin: it announces no revision, readiness or load

    @property
    def gpus_per_pod(self) -> int:
        takes = ENGINES[self.pool.engine].takes_gpus(self.pool)
        return self.pool.gpus_per_replica // self.span if takes else 0

    @property
    def kv_event_ports(self) -> tuple[int, ...]:
        """Return where the orchestrators hear its KV events, if they do."""
        used = {WORKER_PORT, *range(SIDE_CHANNEL_PORT, SIDE_CHANNEL_PORT + self.pool.data_parallel_size)}
        return tuple(port for _, port in self.leader.listens if port not in used)


@dataclass(frozen=True)
class Cluster:
    """The config with all pools that become pods."""

    config: Config
    options: KubernetesRenderConfig
    pools: tuple[RolePool, ...]
    orchestrator: ProcessSpec

    @property
    def name(self) -> str:
        return self.options.name

    @property
    def namespace(self) -> Value:
        return Value(self.options.namespace, ".Release.Namespace")

    @property
    def image(self) -> Value:
        return Value(self.options.image, ".Values.image")

    @property
    def orchestrator_image(self) -> Value:
        return Value(self.options.orchestrator_image or self.options.image, ".Values.orchestratorImage")

    @property
    def listen_port(self) -> int:
        """Return where clients reach the Service: where the config listens."""
        return split_address(self.config.orchestrator.listen)[1] or LISTEN_PORT

    @property
    def api_keys_secret(self) -> str | None:
        """Return the Secret of the API keys; None if nobody needs one."""
        given = self.options.secrets.api_keys
        return given or ("baton-api-keys" if self.config.orchestrator.api_keys_file is not None else None)

    @property
    def has_tls(self) -> bool:
        return self.config.orchestrator.tls is not None

    @property
    def max_orchestrators(self) -> int:
        return max(self.options.orchestrators, self.options.max_orchestrators)

    @property
    def drain_s(self) -> int:
        """Return how long a request may take whose worker or orchestrator is to end, in seconds."""
        return math.ceil(self.config.orchestrator.limits.request_timeout_s)

    def is_autoscaled(self, pool: RolePool) -> bool:
        return pool.most is not None and self.options.autoscale != "none"

    def replicas_of(self, pool: RolePool) -> Value | None:
        """Return the replicas of a pool; None if something else decides how many there are."""
        if self.is_autoscaled(pool):
            return None
        return Value(pool.least, f"index .Values.replicas {json.dumps(pool.name)}")

    def of_model(self, model: ModelConfig) -> tuple[RolePool, ...]:
        return tuple(pool for pool in self.pools if pool.model.name == model.name)

    def set_name(self, model: ModelConfig) -> str:
        """Return the name of a model's DisaggregatedSet."""
        return f"{self.name}-{slug(model.name, MAX_SHORT_SLUG)}"

    @cached_property
    def _revisions(self) -> Mapping[str, Value]:
        return {pool.model.name: self._revision(pool.model) for pool in self.pools}

    def revision_of(self, pool: RolePool) -> Value:
        """Return what both roles of a model have in common: it changes if the image or a command does."""
        return self._revisions[pool.model.name]

    def _revision(self, model: ModelConfig) -> Value:
        specs = [spec for pool in self.of_model(model) for spec in (pool.leader, pool.follower) if spec]
        rest = digest(json.dumps([[spec.argv, dict(spec.env)] for spec in specs], sort_keys=True), 16)
        default = digest(f"{self.options.image}\n{rest}", _REVISION_DIGITS)
        template = f'printf "%s\\n{rest}" .Values.image | sha256sum | trunc {_REVISION_DIGITS}'
        return Value(default, template)


def make_cluster(config: Config) -> Cluster:
    """Return what all objects are made of. Raises `RenderError`."""
    if config.launch.kubernetes is None:
        raise RenderError(_NO_SECTION)
    options = config.launch.kubernetes
    around = _surroundings(options)
    try:
        pools = tuple(_pools(config, options, around))
        orchestrator = orchestrator_process(config, CONFIG_FILE, (), around)
    except PlanError as error:
        raise RenderError(str(error)) from error
    return Cluster(config, options, pools, orchestrator)


def _surroundings(options: KubernetesRenderConfig) -> Surroundings:
    """Return what a pod is surrounded by: nothing of this machine."""
    environ = {} if options.secrets.worker_key is None else {WORKER_KEY_ENV: WORKER_KEY}
    return Surroundings(
        python="python3",
        environ=environ,
        vllm_plugins=(),
        is_directory=lambda path: path.startswith("/"),
        is_here=lambda _: True,
    )


def _pools(config: Config, options: KubernetesRenderConfig, around: Surroundings) -> Iterator[RolePool]:
    for model in config.models:
        placed = options.models.get(model.name)
        model = model if placed is None else model.model_copy(update={"path": placed})
        for role, pool in model.pools():
            if is_rendered(pool):
                yield _role_pool(config, options, around, model, role, pool)


def is_rendered(pool: PoolConfig) -> bool:
    """Tell whether the pods of a pool are ours; others have their workers run elsewhere."""
    return pool.is_managed


def replicas(pool: PoolConfig) -> tuple[int, int | None]:
    """Return the least and the most replicas; there is no most if their number is fixed."""
    given = pool.replicas
    if given is None or isinstance(given, int):
        return given or 1, None
    return given.min, given.max


def span_of(pool: PoolConfig, options: KubernetesRenderConfig) -> int:
    """Return over how many pods one engine spans."""
    takes = ENGINES[pool.engine].takes_gpus(pool)
    return max(1, math.ceil(pool.gpus_per_replica / options.gpus_per_pod)) if takes else 1


def _role_pool(
    config: Config,
    options: KubernetesRenderConfig,
    around: Surroundings,
    model: ModelConfig,
    role: Role,
    pool: PoolConfig,
) -> RolePool:
    place, size = WorkerPlace(model, role, 0, pool, WorkerConfig()), span_of(pool, options)
    gpus = tuple(range(pool.gpus_per_replica)) if ENGINES[pool.engine].takes_gpus(pool) else ()
    specs = [
        worker_process(config, place, _address(place), gpus, around, listens_at=_LISTEN, span=span)
        for span in _spans(size)
    ]
    leader, *followers = [_in_a_pod(spec, options, pool) for spec in specs]
    least, most = replicas(pool)
    return RolePool(
        model=model,
        role=role,
        pool=pool,
        name=f"{options.name}-{slug(model.name)}-{role}",
        leader=leader,
        follower=followers[0] if followers else None,
        span=size,
        least=least,
        most=most,
        is_plain=pool.engine == "vllm" and not options.plugin,
    )


def _spans(size: int) -> list[Span | None]:
    ranks = (_LEADER_RANK, WORKER_INDEX)
    return [None] if size == 1 else [Span(size, rank, LEADER_ADDRESS) for rank in ranks]


def _address(place: WorkerPlace) -> WorkerAddress:
    return WorkerAddress(
        name=place.name,
        model=place.model.name,
        served_model=place.pool.served_model or place.model.name,
        role=place.role,
        url=f"http://{POD_IP}:{WORKER_PORT}",
        host=POD_IP,
        port=WORKER_PORT,
        side_channel_port=SIDE_CHANNEL_PORT,
        is_managed=True,
        zone=place.pool.zone,
    )


def _in_a_pod(spec: ProcessSpec, options: KubernetesRenderConfig, pool: PoolConfig) -> ProcessSpec:
    """Return the process without what only a machine of several workers needs."""
    env = dict(spec.env)
    if "CUDA_VISIBLE_DEVICES" not in pool.env:
        env.pop("CUDA_VISIBLE_DEVICES", None)  # a pod sees its own GPUs only
    if not options.plugin:
        env.pop("VLLM_PLUGINS", None)
        env.update({name: value for name, value in pool.env.items() if name == "VLLM_PLUGINS"})
    return ProcessSpec(
        spec.name, spec.role, spec.argv, env, spec.ready_url, spec.listens, spec.log_name, spec.gpus
    )
