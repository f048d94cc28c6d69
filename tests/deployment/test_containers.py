"""What deploys the services, checked without an engine: compose files, Dockerfiles, Kubernetes, their page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from bagel.rpc.limits import DRAIN_S

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = sorted(DEPLOY.glob("compose*.yaml"))
MANIFESTS = sorted(DEPLOY.glob("kubernetes/*.yaml"))
DOCKERFILES = {name: ROOT / f"services/{name}/Dockerfile" for name in ("thinker", "dit")}
DOCKERFILES["gateway"] = ROOT / "gateway/Dockerfile"
MODULES = {name: f"bagel_{name}" for name in DOCKERFILES}
SCHEMAS = json.loads((ROOT / "tests/data/kubernetes-1.31.json").read_text())
API = {"Deployment": "apps/v1", "Service": "v1", "NetworkPolicy": "networking.k8s.io/v1"}
TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
    "null": type(None),
}  # fmt: skip


class Loader(yaml.SafeLoader):
    """YAML with compose's tags, which say how files are merged."""


def _override(loader: Loader, node: yaml.Node) -> object:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    assert isinstance(node, yaml.SequenceNode)
    return loader.construct_sequence(node, deep=True)


Loader.add_constructor("!override", _override)


def read(path: Path) -> dict[str, Any]:
    value = yaml.load(path.read_text(), Loader)
    assert isinstance(value, dict)
    return value


def documents() -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in MANIFESTS:
        for document in yaml.safe_load_all(path.read_text()):
            yield path, document


@cache
def flags_of(service: str) -> set[str]:
    """The flags that a service knows."""
    command = [sys.executable, "-m", MODULES[service], "--help"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    return set(re.findall(r"--[a-z][a-z-]+", told.stdout))


def unknown_flags(service: str, arguments: list[str]) -> set[str]:
    return {each.partition("=")[0] for each in arguments if each.startswith("--")} - flags_of(service)


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: path.stem)
def test_commands_of_the_compose_files_are_flags_that_the_services_know(path: Path) -> None:
    for name, service in read(path)["services"].items():
        if name in MODULES:
            assert not unknown_flags(name, service.get("command", []))


def test_every_service_has_few_rights_limits_and_time_to_drain() -> None:
    services = read(DEPLOY / "compose.yaml")["services"]
    assert set(services) == set(MODULES)
    services |= {
        name: service
        for name, service in read(DEPLOY / "compose.observability.yaml")["services"].items()
        if name not in MODULES
    }
    for name, service in services.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"] and service["tmpfs"], name
        assert service["restart"] == "unless-stopped" and service["mem_limit"] and service["pids_limit"], name
        if name in MODULES:
            assert service["healthcheck"]["test"][:3] == ["CMD", "bagel", "health"]
            assert int(service["stop_grace_period"].removesuffix("s")) > DRAIN_S


@pytest.mark.parametrize("service", MODULES)
def test_an_image_takes_its_base_as_an_argument_and_runs_without_rights(service: str) -> None:
    text = DOCKERFILES[service].read_text()
    bases = re.findall(r"^FROM (\S+)(?: AS \S+)?$", text, re.M)
    assert len(bases) >= 2 and all(base.startswith("${") for base in bases)
    final = text[text.rindex("\nFROM") :]
    assert re.search(r"^USER (\d+):\d+$", final, re.M)
    assert not re.search(r"^RUN", final, re.M), "a base without a shell is enough"
    assert re.search(rf'^ENTRYPOINT \["python3?", "-m", "{MODULES[service]}"\]$', final, re.M)
    (command,) = re.findall(r"^CMD (\[.*\])$", final, re.M)
    assert not unknown_flags(service, json.loads(command))


@pytest.mark.parametrize("service", ["thinker", "dit"])
def test_what_is_compiled_outlives_a_container(service: str) -> None:
    text = DOCKERFILES[service].read_text()
    final = text[text.rindex("\nFROM") :]
    caches = re.findall(r"\b(\w+)=(/cache\S*)", final)
    needed = {"TRITON_CACHE_DIR", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH", "BAGEL_CACHE_DIR"}
    assert needed <= {name for name, _ in caches}
    user = re.search(r"^USER (\d+:\d+)$", final, re.M)
    # Without this, a new volume would belong to root.
    assert user and f"COPY --from=build --chown={user[1]} /owned /" in final and "mkdir -p /owned/cache" in text
    assert "VOLUME" in final  # or a read-only container without a volume could not write there
    compose = read(DEPLOY / "compose.yaml")
    assert "cache:/cache" in compose["services"][service]["volumes"] and "cache" in compose["volumes"]
    (pod,) = [
        document["spec"]["template"]["spec"]
        for path, document in documents()
        if path.stem == service and document["kind"] == "Deployment"
    ]
    assert {"name": "cache", "mountPath": "/cache"} in pod["containers"][0]["volumeMounts"]
    assert "cache" in {volume["name"] for volume in pod["volumes"]}


def test_images_and_make_take_the_same_torch() -> None:
    pinned = re.search(r"^TORCH_VERSION \?= (\S+)$", (ROOT / "Makefile").read_text(), re.M)
    assert pinned is not None
    for service in ("thinker", "dit"):
        assert f"ARG TORCH_VERSION={pinned[1]}\n" in DOCKERFILES[service].read_text()
    assert "torch" not in DOCKERFILES["gateway"].read_text().lower()


def test_with_a_gpu_both_stages_reserve_it_and_the_thinker_is_built_for_and_started_on_vllm() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    services = read(DEPLOY / "compose.gpu.yaml")["services"]
    for name in ("thinker", "dit"):
        (device,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
        assert "ARG EXTRA=engine\n" in DOCKERFILES[name].read_text()
    built_with = {name: services[name]["build"]["args"]["EXTRA"] for name in ("thinker", "dit")}
    assert built_with == {"thinker": "vllm", "dit": "engine,fa3"}
    assert extras.keys() >= {extra for chosen in built_with.values() for extra in chosen.split(",")}
    command = services["thinker"]["command"]
    assert command[command.index("--engine") + 1] == "vllm"


def test_thinker_and_dit_are_built_by_the_same_steps_and_so_share_their_layers() -> None:
    builds = [
        DOCKERFILES[name].read_text().partition("ARG BASE")[2].rpartition("\nFROM")[0] for name in ("thinker", "dit")
    ]
    assert builds[0] == builds[1]


def test_kubernetes_manifests_fit_their_schemas() -> None:
    kinds = [document["kind"] for _, document in documents()]
    assert sorted(set(kinds)) == sorted(API) and kinds.count("Deployment") == len(MODULES)
    for path, document in documents():
        assert document["apiVersion"] == API[document["kind"]]
        wrong = list(misfits(document, {"$ref": SCHEMAS["kinds"][document["kind"]]}, document["kind"]))
        assert not wrong, f"{path.name}: {wrong}"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"spec": {"replicas": "two"}}, "replicas"),
        ({"spec": {"template": {"spec": {"containers": [{"image": "x"}]}}}}, "name"),
        ({"spec": {"template": {"spec": {"container": []}}}}, "container"),
    ],
)
def test_the_schemas_tell_of_what_does_not_fit(change: dict[str, Any], told: str) -> None:
    assert any(told in wrong for wrong in misfits(change, {"$ref": SCHEMAS["kinds"]["Deployment"]}, ""))


def misfits(value: object, schema: Mapping[str, Any], where: str) -> Iterator[str]:
    """What of a value does not fit a schema, for as much of JSON Schema as Kubernetes uses."""
    if "$ref" in schema:
        yield from misfits(value, SCHEMAS["definitions"][schema["$ref"]], where)
        return
    if "oneOf" in schema and all(any(misfits(value, each, where)) for each in schema["oneOf"]):
        yield f"{where} is {value!r}, none of {schema['oneOf']}"
    allowed = schema.get("type", [])
    names = [allowed] if isinstance(allowed, str) else allowed
    if names and not any(isinstance(value, TYPES[name]) for name in names):
        yield f"{where} is {value!r}, no {names}"
    if isinstance(value, dict):
        yield from (f"{where} lacks {name}" for name in schema.get("required", []) if name not in value)
        others = schema.get("additionalProperties", True)
        for name, each in value.items():
            if name in schema.get("properties", {}):
                yield from misfits(each, schema["properties"][name], f"{where}.{name}")
            elif others is False:
                yield f"{where} has no {name}"
            elif isinstance(others, dict):
                yield from misfits(each, others, f"{where}.{name}")
    if isinstance(value, list):
        for number, each in enumerate(value):
            yield from misfits(each, schema.get("items", {}), f"{where}[{number}]")


def test_kubernetes_mirrors_compose() -> None:
    deployments = {d["metadata"]["name"].removeprefix("bagel-"): d for _, d in documents() if d["kind"] == "Deployment"}
    services = {d["metadata"]["name"]: d for _, d in documents() if d["kind"] == "Service"}
    assert set(deployments) == set(MODULES)
    for name, deployment in deployments.items():
        pod = deployment["spec"]["template"]
        (container,) = pod["spec"]["containers"]
        assert not unknown_flags(name, container["args"])
        assert pod["spec"]["securityContext"]["runAsNonRoot"] and not pod["spec"]["automountServiceAccountToken"]
        rights = container["securityContext"]
        assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"]
        assert rights["capabilities"] == {"drop": ["ALL"]} and container["resources"]["limits"]
        assert pod["spec"]["terminationGracePeriodSeconds"] > DRAIN_S
        service = services[f"bagel-{name}"]["spec"]
        assert service["selector"].items() <= pod["metadata"]["labels"].items()
        assert service["ports"][0]["port"] == container["ports"][0]["containerPort"]
        called = [
            each.rpartition("=")[2] for each in container["args"] if each.startswith(("--source", "--thinker", "--dit"))
        ]
        for host, port in (address.split(":") for address in called):
            assert services[host]["spec"]["ports"][0]["port"] == int(port)


def test_api_keys_are_a_folder_that_the_gateway_is_told_of() -> None:
    """Mounted whole: a file by itself would stay the one that it was at the start."""
    service = read(DEPLOY / "compose.keys.yaml")["services"]["gateway"]
    (mount,) = service["volumes"]
    assert mount["read_only"] and service["environment"]["BAGEL_API_KEYS_FILE"] == f"{mount['target']}/api-keys"

    patch = read(DEPLOY / "kubernetes/keys/gateway.yaml")["spec"]["template"]["spec"]
    deployment = next(document for path, document in documents() if path.name == "gateway.yaml")
    pod = deployment["spec"]["template"]["spec"]
    (container,), (changed,) = pod["containers"], patch["containers"]
    assert changed["name"] == container["name"]
    for key in ("env", "volumeMounts"):
        container[key] = [*container.get(key, ()), *changed[key]]
    pod["volumes"] += patch["volumes"]
    assert not list(misfits(deployment, {"$ref": SCHEMAS["kinds"]["Deployment"]}, "patched"))
    (told,), (held,) = changed["env"], changed["volumeMounts"]
    assert "subPath" not in held and held["name"] == patch["volumes"][0]["name"]
    assert told == {"name": "BAGEL_API_KEYS_FILE", "value": f"{held['mountPath']}/api-keys"}


@pytest.mark.parametrize("name", MODULES)
def test_tls_is_a_patch_that_keeps_every_argument_and_shows_probes_the_files(name: str) -> None:
    deployment = next(
        each for path, each in documents() if path.name == f"{name}.yaml" and each["kind"] == "Deployment"
    )
    pod = deployment["spec"]["template"]["spec"]
    patch = read(DEPLOY / f"kubernetes/tls/{name}.yaml")["spec"]["template"]["spec"]
    (container,), (changed,) = pod["containers"], patch["containers"]
    assert changed["name"] == container["name"] == name
    assert changed["args"][: len(container["args"])] == container["args"]  # a patch replaces a list of texts
    added = changed["args"][len(container["args"]) :]
    assert not unknown_flags(name, changed["args"])
    (held,), (volume,) = changed["volumeMounts"], patch["volumes"]
    files = [argument.partition("=")[2] for argument in added if "=" in argument]
    assert len(files) == 3 and all(file.startswith(f"{held['mountPath']}/") for file in files)
    assert volume["secret"]["secretName"] == f"bagel-{name}-tls" and volume["name"] == held["name"]
    port = container["ports"][0]["containerPort"]
    for probe, how in ((key, value) for key, value in changed.items() if key.endswith("Probe")):
        merged = {key: value for key, value in {**container[probe], **how}.items() if value is not None}
        assert "grpc" not in merged, "a probe has one handler"
        if "exec" in merged:
            assert merged["exec"]["command"][:3] == ["bagel", "health", f"--endpoint=127.0.0.1:{port}"]
            assert set(merged["exec"]["command"][3:]) <= set(added)
        container[probe] = merged
    container["args"] = changed["args"]
    container["volumeMounts"] += changed["volumeMounts"]
    pod["volumes"] += patch["volumes"]
    assert not list(misfits(deployment, {"$ref": SCHEMAS["kinds"]["Deployment"]}, "patched"))


def test_the_collector_is_given_only_what_it_has() -> None:
    config = read(DEPLOY / "otel-collector.yaml")
    for pipeline in config["service"]["pipelines"].values():
        for kind in ("receivers", "processors", "exporters"):
            assert set(pipeline[kind]) <= set(config[kind])
    port = config["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].rpartition(":")[2]
    services = read(DEPLOY / "compose.observability.yaml")["services"]
    for name, service in services.items():
        if name in MODULES:
            assert service["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"] == f"http://collector:{port}"
            assert not {"OTEL_METRICS_EXPORTER", "OTEL_TRACES_EXPORTER"} & set(service["environment"])
    assert {"otlp"} == set(config["service"]["pipelines"]["metrics"]["receivers"])
    scraped = config["exporters"]["prometheus"]["endpoint"].rpartition(":")[2]
    assert services["collector"]["ports"] == [f"127.0.0.1:{scraped}:{scraped}"]


def test_the_page_lists_every_variable_and_file() -> None:
    page = (ROOT / "docs/deploy.md").read_text()
    used = {name for path in COMPOSE for name in re.findall(r"\$\{([A-Z_]+)", path.read_text())}
    assert {name for name in used if f"`{name}`" not in page} == set()
    assert {path.name for path in COMPOSE if path.name not in page} == set()
