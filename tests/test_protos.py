"""The wire contract: its stubs are those of the protos, and every message and field says what it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bagel.v1 import common_pb2

ROOT = Path(__file__).parents[1]
PROTOS = sorted((ROOT / "protos" / "bagel" / "v1").glob("*.proto"))


def test_the_stubs_are_generated_from_the_protos(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "protos")]
    command += [f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}", *map(str, PROTOS)]
    subprocess.run(command, check=True)
    for made in sorted(tmp_path.rglob("*.py")):
        committed = ROOT / made.relative_to(tmp_path)
        assert committed.read_text() == made.read_text(), f"{committed} is stale; run make protos"


@pytest.mark.parametrize("name", ["TextSettings", "ImageSettings", "Request"])
def test_absence_differs_from_zero(name: str) -> None:
    message = common_pb2.DESCRIPTOR.message_types_by_name[name]
    singular = [field for field in message.fields if not field.is_repeated and field.name != "modality"]
    assert [field.name for field in singular if not field.has_presence] == []
