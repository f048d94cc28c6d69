"""What is installed: locks with hashes for the images, a bill of materials, and the page that names the limits."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bagel.deployment.dit_config import DitConfig
from bagel.deployment.gateway_config import GatewayConfig
from bagel.deployment.settings import settings_of
from bagel.deployment.thinker_config import ThinkerConfig

ROOT = Path(__file__).parents[2]
LOCKS = {file.stem: file for file in (ROOT / "deploy/locks").glob("*.txt")}
DOCKERFILES = {
    "gateway/Dockerfile": "gateway",
    "services/thinker/Dockerfile": "engine",
    "services/dit/Dockerfile": "engine",
}
UNLOCKED = {"torch"}
"""Its build depends on the machine."""


def locked(name: str) -> dict[str, tuple[str, int]]:
    """Version and number of hashes by package."""
    text = LOCKS[name].read_text().replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    found: dict[str, tuple[str, int]] = {}
    for requirement, *hashes in lines:
        package, _, version = requirement.partition("==")
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes), requirement
        found[canonicalize_name(package)] = (version, len(hashes))
    return found


def needed(requirements: list[str], extra: str, seen: dict[str, Requirement]) -> dict[str, Requirement]:
    """The packages of requirements and all below them that is installed here, but for what comes with torch alone."""
    for text in requirements:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        if name == "bagel-serving" or name not in seen:
            seen[name] = requirement
            if name in UNLOCKED:
                continue
            for inner in ("", *requirement.extras):
                needed(requires(name), inner, seen)
    return seen


def requires(name: str) -> list[str]:
    try:
        return distribution(name).requires or []
    except PackageNotFoundError:
        return []


@pytest.mark.parametrize(("lock", "extra"), [("gateway", "gateway"), ("engine", "engine")])
def test_a_lock_covers_all_that_its_image_needs_with_versions_that_fit(lock: str, extra: str) -> None:
    here, wanted = locked(lock), needed([f"bagel-serving[{extra}]"], "", {})
    missing = wanted.keys() - here.keys() - UNLOCKED - {"bagel-serving"}
    assert not missing, f"deploy/locks/{lock}.txt lacks {sorted(missing)}: make lock"
    for name, requirement in wanted.items():
        if name in here:
            assert requirement.specifier.contains(here[name][0], prereleases=True), f"{name} {here[name][0]}: make lock"
    assert all(version and hashes for version, hashes in here.values()), "each has a version and a hash"


@pytest.mark.parametrize("file", DOCKERFILES)
def test_an_image_installs_by_hash_and_builds_this_package_without_an_index(file: str) -> None:
    text = (ROOT / file).read_text().replace("\\\n", " ")
    installs = re.findall(r"pip install ([^&\n]*)", text)
    assert re.search(rf"--require-hashes [^&\n]*-r deploy/locks/{DOCKERFILES[file]}\.txt", text)
    for arguments in installs:
        hashed = "--require-hashes" in arguments and "--no-deps" in arguments
        own = "--no-index" in arguments and "--no-build-isolation" in arguments
        # torch, and the extras of the GPU images: docs/security.md says so.
        said = "torch==" in arguments or '".[${EXTRA}]"; fi' in arguments
        assert hashed or own or said, arguments
    assert {"hatchling"} <= locked("build").keys() and "!deploy/locks" in (ROOT / ".dockerignore").read_text()


@pytest.mark.slow
def test_the_bill_of_materials_has_all_that_is_installed(tmp_path: Path) -> None:
    bill = tmp_path / "sbom.cdx.json"
    command = [str(Path(sys.executable).with_name("cyclonedx-py")), "environment", "--pyproject", "pyproject.toml"]
    subprocess.run(
        [*command, "--output-reproducible", "-o", str(bill), sys.executable], cwd=ROOT, check=True, timeout=300
    )
    told = json.loads(bill.read_text())
    listed = {canonicalize_name(each["name"]): each.get("version") for each in told["components"]}
    listed[told["metadata"]["component"]["name"]] = None
    # By the folder, as Ray puts copies of its own on the path of a process that has imported it.
    folder = [sysconfig.get_path("purelib")]
    installed = {canonicalize_name(each.name): each.version for each in distributions(path=folder)}
    assert installed.keys() <= listed.keys()
    assert all(listed[name] in (None, version) for name, version in installed.items())


@pytest.mark.parametrize(
    ("says", "ends", "code"),
    [
        ("No known vulnerabilities found", 0, 0),
        ("Found 1 known vulnerability in 1 package", 1, 1),
        ("requests.exceptions.ConnectionError: Max retries exceeded", 1, 3),
        ("pluggy Dependency not found on PyPI and could not be audited: pluggy (1.7.0)", 0, 3),
    ],
)
def test_an_audit_that_reached_no_database_does_not_pass(tmp_path: Path, says: str, ends: int, code: int) -> None:
    tool = tmp_path / "pip-audit"
    tool.write_text(f'#!/bin/sh\necho "{says}"; echo "$@"\nexit {ends}\n')
    os.chmod(tool, stat.S_IRWXU)
    done = subprocess.run(
        [ROOT / "deploy/audit", tool, "a.txt", "b.txt"], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == code and ("not audited" in done.stderr) == (code == 3)
    assert "-r a.txt -r b.txt" in done.stdout


def test_the_threat_model_names_flags_that_there_are() -> None:
    known = {each.flag for config in (GatewayConfig, ThinkerConfig, DitConfig) for each in settings_of(config)}
    known |= {"--require-hashes", "--seconds", "--trusted-network"}
    text = (ROOT / "docs/security.md").read_text()
    unknown = set(re.findall(r"--[a-z][a-z-]+", text)) - known
    assert not unknown, f"docs/security.md names {sorted(unknown)}"
