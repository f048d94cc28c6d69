"""`bagel serve`: all services of a deploy file on this machine, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bagel.checkpoint.files import Checkpoint
from bagel.cli.endpoint import security_of
from bagel.cli.flags import BATCH_TIMEOUT_S, GATEWAY_HOST, GATEWAY_PORT, INIT_TIMEOUT_S, flag_name
from bagel.cli.outputs import write_out
from bagel.cli.passing import passed_arguments
from bagel.cli.progress import say
from bagel.deployment.defaults import NANO_NOTE, deployment_for, find_model, named_model
from bagel.deployment.deploy_file import DeployConfig, effective_settings
from bagel.deployment.http_front import FLAGS, http_guards
from bagel.deployment.launcher import Deployment, reachable
from bagel.deployment.process import Logs
from bagel.errors import ConfigError
from bagel.rpc.api_keys import key_file, read_keys
from bagel.rpc.limits import DRAIN_S
from bagel.rpc.transport import PLAINTEXT, Security
from bagel.telemetry.log_files import LOG_BYTES, LOG_FILES, LogFolder

WATCH_S = 0.2


def serve(args: argparse.Namespace) -> None:
    """Run the command; returns after Ctrl-C or SIGTERM. Raises BagelError if a service ends by itself."""
    model, checkpoint = find_model(args.model)
    config = deployment_for(checkpoint, args.deploy_config, engine=args.engine)
    passed = passed_arguments(args, ("gateway", *(stage.model_stage for stage in config.spec.stages)))
    for note in config.notes():
        say(f"note: {note}")
    if not named_model(args.model):
        say(NANO_NOTE)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        say(f"loading {model}")
        port = GATEWAY_PORT if args.port is None else args.port
        logs = _logs(args)
        host = args.host or GATEWAY_HOST
        security, keys = _front(args), _keys(args)
        _check_http(args)
        where: dict[str, Any] = {"host": host, "port": port, "logs": logs, "security": security, "api_keys": keys}
        where |= {"more": passed, "drain_timeout_s": args.drain_timeout or DRAIN_S}
        with deployment(args, config, model, checkpoint, **where, log_stats=bool(args.log_stats)) as running:
            _say_how_to_call(running.address, security, keys)
            if running.http:
                say(f"the OpenAI API is at http{'s' * security.serves_tls}://{reachable(running.http)}/v1")
            while True:
                running.check()
                time.sleep(WATCH_S)
    except KeyboardInterrupt:
        say("stopped")
    finally:
        signal.signal(signal.SIGTERM, before)


def deployment(
    args: argparse.Namespace,
    config: DeployConfig,
    model: str,
    checkpoint: Checkpoint,
    *,
    host: str = GATEWAY_HOST,
    port: int = 0,
    logs: Logs = None,
    security: Security = PLAINTEXT,
    api_keys: Path | None = None,
    log_stats: bool = False,
    drain_timeout_s: float = DRAIN_S,
    more: Mapping[str, Sequence[str]] | None = None,
) -> Deployment:
    """The services as the flags say, telling the user when each is ready. model: what it is called.

    more: further arguments by role; log_stats: the gateway logs them, where no command of ours prints them.
    """

    def on_ready(name: str, address: str, seconds: float) -> None:
        stages = [each for each in config.spec.stages if name.startswith(f"{each.model_stage}-")]
        about = [effective_settings(config.stage(each.stage_id)) for each in stages]
        say("; ".join([f"{name} is ready at {address}, {seconds:.1f} s", *about]))

    return Deployment(
        config,
        checkpoint.folder,
        name=model,
        host=host,
        gateway_port=port,
        device=args.device or "auto",
        dtype=args.dtype or "auto",
        init_timeout_s=args.init_timeout or INIT_TIMEOUT_S,
        batch_timeout_s=args.batch_timeout or BATCH_TIMEOUT_S,
        profile=bool(getattr(args, "enable_diffusion_pipeline_profiler", None)),
        log_stats=log_stats,
        security=security,
        http=getattr(args, "http", None),
        guards=http_guards(args) if hasattr(args, "http") else None,
        model_names=getattr(args, "served_model_name", None) or (),
        api_keys=api_keys,
        logs=logs,
        on_ready=on_ready,
        drain_timeout_s=drain_timeout_s,
        more=more,
    )


def _front(args: argparse.Namespace) -> Security:
    """TLS of the gateway's port; ConfigError for files that are missing or cannot be read."""
    security = replace(security_of(args), clients=tuple(args.tls_allow_client or ()))
    security.check_server()
    return security


def _keys(args: argparse.Namespace) -> Path | None:
    """The file of API keys, if there is one; ConfigError for one that cannot be used."""
    path = key_file(None if args.api_keys is None else Path(args.api_keys))
    if path is not None:
        read_keys(path)
    return path


def _say_how_to_call(address: str, security: Security, keys: Path | None) -> None:
    write_out(f"{address}\n")
    tls = " --tls-ca FILE" + " --tls-certificate FILE --tls-key FILE" * bool(security.ca) if security.serves_tls else ""
    key = "" if keys is None else " --api-key-file FILE"
    say(f"ready; try: bagel generate --endpoint {reachable(address)}{tls}{key} --prompts 'a red cube'")
    say("Ctrl-C stops it")


def _logs(args: argparse.Namespace) -> Logs:
    """Where the services' output goes; ConfigError for flags that say nothing together."""
    if args.log_dir is None:
        for flag in ("log_max_bytes", "log_files"):
            if getattr(args, flag) is not None:
                raise ConfigError(f"{flag_name(flag)} has no effect without --log-dir; leave it out")
        return sys.stderr
    try:
        Path(args.log_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--log-dir {args.log_dir!r} cannot be made: {error.strerror}; choose another folder"
        ) from None
    return LogFolder(Path(args.log_dir), args.log_max_bytes or LOG_BYTES, args.log_files or LOG_FILES)


def _check_http(args: argparse.Namespace) -> None:
    """Raise ConfigError for what is said of an HTTP front that there is not."""
    given = [flag.name for flag in FLAGS if getattr(args, flag.name.strip("-").replace("-", "_")) is not None]
    given += ["--served-model-name"] if args.served_model_name else []
    if given and args.http is None:
        raise ConfigError(f"{given[0]} has no effect without --http; give --http HOST:PORT, or leave it out")
