"""Train bagel-nano in stages, each for a given time.

python -m training.nano.train vae --run RUN --minutes 3.7                     the autoencoder
python -m training.nano.train joint --run RUN --minutes 7.4 --rate-to 0.8     the whole model, the first of two parts
python -m training.nano.train joint --run RUN --minutes 8.4 --rate-from 0.8   the second part
python -m training.nano.recipe RUN                                            all of them
python -m training.nano.train joint --run RUN --minutes 30 --rate 4e-4 --expert generation --groups draw=24 edit=3
                                                                              trains drawing further, say on a CPU

RUN holds checkpoint/ (the model to serve), state.pt (the optimizer's state; generation.pt with --expert generation) and
log.jsonl. Without state.pt, or with --fresh, `joint` starts from the weights in checkpoint/.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bagel.arguments import OnceParser
from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.roles import Role
from bagel.model.bagel import Bagel
from bagel.model.tokenizer import BagelTokenizer
from bagel.model.weights import load_model
from training.nano.batches import LAYOUTS, batches
from training.nano.journal import Journal, Schedule
from training.nano.network import NANO, TINY, export, new_model, write_config
from training.nano.optim import FlatOptimizer, Rates
from training.nano.train_joint import Trainer, train_joint
from training.nano.train_vae import NOISE, VaeTrainer, train_vae

COUNTS = {"draw": 88, "plan": 24, "edit": 60, "see": 40, "reason": 16}
"""New examples per batch. Groups that draw learn from train_joint.REUSE times as many."""
GENERATION = (".gen_", "norm_moe_gen", "vae2llm", "llm2vae", "time_embedder")
"""Parts of the names of parameters that only latents pass through."""
TINY_COUNTS = {"draw": 2, "plan": 1, "edit": 1, "see": 4, "reason": 2}


def vae_stage(args: argparse.Namespace, device: torch.device) -> None:
    """Write the configuration, train the autoencoder, save everything."""
    journal = Journal(args.run / "log.jsonl", "vae")
    journal.write(device=str(device))
    schedule = Schedule(args.minutes, 1.0, 0.02, 100)
    folder = args.run / "checkpoint"
    write_config(folder, TINY if args.tiny else NANO)
    each = 2 if args.tiny else 32
    stream = batches(folder, {"draw": each, "edit": each}, args.seed, args.workers)
    model = new_model(folder, device, args.seed)
    compiled = args.compile and device.type == "cuda"
    train_vae(VaeTrainer(model, device, compiled=compiled, noise=args.noise), stream, schedule, journal)
    (args.run / "state.pt").unlink(missing_ok=True)  # of an earlier run, whose latents were other ones
    journal.write(bytes=export(model, folder))


def joint_stage(args: argparse.Namespace, device: torch.device) -> None:
    """Train the whole model from the state or the checkpoint in RUN; saves its EMA as the checkpoint."""
    journal = Journal(args.run / "log.jsonl", "joint")
    schedule = Schedule(args.minutes, args.rate_from, args.rate_to, args.rise)
    folder = args.run / "checkpoint"
    counts = _counts(args)
    # The clock is part of the seed, so that a second part does not repeat the examples of the first.
    stream = batches(folder, counts, args.seed + time.time_ns() % 2**31, args.workers)
    model = _load(folder, device, args.expert)
    rates = Rates(muon=args.rate, adam=0.75 * args.rate)
    learned = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = FlatOptimizer(learned, rates)
    state = args.run / {"both": "state.pt", "generation": "generation.pt"}[args.expert]
    if state.is_file() and not args.fresh:
        optimizer.load(torch.load(state, map_location=device, weights_only=True))
        journal.write(resumed=int(optimizer.count))
    journal.write(learned=optimizer.flat.numel(), device=str(device))

    def save() -> None:
        # Through a new file: a run that is stopped here keeps its old state.
        torch.save(optimizer.state(), state.with_suffix(".new"))
        os.replace(state.with_suffix(".new"), state)
        optimizer.swap()  # the EMA draws better than the last weights
        size = export(model, folder)
        optimizer.swap()
        journal.write(saved=int(optimizer.count), bytes=size)

    trainer = Trainer(model, device, compiled=args.compile and device.type == "cuda")
    try:
        train_joint(trainer, optimizer, stream, schedule, journal, save)
    finally:
        save()


def _counts(args: argparse.Namespace) -> dict[str, int]:
    """New examples per group in a batch; if only the generation expert learns, only groups that draw have any."""
    if args.groups:
        return dict(args.groups)
    counts = TINY_COUNTS if args.tiny else {group: round(args.batch * count) for group, count in COUNTS.items()}
    return {group: count for group, count in counts.items() if args.expert == "both" or LAYOUTS[group].draws}


def _group(text: str) -> tuple[str, int]:
    name, _, count = text.partition("=")
    if name not in COUNTS or not count.isdecimal() or int(count) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not like draw=24, with one of {', '.join(COUNTS)}")
    return name, int(count)


def _load(folder: Path, device: torch.device, expert: str) -> Bagel:
    """The checkpoint's model in float32.

    Everything but the position tables and the autoencoder learns. With expert="generation" only parameters that latents
    pass through learn, so that texts and the reading of pictures stay as they are.
    """
    tokenizer = BagelTokenizer(folder)
    delimiters = (tokenizer.image_start, tokenizer.image_end)
    model = load_model(Checkpoint(folder), Role.FULL, delimiter_ids=delimiters, device=device)
    for name, parameter in model.named_parameters():
        learns = not name.startswith("vae.") and "pos_embed.pos_embed" not in name
        parameter.requires_grad_(learns and (expert == "both" or any(part in name for part in GENERATION)))
    return model


def _gpu(parser: argparse.ArgumentParser) -> str:
    """The GPU; without one, the parser's error."""
    if not torch.cuda.is_available():
        parser.error(
            "torch sees no GPU. bagel-nano took 19.5 minutes on an H200; a CPU needs days for that, and in the same "
            "minutes learns next to nothing. To train on it all the same, give --device cpu, and --tiny to try the code"
        )
    return "cuda"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage."""
    parser = OnceParser(prog="python -m training.nano.train", description="Train bagel-nano.")
    parser.add_argument("stage", choices=("vae", "joint"))
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoint, state and log")
    parser.add_argument("--minutes", type=float, required=True, help="of the whole stage, compiling included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=min(14, max(1, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--noise", type=float, default=NOISE, help="the most noise that the autoencoder reads through")
    parser.add_argument("--rate", type=float, default=2.5e-3, help="Muon's highest; AdamW's is three quarters of it")
    parser.add_argument("--rate-from", type=float, default=1.0, help="factor of the rates at the stage's start")
    parser.add_argument("--rate-to", type=float, default=0.0, help="factor of the rates at the stage's end")
    parser.add_argument("--batch", type=float, default=1.0, help="share of a whole batch; a small one makes more steps")
    parser.add_argument(
        "--groups",
        nargs="+",
        type=_group,
        default=[],
        metavar="GROUP=N",
        help="a batch of these alone, of N new examples",
    )
    parser.add_argument("--expert", choices=("both", "generation"), default="both", help="which of them learns")
    parser.add_argument("--rise", type=int, default=200, help="steps until the rates are at their height")
    parser.add_argument("--fresh", action="store_true", help="ignore state.pt")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", help="cuda where there is a GPU; a CPU must be asked for")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the code")
    args = parser.parse_args(argv)
    if args.expert == "generation" and (useless := [name for name, _ in args.groups if not LAYOUTS[name].draws]):
        parser.error(f"--expert generation learns nothing from {', '.join(useless)}: no picture is drawn there")
    device = torch.device(args.device or _gpu(parser))
    print(f"stage {args.stage}: {args.minutes:g} minutes on {device}; its log is {args.run}/log.jsonl", file=sys.stderr)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(args.seed + int(time.time()))
    {"vae": vae_stage, "joint": joint_stage}[args.stage](args, device)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
