"""vllm-omni's BAGEL, one request after the other: what `python -m bench peer` runs in the peer's own environment.

python peer_omni.py CHECKPOINT REQUESTS.JSON   prints a line "PEER {json}" for each request. Imports nothing of ours.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

TAG = "PEER "


def picture(size: tuple[int, int], seed: int) -> Any:
    """A coarse picture of its own for each seed; the same as bench.peer sends."""
    from PIL import Image

    return Image.frombytes("RGB", (64, 64), random.Random(seed).randbytes(64 * 64 * 3)).resize(size)


def main(folder: str, requests: str) -> None:
    """Serve the requests, after vllm-omni's own single-stage deploy file."""
    import vllm_omni  # type: ignore[import-not-found]
    from vllm_omni.entrypoints.omni import Omni  # type: ignore[import-not-found]

    deploy = Path(vllm_omni.__file__).parent / "deploy" / "bagel_single_stage.yaml"
    began = time.perf_counter()
    omni = Omni(model=folder, deploy_config=str(deploy), log_stats=False)
    say({"start_s": time.perf_counter() - began, "version": getattr(vllm_omni, "__version__", "unknown")})
    try:
        for request in json.loads(Path(requests).read_text(encoding="utf-8")):
            say({"case": request["case"], "seconds": serve(omni, request)})
    finally:
        omni.close()


def serve(omni: Any, request: dict[str, Any]) -> float:
    """Seconds of one request at the client."""
    side = request["side"]
    params = omni.default_sampling_params_list
    first = params[0]
    # It takes so many Euler steps; N timesteps of BAGEL are N - 1 steps.
    first.num_inference_steps, first.seed = request["steps"] - 1, request["seed"]
    first.height = first.width = side
    first.extra_args = dict(request["guidance"])
    text = f"<|im_start|>{request['prompt']}<|im_end|>"
    prompt: dict[str, Any] = {"prompt": text, "modalities": ["image"]}
    if request["edit"]:
        prompt |= {
            "prompt": f"<|fim_middle|>{text}",
            "multi_modal_data": {"image": picture((side, side), request["seed"])},
        }
    began = time.perf_counter()
    outputs = list(omni.generate(prompts=[prompt], sampling_params_list=params))
    seconds = time.perf_counter() - began
    if not any(images(output) for output in outputs):
        raise RuntimeError(f"{request['case']}: the peer answered without a picture")
    return seconds


def images(output: Any) -> Any:
    """The pictures of one output, wherever this release has them."""
    return getattr(output, "images", None) or getattr(getattr(output, "request_output", None), "images", None)


def say(values: dict[str, Any]) -> None:
    """One line for the process that started this one."""
    print(TAG + json.dumps(values), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
