"""BAGEL as a Python object: the services of a deploy file as child processes, and requests to them. No torch here.

`with bagel.Omni("ByteDance-Seed/BAGEL-7B-MoT") as omni: [result] = omni.generate("a large red circle", seed=42)`, and
`result.image` is a Pillow image.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from PIL.Image import Image

from bagel.client.batch import AT_ONCE, ask_of, events_of, generate_all
from bagel.client.calls import OnServiceEvent
from bagel.client.stats import Firsts, stats_table
from bagel.client.sync_client import Client
from bagel.client.tables import profile_table
from bagel.deployment.defaults import find_model
from bagel.deployment.deploy_file import deployment_for, request_defaults
from bagel.deployment.launcher import Deployment, OnReady, health_of, reachable
from bagel.deployment.parallel_settings import check_ray_address
from bagel.deployment.process import Logs
from bagel.deployment.schema import DeployConfig
from bagel.errors import BagelError, ConfigError, InvalidRequest, NoBackend, RemoteError
from bagel.events import Result, ServiceEvent
from bagel.images import load_image, to_rgb
from bagel.prompts import ImagePart, Prompt, TextPart
from bagel.request import Modality, Request, resolve
from bagel.rpc.reach import unreachable
from bagel.rpc.transport import PLAINTEXT, Security
from bagel.v1 import common_pb2

DESCRIBE_S = 20.0
"""Longer than the --backend-timeout of a gateway, which says what it waits for."""
HEALTH_S = 2.0
ENDED_S = 0.1
"""Seconds from the end of a connection to the end of its process."""


InputImage = Image | str | Path | bytes
"""An image of a prompt: of Pillow's, or a file by its path or as its bytes."""
_INSTEAD = {
    "stage_configs_path": "give deploy_config",
    "stage_init_timeout": "give init_timeout",
    "shm_threshold_bytes": "K/V moves over gRPC; leave it out",
    "init_sleep_seconds": "services are waited for by their health; leave it out",
}
"""Keywords of vllm-omni's Omni that are called otherwise here, or set nothing."""


class Omni:
    """All services of a deploy file on this machine, started at once and ended by `close` or the end of `with`.

    model: a checkpoint folder or hub name (None: BAGEL_MODEL, else bagel-nano). deploy_config: a deploy file
    (None: the shipped one that the checkpoint chooses). tensor_parallel_size and the like, with any other stage setting
    as a keyword (engine="vllm" for the Thinker), override it; what has no effect is noted in a line on stderr.
    worker_backend: what runs the DiT's ranks, process or ray; ray_address: HOST:PORT of the Ray cluster (None: a Ray
    of this host alone, started and stopped with the DiT). device: auto, cpu, cuda (the deploy file's GPUs) or
    cuda:N; dtype: auto, bfloat16 or float32. log_stats and enable_diffusion_pipeline_profiler: tables on stderr after
    each `generate`, of where the time of each request went, and of the durations of each picture's diffusion stages.
    logs: a folder or stream for the services' logs.

    Raises ConfigError, CheckpointError or NotSupported before anything starts, InitTimeout naming a late stage.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        deploy_config: str | Path | None = None,
        tensor_parallel_size: int | None = None,
        cfg_parallel_size: int | None = None,
        vae_patch_parallel_size: int | None = None,
        vae_use_tiling: bool | None = None,
        worker_backend: str = "process",
        ray_address: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        init_timeout: float = 300,
        batch_timeout: float = 5,
        log_stats: bool = False,
        enable_diffusion_pipeline_profiler: bool = False,
        logs: str | Logs = None,
        on_ready: OnReady | None = None,
        **overrides: object,
    ) -> None:
        _check_keywords(overrides)
        check_ray_address(worker_backend, ray_address)
        self.model, checkpoint = find_model(None if model is None else str(model))
        config = deployment_for(
            checkpoint,
            deploy_config,
            tensor_parallel_size=tensor_parallel_size,
            cfg_parallel_size=cfg_parallel_size,
            vae_patch_parallel_size=vae_patch_parallel_size,
            vae_use_tiling=vae_use_tiling,
            **overrides,
        )
        for note in config.notes():
            print(f"note: {note}", file=sys.stderr)
        self._log_stats, self._profile = log_stats, enable_diffusion_pipeline_profiler
        deployment = Deployment(
            config,
            checkpoint.folder,
            device=device,
            dtype=dtype,
            init_timeout_s=init_timeout,
            batch_timeout_s=batch_timeout,
            worker_backend=worker_backend,
            ray_address=ray_address,
            enable_diffusion_pipeline_profiler=enable_diffusion_pipeline_profiler,
            logs=Path(logs) if isinstance(logs, str) else logs,
            on_ready=on_ready,
        )
        # Entered here, as an Omni also works without `with`; `close` ends it.
        self._engine = ServedEngine(deployment.__enter__())

    @property
    def address(self) -> str:
        """The gateway's host:port, for other clients."""
        return self._engine.address

    @property
    def config(self) -> DeployConfig:
        """The deploy file as it is used."""
        return self._engine.deployment.config

    def generate(
        self,
        prompts: str | Request | Sequence[str | Request],
        *,
        modality: str | None = None,
        image: InputImage | Sequence[InputImage] | None = None,
        seed: int | None = None,
        on_event: OnServiceEvent | None = None,
        **options: Any,
    ) -> list[Result]:
        """One result a prompt, in their order; several prompts are served together.

        modality is text2img by default. image is each prompt's input image, or several, which stand before its text.
        options are those of bagel.request, like steps or think. on_event sees text and steps as they come.
        Raises InvalidRequest before anything is sent for what can be seen to be wrong.
        """
        requests = self._requests(prompts, modality, image, {"seed": seed, **options})
        firsts = Firsts()

        def heard(event: ServiceEvent) -> None:
            firsts(event)
            if on_event is not None:
                on_event(event)

        results = self._engine.generate(requests, heard)
        if self._log_stats:
            print(stats_table(requests, results, firsts), file=sys.stderr)
        if self._profile and any(result.profile for result in results):
            print(profile_table(results), file=sys.stderr)
        return results

    def stream(
        self,
        prompt: str | Request,
        *,
        modality: str | None = None,
        image: InputImage | Sequence[InputImage] | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Iterator[ServiceEvent]:
        """The events of one request as they come, its Result last; closing the iterator ends the request."""
        requests = self._requests(prompt, modality, image, {"seed": seed, **options})
        return self._engine.stream(requests)

    def close(self) -> None:
        """End the services; they finish what is under way."""
        self._engine.deployment.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _requests(
        self,
        prompts: str | Request | Sequence[str | Request],
        modality: str | None,
        image: InputImage | Sequence[InputImage] | None,
        options: dict[str, Any],
    ) -> list[Request]:
        if not isinstance(prompts, Iterable | Request):
            raise InvalidRequest("prompt", f"prompts is {prompts!r:.80}; give a text, or a list of texts")
        several = [prompts] if isinstance(prompts, str | Request) else list(prompts)
        if not several:
            raise InvalidRequest("prompt", "there is no prompt; give at least one")
        # In a mixed list the settings still apply to the texts.
        if all(isinstance(each, Request) for each in several):
            _refuse_beside_requests({"modality": modality, "image": image, **options})
        defaults, images = request_defaults(self.config), _images(image)
        return [
            each
            if isinstance(each, Request)
            else _request(each, modality or Modality.TEXT2IMG, images, options, defaults)
            for each in several
        ]


class ServedEngine:
    """Requests to a deployment's gateway, with the interface of the engine in this process."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        # A gateway that listens on all interfaces has no address to call.
        self.address = reachable(deployment.address)
        spec = deployment.config.spec.stage("dit")
        # As many as the DiT takes: more would only wait there, until they are refused as busy.
        self._at_once = deployment.config.stage(spec.stage_id).max_num_seqs or AT_ONCE

    @property
    def device(self) -> str:
        """Where the DiT computes."""
        return self._served.device

    @property
    def dtype(self) -> str:
        """The number type of the weights."""
        return self._served.dtype

    @property
    def fingerprint(self) -> bytes:
        """The fingerprint of the checkpoint that the services have loaded."""
        return self._served.checkpoint_fingerprint

    @cached_property
    def _served(self) -> common_pb2.ModelInfo:
        # Asked once, since what the services have loaded does not change.
        return describe(self.address)

    def generate(self, requests: Sequence[Request], on_event: OnServiceEvent | None = None) -> list[Result]:
        """As BagelEngine.generate; BagelError naming the stage if a service has ended."""
        with self._ended_service_reported():
            return generate_all(self.address, [ask_of(each) for each in requests], on_event, at_once=self._at_once)

    def stream(self, requests: Sequence[Request]) -> Iterator[ServiceEvent]:
        """What happens to the requests, as it happens."""
        with self._ended_service_reported(), events_of(self.address, [ask_of(each) for each in requests]) as events:
            yield from events

    @contextmanager
    def _ended_service_reported(self) -> Iterator[None]:
        """Report a service that has ended as the cause of the failures it led to."""
        try:
            yield
        except BagelError as error:
            if error.grpc_status == "UNAVAILABLE":
                # The connection ends a moment before its process, whose end says why.
                time.sleep(ENDED_S)
                self.deployment.check()
            raise


def describe(
    address: str, timeout_s: float = DESCRIBE_S, security: Security = PLAINTEXT, api_key: str | None = None
) -> common_pb2.ModelInfo:
    """What the gateway there serves; SourceUnavailable if none answers, ConfigError if its TLS is another."""
    with Client(address, security, api_key=api_key) as client:
        try:
            return client.describe(timeout_s).model
        except BagelError as error:
            if isinstance(error, RemoteError) and error.grpc_status in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
                raise _why_no_answer(address, security) from None
            raise


def _why_no_answer(address: str, security: Security) -> BagelError:
    if health_of(address, HEALTH_S, security) == "NOT_SERVING":
        return NoBackend(
            f"the gateway at {address} runs, but is not ready: it waits for a Thinker or a DiT; its log says which"
        )
    return unreachable("gateway", address, security)


def _check_keywords(overrides: dict[str, object]) -> None:
    """Raise ConfigError for keywords of vllm-omni's Omni, all at once."""
    if instead := [f"{name}: {_INSTEAD[name]}" for name in overrides if name in _INSTEAD]:
        raise ConfigError(f"Omni has no {'; no '.join(instead)}")


def _refuse_beside_requests(given: dict[str, Any]) -> None:
    """Raise InvalidRequest for settings that nothing takes: a Request has its own."""
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise InvalidRequest(names[0], f"{', '.join(names)} has no effect on a Request, which has its own settings")


def _images(given: InputImage | Sequence[InputImage] | None) -> list[Image]:
    several = [given] if isinstance(given, Image | str | Path | bytes) else [] if given is None else list(given)
    return [to_rgb(each) if isinstance(each, Image) else load_image(each) for each in several]


def _request(
    prompt: object, modality: str, images: Sequence[Image], options: dict[str, Any], defaults: dict[str, Any]
) -> Request:
    if not isinstance(prompt, str) or not prompt.strip():
        raise InvalidRequest("prompt", f"a prompt is {prompt!r:.80}; it must be a text that is not empty")
    shown = [ImagePart(image, for_generation=modality == Modality.IMG2IMG) for image in images]
    parts: Prompt = (*shown, TextPart(prompt))
    request = resolve(cast(Modality, modality), parts, options, defaults)  # which checks the modality
    if request.modality.reads_image != bool(images):
        reads = "reads no image; leave image out" if images else "needs an input image; give image"
        raise InvalidRequest("image", f"{modality} {reads}")
    return request
