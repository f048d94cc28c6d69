"""Run vLLM's engine core in this process: the caller adds requests with prepared images, and calls each step."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import OutOfMemoryError

from bagel.checkpoint.config import ModelConfig
from bagel.engine.segments import Chain, Segment
from bagel.errors import BagelError, ConfigError
from bagel.kv.digests import SegmentKind
from bagel.telemetry.logs import Log
from bagel_thinker.vllm.images import image_item
from bagel_thinker.vllm.requests import Placeholders, segment_starts, token_ids
from bagel_thinker.vllm.settings import VllmSettings, engine_arguments
from bagel_thinker.vllm.text_steps import prepare_texts_at_once

log = Log("bagel.thinker")
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the core runs in the engine's thread; workers of tp > 1 are processes
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # gRPC survives no fork
    "VLLM_CONFIGURE_LOGGING": "0",  # its logs would go to stdout, where a service announces its address
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise each rank on a CPU needs a NUMA node of its own
    "TRITON_F32_DEFAULT": "ieee",  # otherwise Triton computes float32 attention in TF32
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the connector's calls per layer are tested with the first runner only
}


class Core:
    """One model on vLLM. Not thread-safe: one thread builds it and calls everything."""

    def __init__(
        self,
        config: ModelConfig,
        settings: VllmSettings,
        ids: Placeholders,
        model: Path,
        sink: Any,
        on_broken: Callable[[], None] = lambda: None,
    ) -> None:
        """Load the model. sink: the result of `Sink.open`; on_broken: called in another thread if a worker dies.

        Raises ConfigError for settings that vLLM refuses.
        """
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.core_client import InprocClient
        from vllm.v1.executor.abstract import Executor

        from bagel_thinker.vllm.plugin import register

        register()
        self._config, self._ids = config, ids
        with tempfile.TemporaryDirectory(prefix="bagel-vllm-") as folder:
            arguments = engine_arguments(config, settings, ids, model=model, config_folder=Path(folder), sink=sink)
            try:
                vllm_config = EngineArgs(**arguments).create_engine_config()
                executor = Executor.get_class(vllm_config)
                self._client = InprocClient(vllm_config, executor, log_stats=False, executor_fail_callback=on_broken)
            except (ValueError, NotImplementedError) as error:
                raise ConfigError(f"vLLM refuses these settings: {_first_line(error)}") from error
            except Exception as error:
                if settings.quantization is None or isinstance(error, BagelError | OutOfMemoryError):
                    raise
                raise ConfigError(
                    f"quantization is {settings.quantization!r}, with which vLLM cannot load this model on "
                    f"{settings.device}: {_first_line(error)}; choose another, or leave it out"
                ) from error
        if settings.quantization is not None:
            self._check_quantised(settings.quantization)
            log.info("quantised", format=settings.quantization, engine="vllm")
        # Workers tell of exports by notices, so one of them has to answer each step, and not all.
        self._client.engine_core.model_executor.kv_output_aggregator = None
        self._client.collective_rpc(prepare_texts_at_once)
        self.block_size: int = vllm_config.cache_config.block_size
        if vllm_config.scheduler_config.async_scheduling:
            self._client.collective_rpc(_leave_tokens_on_device)
        self._warm_up()

    def _check_quantised(self, name: str) -> None:
        """Raise ConfigError if a layer is not quantised: some of vLLM's methods silently skip layers, or all."""
        left = self._client.collective_rpc(_left_whole)[0]
        if left:
            self._client.shutdown()
            raise ConfigError(
                f"quantization is {name!r}, which leaves {len(left)} linear layers as they are here, {left[0]} among "
                "them; choose another, or leave it out"
            )

    @property
    def busy(self) -> bool:
        """Whether a step has work: requests, or finished ones that the workers must be told about."""
        return bool(self._client.engine_core.scheduler.has_requests())

    def add(
        self,
        request: str,
        chain: Chain,
        *,
        then: Sequence[int] = (),
        max_tokens: int = 1,
        stops: Sequence[int] = (),
        extra: Mapping[str, Any],
    ) -> None:
        """Add a request: compute a chain's K/V, then write up to max_tokens tokens after the ids `then`.

        extra: the request's extra_args.
        """
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        parameters = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            stop_token_ids=list(stops),
            ignore_eos=True,
            detokenize=False,
            extra_args=dict(extra),
        )
        self._client.add_request(
            EngineCoreRequest(
                request_id=request,
                prompt_token_ids=[*token_ids(chain, self._ids), *then],
                mm_features=self._features(chain),
                sampling_params=parameters,
                pooling_params=None,
                arrival_time=time.time(),
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
            )
        )

    def step(self) -> list[Any]:
        """Run one step; returns vLLM's outputs for the requests that got a token or ended."""
        outputs: list[Any] = self._client.get_output().outputs
        return outputs

    def overflows(self) -> int:
        """How many rows of logits have not been finite so far."""
        return max(int(count) for count in self._client.collective_rpc(_overflows))

    def abort(self, requests: Sequence[str]) -> None:
        """Abort requests; it ignores unknown ones, which have already ended."""
        self._client.abort_requests(list(requests))

    def forget(self) -> bool:
        """Drop vLLM's caches, whose K/V may be wrong after a failed step; False if requests still use blocks."""
        self._client.reset_encoder_cache()
        return bool(self._client.reset_prefix_cache())

    def close(self) -> None:
        self._client.shutdown()

    def _warm_up(self) -> None:
        """Write a short text, as some kernels are compiled at their first call."""
        ids = (0,) * 4
        text = Segment(SegmentKind.TEXT, b"", b"", len(ids), rope=0, next_rope=len(ids), token_ids=ids)
        self.add("warm-up", Chain((text,)), max_tokens=3, extra={})
        while self.busy:
            self.step()

    def _features(self, chain: Chain) -> list[Any]:
        """The image blocks in vLLM's form. The segment's digest is the key in vLLM's caches."""
        from vllm.multimodal.inputs import (
            MultiModalBatchedField,
            MultiModalFeatureSpec,
            MultiModalFieldElem,
            MultiModalKwargsItem,
            PlaceholderRange,
        )

        features = []
        for segment, start in zip(chain.segments, segment_starts(chain), strict=True):
            if segment.kind is SegmentKind.TEXT:
                continue
            item = image_item(segment, self._config)
            elements = {
                name: MultiModalFieldElem(data=tensor, field=MultiModalBatchedField(keep_on_cpu=name.endswith("_grid")))
                for name, tensor in item.items()
            }
            name = segment.digest.hex()
            features.append(
                MultiModalFeatureSpec(
                    data=MultiModalKwargsItem(elements),
                    modality=segment.kind.value,
                    identifier=name,
                    mm_position=PlaceholderRange(offset=start, length=segment.length),
                    mm_hash=name,
                )
            )
        return features


def _left_whole(worker: Any) -> list[str]:
    """The names of both experts' linear layers that are not quantised."""
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    modules = worker.model_runner.model.named_modules()
    layers = {name: module for name, module in modules if isinstance(module, LinearBase)}
    return [name for name, layer in layers.items() if isinstance(layer.quant_method, UnquantizedLinearMethod)]


def _overflows(worker: Any) -> int:
    return int(worker.model_runner.model.overflows)


def _leave_tokens_on_device(worker: Any) -> None:
    """Stop vLLM from waiting for each step's tokens on behalf of a logits processor; ours does not need them."""
    worker.model_runner.input_batch.logitsprocs_need_output_token_ids = False


def cached_tokens(output: Any) -> int:
    """The number of prompt tokens that vLLM's cache had, from a request's first output."""
    return 0 if output.prefill_stats is None else int(output.prefill_stats.num_cached_tokens)


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):  # the first line of its text only counts the errors
        return str(error.errors()[0]["msg"]).removeprefix("Value error, ").splitlines()[0]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
