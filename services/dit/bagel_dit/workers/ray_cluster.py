"""The Ray cluster behind a group of ranks: connecting to it, places for ranks on it, and whether a node is lost."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from bagel.errors import ConfigError, InitTimeout

REACH_S = 5.0
"""Seconds in which a cluster's address must answer."""
NODE_S = 2.0
"""Seconds in which the Ray of a node that is there takes a connection."""
POLL_S = 0.1
OBJECT_STORE_BYTES = 128 * 2**20
"""Of a Ray that is started here: commands and pictures pass it, K/V never."""

_connecting = threading.Lock()


@dataclass(frozen=True)
class Node:
    """A node of the cluster: its id, and where its Ray (the raylet) listens."""

    id: str
    address: str
    port: int

    async def is_lost(self) -> bool:
        """Whether its Ray takes no connection any more: the cluster itself notices that only after some time."""
        try:
            async with asyncio.timeout(NODE_S):
                _, writer = await asyncio.open_connection(self.address, self.port)
        except (OSError, TimeoutError):
            return True
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        return False


def connect(address: str | None, ranks: int) -> None:
    """Connect this process to a cluster, or start a Ray of this machine alone; nothing if it is connected.

    Blocks. Called in another thread than the main one, whose signal handlers Ray would replace.
    """
    with _connecting:
        if ray.is_initialized():
            return
        # Its hints are for people who write programs with Ray.
        logging.getLogger("ray").setLevel(logging.ERROR)
        where: dict[str, Any] = {"address": address}
        if address is None:
            # Ray reports to its makers by default.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            # Each rank asks for one CPU where there is no GPU, however many this machine has.
            cpus = max(ranks, os.cpu_count() or 1)
            where = {"address": "local", "num_cpus": cpus, "object_store_memory": OBJECT_STORE_BYTES}
            where["include_dashboard"] = False
        try:
            ray.init(**where, log_to_driver=False, configure_logging=False)
        except Exception as error:  # which is all that Ray raises where its processes start too slowly
            what = "no Ray could be started here" if address is None else f"no connection to the Ray cluster {address}"
            remedy = "; see whether this machine is overloaded, and /tmp/ray/session_latest/logs"
            if address is not None:
                remedy = f"; run `ray start --address {address}` on this machine first"
            raise ConfigError(f"{what}: {_first_line(error)}{remedy}", "ray_address") from error


async def check_reachable(address: str) -> None:
    """Raise ConfigError if nothing listens at a cluster's address; Ray itself would try for a minute."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(REACH_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except (OSError, TimeoutError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {address} ({_first_line(error) or f'silent for {REACH_S:g} s'}); give the "
            "address that `ray start --head` printed",
            "ray_address",
        ) from None
    writer.close()


def disconnect() -> None:
    """Leave the cluster, or stop the Ray that was started here. Blocks."""
    with _connecting:
        ray.shutdown()


def resource_for(device: str) -> str:
    """What a rank asks of the cluster: GPU or CPU. device: cpu, cuda, or auto, which is cuda if the cluster has any."""
    if device == "auto":
        return "GPU" if ray.cluster_resources().get("GPU", 0) > 0 else "CPU"
    return "CPU" if device == "cpu" else "GPU"


def this_node() -> str:
    """The id of the node that this process runs on."""
    return str(ray.get_runtime_context().get_node_id())


class Places:
    """Places for all ranks of one group on the cluster, each with its GPU or CPU. Ranks of a node are neighbours."""

    def __init__(self, ranks: int, resource: str) -> None:
        """Ask for the places; `settled` waits for them."""
        self._ranks, self._resource = ranks, resource
        # PACK: on as few nodes as have room, since ranks exchange tensors in every layer.
        self.group: PlacementGroup = placement_group([{resource: 1}] * ranks, strategy="PACK")
        self.bundles: Sequence[int] = ()
        """The bundle of each rank, in their order."""
        self.nodes: Sequence[Node] = ()
        """The node of each rank, in their order."""

    async def settled(self, limit_s: float) -> None:
        """Wait until the cluster has room for all ranks; InitTimeout if it has none within limit_s."""
        waited = 0.0
        while (table := await asyncio.to_thread(placement_group_table, self.group))["state"] != "CREATED":
            if waited >= limit_s:
                there = await asyncio.to_thread(ray.cluster_resources)
                free = await asyncio.to_thread(ray.available_resources)
                raise InitTimeout(
                    f"the Ray cluster had no room for {self._ranks} ranks within {limit_s:g} s: each needs one "
                    f"{self._resource}, and of {there.get(self._resource, 0):g} there are "
                    f"{free.get(self._resource, 0):g} free; add nodes, free some, or choose smaller sizes"
                )
            await asyncio.sleep(POLL_S)
            waited += POLL_S
        known = {each["NodeID"]: each for each in await asyncio.to_thread(ray.nodes)}
        here, at = this_node(), table["bundles_to_node_id"]
        # This node's ranks first, so that the rank that answers is here if any is.
        self.bundles = sorted(at, key=lambda bundle: (at[bundle] != here, at[bundle], bundle))
        self.nodes = [
            Node(at[bundle], known[at[bundle]]["NodeManagerAddress"], known[at[bundle]]["NodeManagerPort"])
            for bundle in self.bundles
        ]

    def give_back(self) -> None:
        """Give the places back; what runs there is killed. Blocks."""
        with suppress(Exception):  # the cluster may be gone, and the places with it
            remove_placement_group(self.group)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")
