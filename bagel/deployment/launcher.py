"""Start, watch and stop all services of a deploy file on this machine. No torch here.

Each service is a process of its own, `python -m bagel_thinker` and so on, which gets its whole configuration. This
module imports none of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bagel.deployment import serving
from bagel.deployment.configs import GATEWAY, settings_named
from bagel.deployment.dit_config import DitConfig
from bagel.deployment.gateway_config import GatewayConfig
from bagel.deployment.gpus import check_device
from bagel.deployment.process import POLL_S, Logs, Service
from bagel.deployment.schema import DeployConfig, StageDeploy
from bagel.deployment.settings import JSON_FLAG
from bagel.deployment.shared_gpu import leaving_room, measures_shared_gpu
from bagel.deployment.shared_settings import Listening, OfModel
from bagel.deployment.thinker_config import ThinkerConfig
from bagel.errors import ConfigError, InitTimeout
from bagel.rpc.deadlines import deadline_of
from bagel.rpc.transport import PLAINTEXT, Security, sync_channel

UNREACHABLE = "unreachable"
LOOPBACK = "127.0.0.1"
KILL_AFTER_S = 5.0
"""Seconds after its drain time when a service that still runs is killed."""

OnReady = Callable[[str, str, float], None]
"""Called with (name, address, seconds since the start) when a service is ready."""


class Deployment:
    """The services of a deploy file, running from `with` to its end.

    model: a checkpoint folder; name: its name in messages. The gateway listens on host and gateway_port (0: any free
    one), the other services on loopback. settings: of the services, by the names of their fields; each goes to every
    service that has it (`settings_named`). device: auto, cpu, cuda (the deploy file's GPUs) or cuda:N. The settings of
    TLS apply to the gateway's callers. api_keys: the file of the keys that callers need; None: no keys, even if
    BAGEL_API_KEYS_FILE is set.
    Raises ConfigError for settings that are wrong. Entering raises InitTimeout, naming the stage, if one is not ready
    after init_timeout_s seconds; if a service ends, it raises that service's BagelError.
    """

    def __init__(
        self,
        config: DeployConfig,
        model: str | Path,
        *,
        name: str | None = None,
        host: str = LOOPBACK,
        gateway_port: int = 0,
        init_timeout_s: float = 300,
        logs: Logs = None,
        on_ready: OnReady | None = None,
        env: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        self.config, self._name = config, name or str(model)
        self._init_timeout_s, self._logs, self._on_ready = init_timeout_s, logs, on_ready
        self._env = {**os.environ, **(env or {})}
        check_device(settings.get("device") or "auto")
        self._stages = _stage_configs(config, str(model), settings)
        listen = f"{f'[{host}]' if ':' in host else host}:{gateway_port}"
        self._gateway = _gateway_config(config, listen, self._name, settings)
        _refuse_without_service(settings, [*(spec.model_stage for spec in config.spec.stages), GATEWAY])
        self._began = 0.0
        self.services: list[Service] = []
        """Thinker, DiT, gateway: in the order of their start."""
        self.address = ""
        """The gateway's host:port, once entered."""
        self.http = ""
        """The host:port of the OpenAI API, if there is one."""

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        try:
            self._start(self._began + self._init_timeout_s)
        except BaseException:
            self._end_now()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def check(self) -> None:
        """Raise BagelError, naming the stage, if a service has ended."""
        for service in self.services:
            service.check()

    def stop(self) -> None:
        """Stop the services, the gateway first. Each drains, so that no service calls one that has already ended.

        Their last exports of telemetry run at the same time, since a collector that is gone costs each some seconds.
        """
        try:
            for service in reversed(self.services):
                service.tell_to_stop()
                service.until_stopped(self._gateway.drain_timeout_s + KILL_AFTER_S)
            deadline = time.monotonic() + KILL_AFTER_S
            while self.services:
                self.services[-1].end(max(0.0, deadline - time.monotonic()))
                self.services.pop()
        except BaseException:  # a second Ctrl-C
            self._end_now(0)
            raise

    def _end_now(self, limit_s: float = KILL_AFTER_S) -> None:
        for service in self.services:
            service.tell_to_stop()
        deadline = time.monotonic() + limit_s
        while self.services:
            self.services[-1].end(max(0.0, deadline - time.monotonic()))
            self.services.pop()

    def _start(self, deadline: float) -> None:
        waiting: dict[str, Service] = {}
        try:
            addresses: dict[str, str] = {}
            feeds: dict[int, str] = {}
            stages = [self.config.stage(spec.stage_id) for spec in self.config.spec.stages]
            # One after the other, since a DiT needs the address of its Thinker; loading then runs at the same time.
            for i, (spec, service) in enumerate(zip(self.config.spec.stages, self._stages, strict=True)):
                if isinstance(service, DitConfig):
                    service = replace(service, sources=tuple(feeds[source] for source in spec.input_sources))
                later = list(zip(self._stages[i + 1 :], stages[i + 1 :], strict=True))
                first = measures_shared_gpu(service, stages[i], later)
                service = leaving_room(service) if first else service
                title = f"stage {spec.stage_id} ({spec.model_stage})"
                waiting[service.name] = self._launch(service.name, title, service, stages[i])
                addresses[service.name] = waiting[service.name].address(deadline)
                feeds[spec.stage_id] = f"{service.name}={addresses[service.name]}"
                if first:  # nothing may load beside it
                    self._until_ready(waiting, addresses, deadline)
            gateway = replace(self._gateway, thinkers=_at(addresses, "thinker"), dits=_at(addresses, "dit"))
            waiting[GATEWAY] = self._launch(GATEWAY, "the gateway", gateway)
            addresses[GATEWAY] = waiting[GATEWAY].address(deadline)
            self._until_ready(waiting, addresses, deadline)
        except TimeoutError:
            self._raise_late(waiting)
        self.address, self.http = addresses[GATEWAY], self.services[-1].http

    def _until_ready(self, waiting: dict[str, Service], addresses: Mapping[str, str], deadline: float) -> None:
        """Wait until every service is ready; removes the ready ones from `waiting`."""
        while waiting:
            self.check()
            for name in list(waiting):
                if self._is_ready(waiting[name], addresses[name]):
                    del waiting[name]
                    if self._on_ready:
                        self._on_ready(name, addresses[name], time.monotonic() - self._began)
            if waiting and time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(POLL_S if waiting else 0)

    def _is_ready(self, service: Service, address: str) -> bool:
        """Whether a service reports that it is ready."""
        # A gateway with TLS prints it: its certificate may be for another name than the loopback address.
        if service.name == GATEWAY and self._gateway.tls_certificate is not None:
            return service.said_ready
        return is_serving(address)

    def _raise_late(self, waiting: Mapping[str, Service]) -> NoReturn:
        stages = [service.title for name, service in waiting.items() if name != GATEWAY]
        names = " and ".join(stages or ["the gateway"])
        was = "were" if len(stages) > 1 else "was"
        raise InitTimeout(
            f"{names} {was} not ready after {self._init_timeout_s:g} s of loading {self._name}; raise init_timeout"
        ) from None

    def _launch(self, name: str, title: str, config: Listening, stage: StageDeploy | None = None) -> Service:
        env = dict(self._env)
        here = not isinstance(config, DitConfig) or config.ray_address is None  # a cluster gives out its own GPUs
        if here and stage is not None and isinstance(config, OfModel) and config.device in ("auto", "cuda"):
            env["CUDA_VISIBLE_DEVICES"] = _visible_gpus(stage, env.get("CUDA_VISIBLE_DEVICES"))
        service = Service(name, title, config.MODULE, [JSON_FLAG, config.to_json()], env, self._logs)
        self.services.append(service)
        return service


def _stage_configs(config: DeployConfig, model: str, settings: Mapping[str, Any]) -> list[ThinkerConfig | DitConfig]:
    """The configurations of the stages' services; a DiT gets its sources once they listen."""
    found: list[ThinkerConfig | DitConfig] = []
    for spec in config.spec.stages:
        role, stage = spec.model_stage, config.stage(spec.stage_id)
        own = {"model": model, "listen": f"{LOOPBACK}:0", "name": f"{role}-0", **_asked_of(role, settings)}
        if role == "thinker":
            found.append(ThinkerConfig(**{**stage.settings(ThinkerConfig), **own}))
        else:
            own["single_stage"] = not spec.omni_kv_config.need_recv_cache
            found.append(DitConfig(**{**stage.settings(DitConfig), **own}))
    return found


def _gateway_config(config: DeployConfig, listen: str, name: str, settings: Mapping[str, Any]) -> GatewayConfig:
    """The gateway's configuration, with addresses that are known once the stages listen."""
    asked = _asked_of(GATEWAY, settings)
    nowhere = {f"{spec.model_stage}-0": f"{LOOPBACK}:0" for spec in config.spec.stages}
    own: dict[str, Any] = {
        "listen": listen,
        "pipeline": config.pipeline,
        "sampling_defaults": config.sampling_defaults(),
        "api_keys": None,
        "served_model_names": (name,) if asked.get("http") is not None else (),
        "plaintext_services": asked.get("tls_certificate") is not None,
        "thinkers": _at(nowhere, "thinker"),
        "dits": _at(nowhere, "dit"),
    }
    gateway = GatewayConfig(**{**own, **asked})
    serving.security(gateway).check_server()
    return gateway


def _asked_of(role: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of this service, out of those of all services."""
    return {name: value for name, value in settings.items() if role in settings_named(name)}


def _at(addresses: Mapping[str, str], role: str) -> tuple[str, ...]:
    """The addresses of the services of a role, as the gateway's settings have them."""
    return tuple(f"{name}={address}" for name, address in addresses.items() if name.startswith(f"{role}-"))


def _refuse_without_service(settings: Mapping[str, Any], started: Collection[str]) -> None:
    """Raise ConfigError for a setting of a service that is not started."""
    for name in settings:
        if not (found := settings_named(name)):
            raise ConfigError(f"{name} is no setting of a service")
        if not found.keys() & set(started):
            role, each = next(iter(found.items()))
            raise ConfigError(f"{each.flag} is of the {role}, which this deploy file does not start; leave it out")


def is_serving(address: str, timeout_s: float = 1.0, security: Security = PLAINTEXT) -> bool:
    """Whether the service at an address reports that it is ready (grpc.health.v1)."""
    return health_of(address, timeout_s, security) == "SERVING"


def health_of(address: str, timeout_s: float, security: Security = PLAINTEXT) -> str:
    """The state that the service at an address reports (a ServingStatus of grpc.health.v1), or "unreachable"."""
    with sync_channel(reachable(address), security) as channel:
        check: Any = health_pb2_grpc.HealthStub(channel).Check
        try:
            answer = check(health_pb2.HealthCheckRequest(), timeout=deadline_of(timeout_s), wait_for_ready=True)
        except grpc.RpcError:
            return UNREACHABLE
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def reachable(address: str) -> str:
    """The address at which this machine calls a service: loopback, if the service listens on all interfaces."""
    for everywhere, here in (("0.0.0.0:", f"{LOOPBACK}:"), ("[::]:", "[::1]:")):
        if address.startswith(everywhere):
            return here + address.removeprefix(everywhere)
    return address


def _visible_gpus(stage: StageDeploy, visible: str | None) -> str:
    """The value of CUDA_VISIBLE_DEVICES for a stage, whose device numbers count the GPUs that are visible to us."""
    if visible is None:
        # Checked here, since torch would see no GPU and take the CPU without a word.
        if (count := _gpus_here()) and max(stage.device_ids) >= count:
            raise ConfigError(f"{stage.where}.devices is {stage.devices!r}; this machine's highest GPU is {count - 1}")
        return ",".join(map(str, stage.device_ids))
    if not visible.strip():
        return visible
    gpus = [gpu.strip() for gpu in visible.split(",")]
    if "-1" in gpus:  # CUDA's way to hide all GPUs
        return visible
    if max(stage.device_ids) >= len(gpus):
        raise ConfigError(
            f"{stage.where}.devices is {stage.devices!r}; CUDA_VISIBLE_DEVICES shows {len(gpus)}, "
            f"so the highest number is {len(gpus) - 1}"
        )
    return ",".join(gpus[gpu] for gpu in stage.device_ids)


def _gpus_here() -> int:
    """The number of NVIDIA GPUs in this machine; 0 if it has none or does not list them."""
    with suppress(OSError):
        return len(os.listdir("/proc/driver/nvidia/gpus"))
    return 0
