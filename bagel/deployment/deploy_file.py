"""The deploy file: which pipeline, on which GPUs, with which settings. Read strictly, checked before anything starts.

An unknown key, a value of the wrong type or a setting without effect is an error that names the file, the key, the
value and what would be right. schema.py has the keys, schema_errors.py the errors' words, overlay.py what is inherited
and overridden, checks.py what must fit together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bagel.checkpoint.files import Checkpoint
from bagel.checkpoint.json_files import read_json_file, shown
from bagel.deployment.overlay import inherit, with_overrides
from bagel.deployment.schema import DeployConfig, StageDeploy
from bagel.deployment.schema_errors import validate
from bagel.errors import CheckpointError, ConfigError
from bagel.pipelines import pipeline, pipeline_for_architecture

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of `bagel`, in an installed wheel or a checkout."""


def load_deploy_config(path: str | Path, **overrides: object) -> DeployConfig:
    """Read a deploy file with what it inherits, apply overrides (see `with_overrides`) and check it.

    Raises ConfigError for anything wrong, NotSupported for a setting whose effect is not built yet.
    """
    return with_overrides(validate(inherit(Path(path)), str(path)), **overrides)


def shipped_deploy_config(name: str) -> Path:
    """The deploy file that ships for a pipeline; ConfigError if the name is unknown or the file is not there."""
    filename = f"{pipeline(name).model_type}.yaml"
    for folder in (PACKAGE / "deploy", PACKAGE.parent / "deploy"):  # an installed wheel, a checkout
        if (folder / filename).is_file():
            return folder / filename
    raise ConfigError(f"the shipped {filename} is not in {PACKAGE / 'deploy'}; install again or give --deploy-config")


def deployment_for(checkpoint: Checkpoint, path: str | Path | None = None, **overrides: object) -> DeployConfig:
    """The deploy file of that path, else the shipped one that the checkpoint's architecture chooses.

    Raises ConfigError or NotSupported as `load_deploy_config` does.
    """
    return load_deploy_config(path or shipped_deploy_config(_chosen_pipeline(checkpoint)), **overrides)


def request_defaults(config: DeployConfig) -> dict[str, Any]:
    """What a deployment fills into a request that does not say it: its sampling defaults, and whether to think."""
    return {**config.sampling_defaults(), **({"think": True} if config.spec.thinks else {})}


def effective_settings(stage: StageDeploy) -> str:
    """The line a stage logs at start: what its parallel and VAE settings come to."""
    return f"stage {stage.stage_id}: {stage.parallel.described()}, vae_use_tiling {str(stage.tiling).lower()}"


def _chosen_pipeline(checkpoint: Checkpoint) -> str:
    path = checkpoint.path("config.json")
    architectures = read_json_file(path).get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise CheckpointError(f"{path}: architectures is {shown(architectures)}; a list of names was expected")
    return pipeline_for_architecture(architectures).model_type
