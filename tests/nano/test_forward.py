"""The forward pass of training equals the engine's, on random weights."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image
from torch import Tensor

from bagel.engine.context import Context, ContextBuilder
from bagel.engine.memory import kv_space_of
from bagel.engine.picture import Picture
from bagel.engine.sampler import Canvas
from bagel.engine.segments import ChainPlanner
from bagel.engine.text import TextBatch, TextRun, text_kv_tokens
from bagel.model.bagel import Bagel
from bagel.model.pixels import to_pixels
from bagel.model.tokenizer import BagelTokenizer
from bagel.model.vit import vit_patchify
from bagel.prompts import BranchName, ImagePart, Part, TextPart
from bagel.request import ImageSettings, PosteriorMode, TextSettings
from training.nano.batches import IGNORED, LAYOUTS, pack, unpack
from training.nano.examples import Example
from training.nano.forward import Inputs, Outputs, forward
from training.nano.images import VitInput, clean_latents, to_pictures
from training.nano.network import TINY, new_model, write_config
from training.nano.render import Renderer, encode_scenes
from training.nano.tasks import GROUPS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("nano")
    write_config(made, TINY)
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> Bagel:
    made = new_model(folder, "cpu")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        assert made.llm2vae is not None
        made.llm2vae.weight.normal_(0, 0.1)
    return made.eval()


class _Both:
    """One example through both passes."""

    def __init__(self, folder: Path, model: Bagel, name: str) -> None:
        self.model, self.tokenizer = model, BagelTokenizer(folder)
        self.example: Example = GROUPS[name](Random(5))
        self.noise = torch.randn(1, 64, model.config.latent_features, generator=torch.Generator().manual_seed(1))
        self.group = LAYOUTS[name]

    def training(self) -> tuple[Outputs, Tensor]:
        batch = unpack(self.group, pack(self.tokenizer, self.group, [self.example]), "cpu")
        patches = clean = None
        if self.example.source is not None:
            picture = self.picture()
            pixels = to_pixels(picture)[None]
            small = to_pixels(picture.resize((112, 112), 3))
            patches = vit_patchify(small, 14)[None]
            assert self.model.vae is not None
            clean = clean_latents(self.model.vae, pixels)
        elif self.group.vit:
            patches = torch.zeros(1, 64, 588)
        with torch.no_grad():
            inputs = Inputs(patches, clean, *((self.noise, torch.ones(1)) if self.group.draws else ()))
            [outputs] = forward(self.model, [(batch, inputs)])
        return outputs, batch.labels[0]

    def picture(self) -> Image.Image:
        assert self.example.source is not None
        return to_pictures(Renderer("cpu")(encode_scenes([self.example.source])))[0]

    def context(self, *, answer: bool) -> Context:
        planner = ChainPlanner(self.model.config, self.tokenizer, b"test")
        texts: list[Part] = [TextPart(text) for text in self.example.texts]
        parts = texts
        if self.example.source is not None:
            image = ImagePart(self.picture(), for_generation=self.example.vae, for_understanding=self.example.vit)
            parts = [*texts[:-1], image, texts[-1]]
        images = planner.prepare_images(tuple(parts), PosteriorMode.MEAN, 0)
        chain = planner.chain(tuple(parts), images)
        if answer and self.example.answer is not None:
            chain = planner.append_text(chain, self.example.answer)
        return ContextBuilder(self.model).build(chain)

    def velocity(self) -> Tensor:
        seen: list[Tensor] = []
        settings = ImageSettings(steps=2, cfg_text_scale=1.0)
        picture = Picture(settings, (8, 8), self.noise[0], {BranchName.GEN: self.context(answer=True)})
        canvas = Canvas(self.model, 64, kv_space_of(self.model, picture.kv_tokens(64)))
        canvas.step([canvas.add(picture)], lambda drawing, by, guided: seen.append(guided.clone()))
        return seen[0]

    def logits(self) -> Tensor:
        assert self.example.answer is not None
        answer = self.tokenizer.encode(self.example.answer)
        run = TextRun(self.context(answer=False), TextSettings(max_tokens=len(answer) + 2), 0)
        batch = TextBatch(self.model, self.tokenizer, kv_space_of(self.model, [text_kv_tokens(run)]))
        batch.add(run)
        rows = []
        with torch.inference_mode():
            for count in range(len(answer) + 1):
                run.tokens = answer[:count]
                rows.append(batch._forward()[0][0])
        return torch.stack(rows)


@pytest.mark.parametrize("name", ["draw", "plan", "edit"])
def test_velocities_are_the_engines(folder: Path, model: Bagel, name: str) -> None:
    both = _Both(folder, model, name)
    velocity = both.training()[0].velocity
    assert velocity is not None
    expected = both.velocity()
    assert expected.std() > 0.1
    torch.testing.assert_close(velocity[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["plan", "see", "reason"])
def test_logits_are_the_engines(folder: Path, model: Bagel, name: str) -> None:
    both = _Both(folder, model, name)
    outputs, labels = both.training()
    expected = both.logits()
    assert labels[labels != IGNORED].tolist() == [
        *both.tokenizer.encode(both.example.answer or ""),
        both.tokenizer.eos,
    ]
    assert outputs.logits is not None
    torch.testing.assert_close(outputs.logits[0][labels != IGNORED], expected, atol=1e-4, rtol=0)


def test_vit_input_is_pillows_resize() -> None:
    scenes = [example.target for example in (GROUPS["draw"](Random(i)) for i in range(8)) if example.target]
    pixels = Renderer("cpu")(encode_scenes(scenes))
    patches = VitInput("cpu")(pixels)
    for mine, picture in zip(patches, to_pictures(pixels), strict=True):
        theirs = vit_patchify(to_pixels(picture.resize((112, 112), 3)), 14)
        assert (mine - theirs).abs().max() <= 2.1 / 127.5
