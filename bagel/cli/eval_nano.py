"""`bagel eval-nano`: score the shipped model, or another of its kind, through a gateway.

What is asked and how it is judged is in training/nano, which is part of a checkout and not of an installed wheel.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from bagel.cli.endpoint import api_key_of, refuse_without_endpoint, security_of
from bagel.cli.flags import EVALUATED, EVALUATION, TOPOLOGY, flag_name
from bagel.cli.progress import say
from bagel.cli.serve import deployment
from bagel.client.batch import ask_of, generate_all
from bagel.client.omni import ServedEngine, describe
from bagel.deployment.defaults import find_model
from bagel.deployment.deploy_file import load_deploy_config, shipped_deploy_config
from bagel.errors import ConfigError
from bagel.events import Result
from bagel.request import Request

EVALUATE, ROWS = "training.nano.evaluate", "training.nano.rows"
"""By name: they import torch to draw what is edited and described."""
Generate = Callable[[Sequence[Request]], list[Result]]
"""Something that serves requests, in their order."""
OWN_SERVICES = ("model", "device", "dtype", "engine", "topology", "init_timeout", "batch_timeout")
"""Flags about services that the command starts itself."""


def eval_nano(args: argparse.Namespace) -> None:
    """Run the command; raises ConfigError where the evaluation is not installed, BagelError if a row failed."""
    evaluate, rows = _evaluation(EVALUATE), _evaluation(ROWS)
    # The rows' names are checked before any service starts.
    chosen = rows.rows_named(args.rows or [])
    count = EVALUATED if args.count is None else args.count
    with _served(args) as (generate, about):
        say(f"{len(chosen)} rows of {count} requests")
        folder = Path(args.output or EVALUATION)
        evaluate.score(generate, chosen, folder, seed=1 if args.seed is None else args.seed, count=count, **about)


@contextmanager
def _served(args: argparse.Namespace) -> Iterator[tuple[Generate, dict[str, str]]]:
    """The gateway to ask, and what to note about it: a running one, or of services for the command's own time."""
    if args.endpoint is not None:
        if given := [flag_name(flag) for flag in OWN_SERVICES if getattr(args, flag) is not None]:
            raise ConfigError(f"--endpoint is a gateway that runs as it is; leave out {', '.join(given)}")
        security, api_key = security_of(args), api_key_of(args)
        model = describe(args.endpoint, security=security, api_key=api_key)
        about = {"model": model.name, "fingerprint": model.checkpoint_fingerprint.hex()}
        about |= {"device": model.device, "dtype": model.dtype}

        def generate(requests: Sequence[Request]) -> list[Result]:
            return generate_all(args.endpoint, list(map(ask_of, requests)), security=security, api_key=api_key)

        yield generate, about
        return
    refuse_without_endpoint(args)
    name, checkpoint = find_model(args.model)
    topology = args.topology or TOPOLOGY
    config = load_deploy_config(shipped_deploy_config(topology), engine=args.engine)
    about = {"model": name, "topology": topology}
    say(f"loading {name}")
    with deployment(args, config, name, checkpoint) as services:
        engine = ServedEngine(services)
        about |= {"fingerprint": engine.fingerprint.hex(), "device": engine.device, "dtype": engine.dtype}
        yield engine.generate, about


def _evaluation(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the evaluation is not installed: {error}; run this in a checkout of the repository, after make setup"
        ) from None
