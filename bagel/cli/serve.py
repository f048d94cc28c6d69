"""`bagel serve`: all services of a deploy file on this machine, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path
from typing import Any

from bagel.checkpoint.files import Checkpoint
from bagel.cli.endpoint import security_of
from bagel.cli.flags import GATEWAY_HOST, GATEWAY_PORT, INIT_TIMEOUT_S, flag_name, stage_settings
from bagel.cli.outputs import write_out
from bagel.cli.passing import asked_settings
from bagel.cli.progress import say
from bagel.deployment.defaults import NANO_NOTE, find_model, named_model
from bagel.deployment.deploy_file import deployment_for, effective_settings
from bagel.deployment.gateway_config import default_keys
from bagel.deployment.launcher import Deployment, reachable
from bagel.deployment.process import Logs
from bagel.deployment.schema import DeployConfig
from bagel.errors import ConfigError
from bagel.rpc.api_keys import read_keys
from bagel.rpc.reach import check_free
from bagel.rpc.transport import Security
from bagel.telemetry.log_files import LOG_BYTES, LOG_FILES, LogFolder

PROFILER = "enable_diffusion_pipeline_profiler"
WATCH_S = 0.2


def serve(args: argparse.Namespace) -> None:
    """Run the command; returns after Ctrl-C or SIGTERM. Raises BagelError if a service ends by itself."""
    model, checkpoint = find_model(args.model)
    config = deployment_for(checkpoint, args.deploy_config, **stage_settings(args))
    settings = _settings(args)
    where = _where(args)
    starting = deployment(args, config, model, checkpoint, **where, logs=_logs(args), **settings)
    for note in config.notes():  # an error stands alone
        say(f"note: {note}")
    if not named_model(args.model):
        say(NANO_NOTE)
    # SIGTERM ends it as Ctrl-C does, so that the services drain.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        say(f"loading {model}")
        with starting as running:
            security, keys = security_of(args), settings["api_keys"]
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
    **settings: Any,
) -> Deployment:
    """The services as the flags say, telling the user when each is ready. model: what it is called.

    settings: of the services, beside those that every command has flags for.
    """

    def on_ready(name: str, address: str, seconds: float) -> None:
        stages = [each for each in config.spec.stages if name.startswith(f"{each.model_stage}-")]
        about = [effective_settings(config.stage(each.stage_id)) for each in stages]
        say("; ".join([f"{name} is ready at {address}, {seconds:.1f} s", *about]))

    flags = {"device": "device", "dtype": "dtype", "batch_timeout_s": "batch_timeout", PROFILER: PROFILER}
    flags |= {"worker_backend": "worker_backend", "ray_address": "ray_address"}
    asked = {name: getattr(args, flag, None) for name, flag in flags.items()}
    return Deployment(
        config,
        checkpoint.folder,
        name=model,
        host=host,
        gateway_port=port,
        init_timeout_s=args.init_timeout or INIT_TIMEOUT_S,
        logs=logs,
        on_ready=on_ready,
        **{**{name: value for name, value in asked.items() if value is not None}, **settings},
    )


def _where(args: argparse.Namespace) -> dict[str, Any]:
    """Host and port of the gateway; ConfigError for one that is not free, before anything is loaded."""
    host, port = args.host or GATEWAY_HOST, GATEWAY_PORT if args.port is None else args.port
    check_free(f"{f'[{host}]' if ':' in host else host}:{port}", "--host and --port")
    if args.http is not None:
        check_free(args.http, "--http")
    return {"host": host, "port": port}


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The services' settings; ConfigError for a file of API keys that cannot be used."""
    settings = asked_settings(args)
    if "api_keys" not in settings:
        settings["api_keys"] = default_keys()
    if settings["api_keys"] is not None:
        # Read only to check it before anything starts; the gateway reads it again.
        read_keys(settings["api_keys"])
    return settings


def _say_how_to_call(address: str, security: Security, keys: Path | None) -> None:
    # The address is all that goes to stdout, for scripts to read.
    write_out(f"{address}\n")
    tls = " --tls-ca FILE" + " --tls-certificate FILE --tls-key FILE" * bool(security.ca) if security.serves_tls else ""
    key = "" if keys is None else " --api-key-file FILE"
    say(f"ready; try: bagel generate --endpoint {reachable(address)}{tls}{key} --prompts 'a large red circle'")
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
