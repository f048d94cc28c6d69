"""The end-to-end cases through the real services of a topology: texts, ids, pictures, and the K/V pulled."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from bagel.checkpoint.files import Checkpoint
from bagel.client import Client
from bagel.deployment.deploy_file import load_deploy_config, shipped_deploy_config
from bagel.deployment.launcher import Deployment
from bagel.effect import effective
from bagel.engine.loading import kv_layout
from bagel.engine.segments import Chain, ChainPlanner
from bagel.kv.digests import SegmentKind, fingerprint
from bagel.kv.puller import KvPuller
from bagel.kv.store import KvStore
from bagel.model.tokenizer import BagelTokenizer
from bagel.model.vae import TILE_SIZE
from bagel.parity.golden import Case, Golden
from bagel.parity.prompts import case_prompt
from bagel.parity.report import Comparison, absolute
from bagel.parity.runs import case_modality, case_options
from bagel.pipelines import pipeline
from bagel.prompts import BranchName, Prompt, TextPart, expand_cfg_prompts, expand_cfg_prompts_think, text_prompt
from bagel.request import PosteriorMode, resolve
from bagel.rpc.convert import part_to_wire, posterior_to_wire
from bagel.rpc.transport import channel
from bagel.v1 import kv_pb2, thinker_pb2
from bagel.v1.thinker_pb2_grpc import ThinkerServiceStub

NOT_SERVED = frozenset({"components"})
"""Cases of the network's parts alone, which no service gives out."""
KV_FAMILIES = ("kv_after_vae", "kv_after_vit", "kv_after_prompt", "kv_prompt_part", "kv_gen", "kv_cfg_img")
"""Recorded K/V that services hand over; that of decoding (kv_after_generation) they never do."""
STORE_BYTES = 2**30


def compare_served(
    golden: Golden,
    topology: str,
    device: str,
    tolerance: float,
    engine: str | None = None,
    sizes: Mapping[str, Any] = MappingProxyType({}),
    **settings: Any,
) -> Iterator[Comparison]:
    """Every end-to-end case through the services of a topology, started once for each pair of image transforms.

    engine: the Thinker's; sizes: of the DiT's ranks; settings: of the services.
    """
    groups: dict[str, list[Case]] = {}
    for case in golden.cases("fp32"):
        if case.name not in NOT_SERVED:
            groups.setdefault(_transforms_of(case), []).append(case)
    config = load_deploy_config(shipped_deploy_config(topology), engine=engine, **sizes)
    # Transforms belong to a checkpoint's configuration, so each pair needs services of its own.
    for transforms, cases in groups.items():
        with tempfile.TemporaryDirectory(prefix="bagel-parity-") as folder:
            model = _with_transforms(golden.checkpoint.folder, transforms, Path(folder))
            logs = Path(folder) / "logs"
            with Deployment(config, model, device=device, dtype="float32", logs=logs, **settings) as services:
                run = ServedRun(services, topology, Checkpoint(model), tiling=config.stages[-1].tiling)
                for case in cases:
                    yield run.compare(case, tolerance)


class ServedRun:
    """Running services of one topology, and how a case is put to them."""

    def __init__(self, services: Deployment, topology: str, checkpoint: Checkpoint, *, tiling: bool) -> None:
        self._tiling = tiling
        self._gateway = services.address
        self._thinker = next((each.address(0) for each in services.services if each.name == "thinker-0"), None)
        self._two_stages = len(pipeline(topology).stages) > 1
        self._layout = kv_layout(checkpoint, "float32")
        self._fingerprint = fingerprint(checkpoint.fingerprint, "float32")
        self._planner = ChainPlanner(checkpoint.config, BagelTokenizer(checkpoint.folder), self._fingerprint)

    def compare(self, case: Case, tolerance: float) -> Comparison:
        """Put one case to the services and compare all that they give out."""
        report = Comparison(case.name, {}, absolute(tolerance))
        try:
            report.tensors = {name: tensor for name, tensor in case.tensors.items() if self._is_handed_over(name)}
            text = self._generate(case, report)
            # A single stage hands no K/V over.
            if self._two_stages:
                asyncio.run(self._compare_kv(case, text, report))
            report.finish(name for name in case.data["images"] if name.endswith(".image.png") and not _is_mean(case))
        except Exception as error:  # a case that fails is one failure, not the end of the rest
            report.failures.append(f"{type(error).__name__}: {error}")
        return report

    def _is_handed_over(self, tensor: str) -> bool:
        family = tensor.partition(".")[0]
        return self._two_stages and (family in KV_FAMILIES or (family.startswith("turn") and ".kv." in tensor))

    def _generate(self, case: Case, report: Comparison) -> str:
        """The case through the gateway; its text."""
        if "turns" in case.data or _is_mean(case):
            # No request, or one whose noise the recording drew in an order of its own.
            return ""
        prompt, draws = case_prompt(case), "num_timesteps" in case.settings
        options = {**case_options(case), "posterior": PosteriorMode.SEED}
        if "end_token_id" in case.settings:  # a direct call of Bagel.generate_text
            options |= {
                "stop_token_ids": [case.settings["end_token_id"]],
                "max_tokens": case.settings["max_length"] - 1,
            }
        modality = case_modality(prompt, picture=draws)
        options = effective(resolve(modality, prompt, {}, options), options)
        with Client(self._gateway) as client:
            result = client.generate(prompt, modality=modality, timeout=300, **options)
        wanted = case.result["think"] if draws and case.settings.get("think") else case.result
        if not draws or case.settings.get("think"):
            report.equal("ids", [self._planner.tokenizer.bos, *result.token_ids], wanted["ids_with_bos"])
            if "end_token_id" not in case.settings:
                report.equal("text", result.text, wanted["text"])
        if draws:
            assert result.image is not None
            path = case.pictures["image"]
            if self._tiling and max(result.image.size) > TILE_SIZE:
                # Of blended tiles there is no recording; without services they are compared with those of one rank.
                report.compared.add(path.name)
            else:
                report.picture("image", result.image, path)
        return result.text

    async def _compare_kv(self, case: Case, text: str, report: Comparison) -> None:
        if "turns" in case.data:
            await self._compare_turns(case, report)
        elif "num_timesteps" in case.settings:
            await self._compare_branches(case, text, report)
        else:
            await self._compare_prompt(case, report)

    async def _compare_turns(self, case: Case, report: Comparison) -> None:
        prompt: Prompt = ()
        for i, turn in enumerate(case.data["turns"]):
            prompt = (*prompt, TextPart(turn["text"]))
            pulled = await self._pull(case, prompt, report)
            report.equal(f"turn{i}.contexts", pulled.lengths, {"kv_lens": turn["kv_lens"], "ropes": turn["ropes"]})
            pulled.compare(f"turn{i}.kv", report)

    async def _compare_prompt(self, case: Case, report: Comparison) -> None:
        parts = text_prompt(case_prompt(case), think=bool(case.settings.get("think")))
        pulled = await self._pull(case, parts, report)
        for name in ("context_after_prompt", "context_at_generation"):
            if (recorded := case.data.get(name) or case.result.get(name)) is not None:
                report.equal(name, pulled.lengths, recorded)
        pulled.compare("kv_after_prompt", report)
        pulled.compare("kv_prompt_part", report, first=len(pulled.chain.segments) - 1)
        pulled.compare_blocks(report)

    async def _compare_branches(self, case: Case, text: str, report: Comparison) -> None:
        think = bool(case.settings.get("think"))
        expand = expand_cfg_prompts_think if think else expand_cfg_prompts
        for branch in expand(case_prompt(case)):
            gen = branch.name is BranchName.GEN
            # A think text is a text part of gen once it is written.
            parts = (*branch.parts, TextPart(text)) if gen and think else branch.parts
            pulled = await self._pull(case, parts, report)
            report.equal(f"contexts.{branch.name}", pulled.lengths, case.result["contexts"][branch.name.value])
            if branch.name is not BranchName.CFG_TEXT:  # which is a prefix of gen
                pulled.compare(f"kv_{branch.name}", report)
            if gen:
                pulled.compare_blocks(report)

    async def _pull(self, case: Case, parts: Prompt, report: Comparison) -> _Pulled:
        """Have the Thinker build a context, pull it as a DiT does, and check that it is the one meant."""
        seed, mode = case.data.get("seed") or 0, PosteriorMode.MEAN if _is_mean(case) else PosteriorMode.SEED
        chain = self._planner.chain(parts, self._planner.prepare_images(parts, mode, seed))
        # An empty context has no K/V to pull.
        if not parts:
            return _Pulled(chain, {})
        assert self._thinker is not None
        request = thinker_pb2.BuildContextRequest(
            parts=[part_to_wire(part) for part in parts], seed=seed, posterior=posterior_to_wire(mode), send_kv=True
        )
        async with channel(self._thinker) as connection:
            events = ThinkerServiceStub(connection).BuildContext(request, timeout=300)
            ref = kv_pb2.ContextRef()
            # A new store each time, so that everything is pulled and nothing reused.
            store = KvStore(self._layout, self._fingerprint, STORE_BYTES)
            puller = KvPuller(store, {"thinker-0": connection})
            async for event in events:
                if event.WhichOneof("event") == "context":
                    ref = event.context
                    async with puller.hold([ref]) as held:
                        await held.fetch()
                        # Copies, as the store may reuse its memory once the context is no longer held.
                        kv = {segment.digest: _copy(store.load(segment.digest)) for segment in ref.segments}
            await puller.close()
        report.equal("digests", [segment.digest for segment in ref.segments], [each.digest for each in chain.segments])
        report.equal("next_rope", ref.next_rope, chain.rope)
        return _Pulled(chain, kv)


class _Pulled:
    """A context that was pulled: K and V by segment, each [layers, length, kv_heads, head_dim]."""

    def __init__(self, chain: Chain, kv: Mapping[bytes, tuple[Tensor, Tensor]]) -> None:
        self.chain, self._kv = chain, kv

    @property
    def lengths(self) -> dict[str, list[int]]:
        return {"kv_lens": [self.chain.length], "ropes": [self.chain.rope]}

    def compare(self, name: str, report: Comparison, *, first: int = 0, last: int | None = None) -> None:
        """Segments first to last as the recorded K/V of that name."""
        segments = [self._kv[segment.digest] for segment in self.chain.segments[first:last]]
        if not segments:
            return
        for which, tensors in zip("kv", zip(*segments, strict=True), strict=True):
            joined = torch.cat(tensors, dim=1)
            for layer in range(len(joined)):
                report.tensor(f"{name}.{layer}.{which}", joined[layer])

    def compare_blocks(self, report: Comparison) -> None:
        """The context as it was after its first image's VAE and ViT tokens."""
        for name, kind in (("kv_after_vae", SegmentKind.VAE), ("kv_after_vit", SegmentKind.VIT)):
            ends = [i for i, segment in enumerate(self.chain.segments, 1) if segment.kind is kind]
            if ends:
                self.compare(name, report, last=ends[0])


def _is_mean(case: Case) -> bool:
    return str(case.data.get("posterior", "")).startswith("mean")


def _transforms_of(case: Case) -> str:
    transforms = case.data["transforms"]
    return json.dumps({"vae": transforms["vae"], "vit": transforms["vit"]})


def _with_transforms(checkpoint: Path, transforms: str, folder: Path) -> Path:
    """A checkpoint folder that differs in its image transforms alone: links, and a config.json of its own."""
    model = folder / "checkpoint"
    model.mkdir()
    for file in checkpoint.iterdir():
        if file.name != "config.json":
            (model / file.name).symlink_to(file.resolve())
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config["image_transforms"] = json.loads(transforms)
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return model


def _copy(tensors: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    k, v = (tensor.clone() for tensor in tensors)
    return k, v
