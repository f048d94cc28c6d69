"""The flags of the command line. Standard library alone, so that --help answers at once.

No flag has a default here: what the user did not give is None, so that the deploy file and then the tables of
bagel.request fill it in. What the help calls the default is tested against those tables.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from bagel.deployment.http_front import GUARDS
from bagel.deployment.shared_settings import BATCH_TIMEOUT_S, DTYPES, ENGINES, OFFLOADS, TOPOLOGIES, WORKER_BACKENDS
from bagel.errors import ConfigError
from bagel.rpc.limits import DRAIN_S
from bagel.telemetry.log_files import LOG_BYTES, LOG_FILES
from bagel.vocabulary import FLAG_INSTEAD, instead_of

MODALITIES = ("text2img", "img2img", "img2text", "text2text")
RENORM_TYPES = ("global", "text_channel", "channel")
POSTERIOR_MODES = ("content", "seed", "mean")
ROLES = ("understand", "context", "denoise", "full")

INIT_TIMEOUT_S = 300
GATEWAY_PORT = 50051
GATEWAY_HOST = "127.0.0.1"
OUTPUT = "."
EVALUATION, EVALUATED = "demo-output/eval-nano", 200
TOPOLOGY = "bagel"
HEALTH_TIMEOUT_S = 3
INTERRUPTED = 130
"""Exit code after Ctrl-C."""

EXAMPLES = """examples:
  bagel generate --prompts "a large red circle to the left of a small blue square" --seed 7
  bagel generate --modality img2img --image-path picture.png --prompts "make the circle green"
  bagel generate --endpoint 127.0.0.1:50051 --modality img2text --image-path picture.png --prompts "describe the image"
"""
"""At the end of `bagel generate --help`."""
PICTURE_FLAGS = (
    "height",
    "width",
    "steps",
    "timestep_shift",
    "cfg_text_scale",
    "cfg_img_scale",
    "cfg_interval",
    "cfg_renorm_type",
    "cfg_renorm_min",
    "negative_prompt",
)
SAMPLING_FLAGS = ("do_sample", "text_temperature", "top_p", "top_k", "repetition_penalty")
REQUEST_FLAGS = (
    "seed",
    "think",
    "max_think_tokens",
    "max_tokens",
    "posterior",
    *SAMPLING_FLAGS,
    *PICTURE_FLAGS,
)
"""Flags that are a request's options, as argparse's names; `request_option` has the name in bagel.request."""
SERVER_FLAGS = (
    "model",
    "device",
    "dtype",
    "engine",
    "deploy_config",
    "cfg_parallel_size",
    "worker_backend",
    "ray_address",
    "quantization",
    "cpu_offload",
    "init_timeout",
    "batch_timeout",
    "enable_diffusion_pipeline_profiler",
)
"""Flags that configure what serves, which a running gateway has settled."""

ENDPOINT_FLAGS = ("tls_certificate", "tls_key", "tls_ca", "api_key_file", "trusted_network")
"""Flags that say how a running gateway is spoken to."""

Group = argparse._ArgumentGroup


def request_option(flag: str) -> str:
    """The field of bagel.request that a flag (argparse's name) sets."""
    return "temperature" if flag == "text_temperature" else flag


def flag_name(flag: str) -> str:
    """argparse's name of a flag as the user types it."""
    return "--" + flag.replace("_", "-")


def complain_of_unknown(
    unknown: list[str], parser: argparse.ArgumentParser, elsewhere: Mapping[str, str] = MappingProxyType({})
) -> NoReturn:
    """Raise ConfigError for arguments that no flag takes, with what to do instead of each.

    elsewhere: flags that are none of this command's, and where what they set is set.
    """
    known = [name for action in parser._actions for name in action.option_strings]
    problems: list[str] = []
    # Only the first one: a word further on may be the value of an unknown flag.
    if not unknown[0].startswith("-"):
        places = {"--prompts": "a prompt goes behind --prompts", "--model": "a model goes behind --model"}
        hint = next((remedy for flag, remedy in places.items() if flag in known), "leave it out")
        problems.append(f"{unknown[0]!r} belongs to no flag; {hint}")
    flags = dict.fromkeys(argument for argument in unknown if argument.startswith("-"))
    problems += [_of_unknown(flag, parser.prog, known, elsewhere) for flag in flags]
    raise ConfigError(f"{'; '.join(problems)}; see {parser.prog} --help")


def _of_unknown(argument: str, command: str, known: list[str], elsewhere: Mapping[str, str]) -> str:
    flag = argument.partition("=")[0]
    plain = flag.replace("--no-", "--", 1)
    if plain in elsewhere:
        return f"{plain} is no flag of {command}: {elsewhere[plain]}"
    remedies = {
        name: remedy for name, remedy in FLAG_INSTEAD.items() if set(re.findall(r"--[a-z-]+", remedy)) <= {*known}
    }
    if instead := instead_of(flag, remedies, known):
        return f"unknown flag {argument!r}; {instead}"
    dash = "" if flag.startswith("--") else "; a value that begins with a dash goes behind =, as in --prompts=-x"
    return f"unknown flag {argument!r}{dash}"


def add_generate_flags(parser: argparse.ArgumentParser) -> None:
    """Add every flag of `bagel generate`."""
    _add_task(parser.add_argument_group("what to make"))
    _add_text(parser.add_argument_group("text"))
    _add_picture(parser.add_argument_group("pictures"))
    _add_engine(parser.add_argument_group("model and engine"))
    _add_client(parser)
    _add_reports(parser.add_argument_group("reports"))


def _add_task(group: Group) -> None:
    _add(group, "--modality", "text2img", "what goes in and what comes out", choices=MODALITIES)
    _add(group, "--prompts", "none", "one or several prompts", nargs="+", action="extend", metavar="TEXT")
    _add(group, "--txt-prompts", "none", "a UTF-8 text file, one prompt a line", type=_given, metavar="FILE")
    _add(group, "--image-path", "none", "input image, for img2img and img2text", type=_given, metavar="FILE")
    _add(group, "--output", OUTPUT, "folder for the pictures, made if missing", type=_given, metavar="FOLDER")
    _add(group, "--seed", "none, each prompt draws its own", "reproducible run", type=_whole, metavar="N")
    _add(group, "--think", "off", "<think> ... </think> before the answer or the picture", action="store_true")


def _add_text(group: Group) -> None:
    _add(group, "--max-think-tokens", 1000, "limit of the think text", type=_whole, metavar="N")
    _add(group, "--max-tokens", 1000, "limit of an answer", type=_whole, metavar="N")
    _add(group, "--do-sample", "off", "sample instead of greedy", action="store_true")
    _add(group, "--text-temperature", 0.3, "sampling temperature", type=_number, metavar="X")
    _add(group, "--top-p", 1.0, "sample from the likeliest tokens of this probability", type=_number, metavar="X")
    _add(group, "--top-k", "0, all", "sample from this many likeliest tokens", type=_whole, metavar="N")
    _add(group, "--repetition-penalty", 1.0, "above 1 discourages repeating tokens", type=_number, metavar="X")


def _add_picture(group: Group) -> None:
    size = "the model's; an edit: the resized input's"
    _add(group, "--height", size, "pixels, rounded down to 16", type=_whole, metavar="N")
    _add(group, "--width", size, "pixels, rounded down to 16", type=_whole, metavar="N")
    _add(group, "--steps", 50, "diffusion timesteps, one more than Euler steps", type=_whole, metavar="N")
    _add(group, "--timestep-shift", 3.0, "above 1 spends more steps at high noise", type=_number, metavar="X")
    _add(group, "--cfg-text-scale", 4.0, "text guidance, 1 is none", type=_number, metavar="X")
    _add(group, "--cfg-img-scale", "1.5 for edits, else 1.0", "image guidance, 1 is none", type=_number, metavar="X")
    _add(group, "--negative-prompt", "none", "text to steer away from", type=_given, metavar="TEXT")
    interval = "guidance is on for LO < t <= HI"
    _add(group, "--cfg-interval", "0.4 1.0; edits 0.0 1.0", interval, nargs=2, type=_number, metavar=("LO", "HI"))
    _add(group, "--cfg-renorm-type", "global; edits text_channel", "norm that guidance keeps", choices=RENORM_TYPES)
    _add(group, "--cfg-renorm-min", 0.0, "lower bound of the renorm factor", type=_number, metavar="X")
    _add(group, "--posterior", "content", "noise of an edit's input: see docs/options.md", choices=POSTERIOR_MODES)


def add_serve_flags(parser: argparse.ArgumentParser) -> None:
    """Add every flag of `bagel serve`."""
    group = parser.add_argument_group("what to serve")
    _add_model(group)
    _add_thinker(group)
    _add_stage(group)
    _add(group, "--deploy-config", "chosen from the model", "deploy file", type=_given, metavar="FILE")
    group = parser.add_argument_group("where")
    _add(group, "--host", GATEWAY_HOST, "address that the gateway listens on", type=_given, metavar="HOST")
    _add(group, "--port", GATEWAY_PORT, "its port, 0 for any free one", type=_port, metavar="N")
    _add(group, "--http", "none", "where the gateway also speaks the OpenAI API", type=_endpoint, metavar="HOST:PORT")
    keys = "callers need an API key of it, see bagel keys"
    _add(group, "--api-keys", "BAGEL_API_KEYS_FILE's, else none", keys, type=_given, metavar="FILE")
    _add(group, "--log-dir", "none, stderr", "folder for logs of each service", type=_given, metavar="FOLDER")
    _add(group, "--log-max-bytes", LOG_BYTES, "of one file; then the next is begun", type=_some_bytes, metavar="N")
    _add(group, "--log-files", LOG_FILES, "of each service; the oldest is dropped", type=_some, metavar="N")
    group = parser.add_argument_group("with --http")
    names = "the model's name there; given again: its aliases"
    _add(group, "--served-model-name", "as --model", names, type=_given, action="append", metavar="NAME")
    for guard in GUARDS:
        guard.add_to(group)
    group = parser.add_argument_group("TLS of the gateway")
    _add_tls(group, "none, plaintext", "clients need a certificate of it")
    allowed = "with --tls-ca: a name that a client's certificate may have; may be given again"
    _add(group, "--tls-allow-client", "any", allowed, type=_given, action="append", metavar="NAME")
    group = parser.add_argument_group("times")
    _add(group, "--init-timeout", INIT_TIMEOUT_S, "seconds until every stage is ready", type=_count, metavar="S")
    _add(group, "--batch-timeout", f"{BATCH_TIMEOUT_S:g}", "seconds to be admitted", type=_count, metavar="S")
    _add(group, "--drain-timeout", f"{DRAIN_S:g}", "seconds for what is under way at the end", type=_count, metavar="S")
    group = parser.add_argument_group("reports")
    _add(group, "--log-stats", "off", "log where the time of each request went", action="store_true")
    profiler = "log the durations of each picture's diffusion stages, and tell clients"
    _add(group, "--enable-diffusion-pipeline-profiler", "off", profiler, action="store_true")


def add_eval_nano_flags(parser: argparse.ArgumentParser) -> None:
    """Add every flag of `bagel eval-nano`."""
    group = parser.add_argument_group("what to ask")
    _add(group, "--seed", 1, "prompts and noise are drawn from it", type=_whole, metavar="N")
    _add(group, "--count", EVALUATED, "requests of each row", type=_some, metavar="N")
    rows = "only rows whose name contains one of these"
    _add(group, "--rows", "all but each kind of edit", rows, nargs="+", action="extend", type=_given, metavar="TEXT")
    _add(group, "--output", EVALUATION, "folder for table, results and sheet", type=_given, metavar="FOLDER")
    group = parser.add_argument_group("what serves")
    _add(group, "--endpoint", "none", "a running gateway, instead of own services", type=_endpoint, metavar="HOST:PORT")
    _add(group, "--topology", TOPOLOGY, "services to start", choices=TOPOLOGIES)
    _add_model(group)
    _add_thinker(group)
    _add(group, "--init-timeout", INIT_TIMEOUT_S, "seconds until every stage is ready", type=_count, metavar="S")
    _add(group, "--batch-timeout", f"{BATCH_TIMEOUT_S:g}", "seconds to be admitted", type=_count, metavar="S")
    _add_client(parser)


def add_verify_flags(parser: argparse.ArgumentParser) -> None:
    """Add every argument of `bagel verify`."""
    model = "checkpoint folder or hub name (default: BAGEL_MODEL of the environment, else bagel-nano)"
    parser.add_argument("model", nargs="?", type=_given, metavar="MODEL", help=model)
    group = parser.add_argument_group("report")
    _add(group, "--role", "all of them", "only for the service that loads this role", choices=ROLES)
    _add(group, "--json", "off", "print JSON", action="store_true")


def add_health_flags(parser: argparse.ArgumentParser) -> None:
    """Add every flag of `bagel health`."""
    group = parser.add_argument_group("what to ask")
    _add(group, "--endpoint", "none, it must be given", "any of the services", type=_endpoint, metavar="HOST:PORT")
    _add(group, "--timeout", HEALTH_TIMEOUT_S, "seconds for an answer", type=_count, metavar="S")
    _add_client_tls(parser)


def add_keys_flags(parser: argparse.ArgumentParser) -> None:
    """Add every argument of `bagel keys`."""
    parser.add_argument("action", choices=("new",), help="make a key; the one thing there is to do")
    parser.add_argument("name", type=_given, metavar="NAME", help="what the gateway's logs call its holder")


def _add_client(parser: argparse.ArgumentParser) -> None:
    _add_client_tls(parser)
    group = parser.add_argument_group("API key for --endpoint")
    file = "file with the key; not the key itself, which others would see"
    _add(group, "--api-key-file", "BAGEL_API_KEY, else none", file, type=_given, metavar="FILE")
    trusted = "let the key go to another machine without TLS"
    _add(group, "--trusted-network", "off", trusted, action="store_true")


def _add_client_tls(parser: argparse.ArgumentParser) -> None:
    _add_tls(parser.add_argument_group("TLS to --endpoint"), "none", "the other side is checked against it")


def _add_tls(group: Group, default: str, what_for: str) -> None:
    _add(group, "--tls-ca", default, f"PEM file; {what_for}", type=_given, metavar="FILE")
    _add(group, "--tls-certificate", default, "PEM file; our own certificate", type=_given, metavar="FILE")
    _add(group, "--tls-key", default, "PEM file; its key", type=_given, metavar="FILE")


def _add_model(group: Group) -> None:
    model = "BAGEL_MODEL of the environment, else bagel-nano"
    _add(group, "--model", model, "checkpoint folder or hub name", type=_given, metavar="MODEL")
    _add(group, "--device", "auto, cuda if there is one", "auto, cpu, cuda or cuda:N", type=_device, metavar="DEVICE")
    _add(group, "--dtype", "auto, bfloat16 on cuda, float32 on cpu", "number type of the model", choices=DTYPES)


def _add_thinker(group: Group) -> None:
    default = "the deploy file's, else BAGEL_ENGINE of the environment, else auto"
    _add(group, "--engine", default, "what runs the Thinker; auto: vllm if installed and on a GPU", choices=ENGINES)


def stage_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags of `serve` and `generate` say over the deploy file."""
    return {key: getattr(args, key) for key in ("engine", "quantization", "cpu_offload", "cfg_parallel_size")}


def _add_stage(group: Group) -> None:
    smaller = "fp8: half the DiT's memory, less exact; a Thinker on vLLM too"
    _add(group, "--quantization", "none", smaller, type=_given, metavar="NAME")
    least = "layers: keep them in the host's memory: the DiT fits a small GPU, and is slower"
    _add(group, "--cpu-offload", "none", least, choices=OFFLOADS)
    _add(group, "--cfg-parallel-size", 1, "GPUs that guidance is spread over, 1 to 3", type=_whole, metavar="N")


def _add_engine(group: Group) -> None:
    _add_model(group)
    _add_thinker(group)
    _add_stage(group)
    deploy = "the shipped bagel_single_stage.yaml"
    _add(group, "--deploy-config", deploy, "deploy file; two stages are processes", type=_given, metavar="FILE")
    runs = "what runs the DiT's ranks: processes, or actors of Ray"
    _add(group, "--worker-backend", "process", runs, choices=WORKER_BACKENDS)
    cluster = "with --worker-backend ray: a cluster that this host is a node of"
    _add(group, "--ray-address", "none, a Ray of this host", cluster, type=_given, metavar="HOST:PORT")
    _add(group, "--endpoint", "none", "a running gateway, instead of a model here", type=_endpoint, metavar="HOST:PORT")
    _add(group, "--init-timeout", INIT_TIMEOUT_S, "seconds until every stage is ready", type=_count, metavar="S")
    _add(group, "--batch-timeout", f"{BATCH_TIMEOUT_S:g}", "seconds to be admitted", type=_count, metavar="S")


def _add_reports(group: Group) -> None:
    _add(group, "--log-stats", "off", "where the time of each request went, on stderr", action="store_true")
    profiler = "durations of the diffusion stages, on stderr"
    _add(group, "--enable-diffusion-pipeline-profiler", "off", profiler, action="store_true")


def _add(group: Group, name: str, default: object, meaning: str, **how: Any) -> None:
    # None even where there is a default, so that only flags that were given have a value.
    group.add_argument(name, default=None, help=f"{meaning} (default: {default})", **how)


def _given(value: str) -> str:
    if not value.strip():
        raise argparse.ArgumentTypeError("it is empty; give a value or leave the flag out")
    return value


def _whole(value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r:.80} is no whole number") from None


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r:.80} is no number") from None


def _within(value: str, digits: int, least: int, wanted: str) -> int:
    """A whole number of at most so many digits."""
    # int() alone would take signs, spaces, underscores, other scripts' digits, and any length.
    if not re.fullmatch(rf"[0-9]{{1,{digits}}}", value) or int(value) < least:
        raise argparse.ArgumentTypeError(f"{value!r:.80} is no {wanted}")
    return int(value)


def _count(value: str) -> int:
    return _within(value, 12, 1, "whole number of seconds from 1 on")


def _some(value: str) -> int:
    return _within(value, 6, 1, "whole number from 1 on")


def _some_bytes(value: str) -> int:
    return _within(value, 15, 1, "whole number of bytes from 1 on")


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", value):
        raise argparse.ArgumentTypeError(f"{value!r} is none of auto, cpu, cuda, cuda:N")
    return value


def _port(value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", value) or int(value) > 65535:
        raise argparse.ArgumentTypeError(f"{value!r} is no port, a whole number from 0 to 65535")
    return int(value)


def _endpoint(value: str) -> str:
    if not re.fullmatch(r"(\[[0-9A-Fa-f:]+\]|[^\s:/]+):[0-9]{1,5}", value):
        raise argparse.ArgumentTypeError(f"{value!r} is no HOST:PORT, like 127.0.0.1:{GATEWAY_PORT}")
    return value
