"""Measure the shipped model through all services: seconds for each kind of request, and its limit."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image, ImageDraw

from bagel.client import Client
from bagel.deployment.defaults import NANO_NAME, find_model
from bagel.deployment.deploy_file import load_deploy_config, shipped_deploy_config
from bagel.deployment.launcher import Deployment
from bagel.errors import ConfigError
from bagel.pipelines import BAGEL
from bench.report import Table

NOTE = f"{NANO_NAME} at its default size on a CPU, all services up; one request at a time, medians at the client"
PROMPTS = ("a large red circle", "two blue stars on a navy background", "a green heart above a yellow square")
EDITS = ("make the circle blue", "add a small red star in the top right corner", "turn the background beige")
CASES: Mapping[str, tuple[float, tuple[str, ...], Mapping[str, Any]]] = {
    "text-to-image, 50 timesteps": (5.0, PROMPTS, {}),
    "text-to-image with three previews": (5.0, PROMPTS, {"partial_images": 3}),
    "edit, 50 timesteps": (8.0, EDITS, {"modality": "img2img"}),
    "description": (2.0, ("describe the image",), {"modality": "img2text"}),
    "text-to-image that thinks first": (8.0, PROMPTS, {"think": True}),
}
"""The limit in seconds, the prompts and the options of each row."""


def run(only: str, repeats: int) -> Iterator[Table]:
    """Measure every case whose name contains `only`; ConfigError if there is none."""
    if not any(only in name for name in CASES):
        raise ConfigError(f"--only {only!r} names no row; the rows are: {'; '.join(CASES)}")
    table = Table("nano", NOTE)
    _, checkpoint = find_model(NANO_NAME)
    config = load_deploy_config(shipped_deploy_config(BAGEL.model_type))
    with (
        Path(os.devnull).open("w") as nowhere,
        Deployment(config, checkpoint.folder, device="cpu", logs=nowhere) as services,
        Client(services.address) as client,
    ):
        for name in CASES:
            if only in name:
                _measure(table, name, client, services, repeats)
    yield table


def _measure(table: Table, name: str, client: Client, services: Deployment, repeats: int) -> None:
    limit, prompts, options = CASES[name]
    walls, cpus, steps = [], [], []
    for take in range(repeats + 1):
        arguments = {**options, "prompt": prompts[take % len(prompts)], "seed": take}
        if options.get("modality"):
            arguments["image"] = _scene(take)
        cpu, wall = cpu_seconds(services), time.perf_counter()
        # The caller listens, as previews are sent to nobody else.
        result = client.generate(**arguments, on_event=lambda event: None)
        if take:  # the first request only warms up
            walls.append(time.perf_counter() - wall)
            cpus.append(cpu_seconds(services) - cpu)
            steps.append(result.timings.get("denoise", result.timings.get("text", 0.0)))
    table.add(case=name, wall_s=median(walls), cpu_s=median(cpus), compute_s=median(steps), limit_s=limit)
    table.failed |= median(walls) > limit


def _scene(take: int) -> Image.Image:
    """A different picture each time, so that none of its K/V is already in the store."""
    image = Image.new("RGB", (128, 128), "white")
    pen = ImageDraw.Draw(image)
    pen.ellipse((20 + take, 44, 60 + take, 84), fill=(220, 38, 38))
    pen.rectangle((88, 20, 112, 44), fill=(37, 85, 225))
    return image


def cpu_seconds(services: Deployment) -> float:
    """CPU-seconds so far of the services and their children; 0 on a system without /proc."""
    groups, ticks = {service.process.pid for service in services.services}, 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # the process may have ended meanwhile
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[2]) in groups:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
