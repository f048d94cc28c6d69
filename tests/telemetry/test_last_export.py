"""The end of a process whose collector is gone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # it waits for real time limits, processes or large pictures

PROGRAM = """
import time
from bagel.telemetry.metrics import set_up_metrics, timed_call
from bagel.telemetry.otlp import shut_down
from bagel.telemetry.tracing import serving, set_up_tracing

set_up_tracing("dit", "dit-0")
set_up_metrics("dit", "dit-0")
with serving("x", {}), timed_call("x/y"):
    pass
began = time.monotonic()
shut_down()
print(time.monotonic() - began)
"""


def test_the_last_export_is_given_up_after_two_seconds() -> None:
    env = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 3
