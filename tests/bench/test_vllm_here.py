"""The benchmarks of vLLM on a machine without a GPU."""

from __future__ import annotations

import pytest
import torch

from bench import vllm_check, vllm_gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    for main, without in ((vllm_check.main, "--device cpu"), (vllm_gpu.main, "--tiny")):
        with pytest.raises(SystemExit):
            main([])
        assert f"torch sees no GPU; run this on a GPU, or check the code with {without}" in capsys.readouterr().err
