"""Start, watch and stop all services of a deploy file on this machine. No torch here.

Each service is a process of its own, `python -m bagel_thinker` and so on. This module knows their names and command
lines but imports none of them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bagel.deployment.deploy_file import DeployConfig, StageDeploy
from bagel.deployment.http_front import HttpGuards, http_arguments
from bagel.deployment.process import POLL_S, Logs, Service
from bagel.errors import ConfigError, InitTimeout
from bagel.rpc.api_keys import KEYS_FILE
from bagel.rpc.deadlines import deadline_of
from bagel.rpc.limits import DRAIN_S
from bagel.rpc.transport import PLAINTEXT, Security, sync_channel

LOOPBACK = "127.0.0.1"
GATEWAY = "gateway"
MODULES = {"thinker": "bagel_thinker", "dit": "bagel_dit", GATEWAY: "bagel_gateway"}
"""The module that each role runs."""
KILL_AFTER_S = 5.0
"""Seconds after its drain time when a service that still runs is killed."""

OnReady = Callable[[str, str, float], None]
"""Called with (name, address, seconds since the start) when a service is ready."""


class Deployment:
    """The services of a deploy file, running from `with` to its end.

    model: a checkpoint folder; name: its name in messages. The gateway listens on host and gateway_port (0: any free
    one), the other services on loopback. device: auto, cpu, cuda (the deploy file's GPUs) or cuda:N; dtype: auto,
    bfloat16 or float32. profile: the DiT reports the durations of the diffusion stages; log_stats: the gateway logs the
    timings of each request. security: the gateway's TLS towards its callers. http: the host:port of the OpenAI API;
    guards and model_names apply to that alone. api_keys: the file of the keys that callers need; None: no keys, even if
    BAGEL_API_KEYS_FILE is set. more: further arguments for each role's services.
    Entering raises InitTimeout, naming the stage, if one is not ready after init_timeout_s seconds; if a service ends,
    it raises that service's BagelError.
    """

    def __init__(
        self,
        config: DeployConfig,
        model: str | Path,
        *,
        name: str | None = None,
        host: str = LOOPBACK,
        gateway_port: int = 0,
        device: str = "auto",
        dtype: str = "auto",
        init_timeout_s: float = 300,
        batch_timeout_s: float = 5,
        profile: bool = False,
        log_stats: bool = False,
        drain_timeout_s: float = DRAIN_S,
        security: Security = PLAINTEXT,
        http: str | None = None,
        guards: HttpGuards | None = None,
        model_names: Sequence[str] = (),
        api_keys: Path | None = None,
        logs: Logs = None,
        on_ready: OnReady | None = None,
        env: Mapping[str, str] | None = None,
        more: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.config, self._model, self._name = config, str(model), name or str(model)
        self._listen = f"{f'[{host}]' if ':' in host else host}:{gateway_port}"
        self._device, self._dtype = device, dtype
        self._init_timeout_s, self._batch_timeout_s, self._drain_s = init_timeout_s, batch_timeout_s, drain_timeout_s
        self._logs, self._on_ready, self._security = logs, on_ready, security
        self._http, self._api_keys, self._profile, self._log_stats = http, api_keys, profile, log_stats
        self._guards, self._model_names = guards or HttpGuards(), model_names
        self._more = more or {}
        self._env = {**os.environ, **(env or {})}
        self._env.pop(KEYS_FILE, None)  # only `api_keys` decides, not the caller's environment
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
        """Stop the services, the gateway first. Each drains, so that no service calls one that has already ended."""
        try:
            while self.services:
                self.services[-1].tell_to_stop()
                self.services[-1].end(self._drain_s + KILL_AFTER_S)
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
            sources: dict[int, str] = {}
            # One after the other, since a DiT needs the address of its Thinker; loading then runs at the same time.
            for spec in self.config.spec.stages:
                stage, role = self.config.stage(spec.stage_id), spec.model_stage
                name = f"{role}-0"
                feeds = [argument for source in spec.input_sources for argument in ("--source", sources[source])]
                if role == "dit" and not spec.omni_kv_config.need_recv_cache:
                    feeds = ["--single-stage"]
                arguments = [*self._model_arguments(stage, role), *feeds]
                waiting[name] = self._launch(role, name, f"stage {stage.stage_id} ({role})", arguments, stage)
                addresses[name] = waiting[name].address(deadline)
                sources[spec.stage_id] = f"{name}={addresses[name]}"
            waiting[GATEWAY] = self._launch(GATEWAY, GATEWAY, "the gateway", self._gateway_arguments(addresses))
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
        if service.name == GATEWAY and self._security.serves_tls:
            return service.said_ready
        return is_serving(address)

    def _raise_late(self, waiting: Mapping[str, Service]) -> NoReturn:
        stages = [service.title for name, service in waiting.items() if name != GATEWAY]
        names = " and ".join(stages or ["the gateway"])
        was = "were" if len(stages) > 1 else "was"
        raise InitTimeout(
            f"{names} {was} not ready after {self._init_timeout_s:g} s of loading {self._name}; raise init_timeout"
        ) from None

    def _launch(
        self, role: str, name: str, title: str, arguments: Sequence[str], stage: StageDeploy | None = None
    ) -> Service:
        env = dict(self._env)
        if stage is not None and self._device in ("auto", "cuda"):
            env["CUDA_VISIBLE_DEVICES"] = _visible_gpus(stage, env.get("CUDA_VISIBLE_DEVICES"))
        drain = ["--drain-timeout", f"{self._drain_s:g}"]
        service = Service(name, title, MODULES[role], [*arguments, *drain, *self._more.get(role, ())], env, self._logs)
        self.services.append(service)
        return service

    def _model_arguments(self, stage: StageDeploy, role: str) -> list[str]:
        arguments = ["--model", self._model, "--listen", f"{LOOPBACK}:0", "--name", f"{role}-0"]
        arguments += ["--device", self._device, "--dtype", self._dtype]
        if stage.max_num_seqs is not None:
            arguments += ["--max-num-seqs", str(stage.max_num_seqs)]
        if stage.max_model_len is not None:
            arguments += ["--max-model-len", str(stage.max_model_len)]
        arguments += ["--batch-timeout", f"{self._batch_timeout_s:g}"]
        if role == "thinker":
            return [*arguments, *self._thinker_arguments(stage)]
        if role == "dit":
            arguments += ["--vae-use-tiling"] if stage.tiling else []
            arguments += ["--enable-diffusion-pipeline-profiler"] if self._profile else []
        return arguments

    @staticmethod
    def _thinker_arguments(stage: StageDeploy) -> list[str]:
        """The engine, and the settings that only vLLM has; the Thinker refuses those that its engine does not have."""
        arguments = [] if stage.engine is None else ["--engine", stage.engine]
        arguments += ["--tensor-parallel-size", str(stage.tp_size)] if stage.tp_size > 1 else []
        for key in ("max_num_batched_tokens", "gpu_memory_utilization", "quantization"):
            if (value := getattr(stage, key)) is not None:
                arguments += [f"--{key.replace('_', '-')}", str(value)]
        for key in ("enforce_eager", "enable_prefix_caching"):
            if (on := getattr(stage, key)) is not None:
                arguments.append(f"--{'' if on else 'no-'}{key.replace('_', '-')}")
        return arguments

    def _gateway_arguments(self, addresses: Mapping[str, str]) -> list[str]:
        arguments = ["--listen", self._listen, "--pipeline", self.config.pipeline]
        for name, address in addresses.items():
            arguments += [f"--{name.split('-')[0]}", f"{name}={address}"]
        arguments += ["--batch-timeout", f"{self._batch_timeout_s:g}"]
        arguments += ["--log-stats"] if self._log_stats else []
        if self._security.serves_tls:
            arguments += [*_tls_arguments(self._security), "--plaintext-services"]
        if self._http is not None:
            arguments += ["--http", self._http, *http_arguments(self._guards)]
            arguments += [f"--served-model-name={name}" for name in self._model_names or (self._name,)]
        if self._api_keys is not None:
            arguments += ["--api-keys", str(self._api_keys)]
        return [*arguments, "--sampling-defaults", json.dumps(self.config.sampling_defaults())]


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
            return "unreachable"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def _tls_arguments(security: Security) -> list[str]:
    files = {"certificate": security.certificate, "key": security.key, "ca": security.ca}
    arguments = [(f"--tls-{what}", str(file)) for what, file in files.items() if file is not None]
    arguments += [("--tls-allow-client", name) for name in security.clients]
    return [argument for pair in arguments for argument in pair]


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
