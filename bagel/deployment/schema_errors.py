"""What is wrong with a deploy file's keys and values, in our words: the key, the value, and what would be right."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from bagel.deployment.schema import ConnectorConfig, DeployConfig, ParallelConfig, SamplingDefaults, StageDeploy
from bagel.errors import MOST_LISTED, ConfigError
from bagel.ranges import in_words
from bagel.vocabulary import DEPLOY_INSTEAD, instead_of

SECTIONS: Mapping[str, type[BaseModel]] = {
    "the top of the file": DeployConfig,
    "stages": StageDeploy,
    "parallel_config": ParallelConfig,
    "default_sampling_params": SamplingDefaults,
    "connectors": ConnectorConfig,
}
WANTED: Mapping[str, str] = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "literal_error": "one of {expected}",
    "string_type": 'a text, in quotes if it looks like a number (like "0")',
    "tuple_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "invalid_key": "a word, as every key",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
}
"""Pydantic's kinds of errors, as what a value must be."""
_KNOWN = "; known: "


def validate(data: Mapping[str, Any], source: str) -> DeployConfig:
    """Keys, types and ranges; ConfigError with all problems in one line."""
    try:
        config = DeployConfig.model_validate(data)
    except ValidationError as error:
        # Unknown keys first: a key that is missing is often one that is misspelt.
        problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        described = [_describe(problem, data) for problem in problems[:MOST_LISTED]]
        more = [f"and {len(problems) - MOST_LISTED} more"] * (len(problems) > MOST_LISTED)
        raise ConfigError(f"{source}: {'; '.join([*_once(described), *more])}") from None
    config._source = source
    return config


def _once(problems: Iterable[str]) -> Iterator[str]:
    """The problems, of which the first alone lists the keys that are known."""
    listed = set[str]()
    for problem in problems:
        what, _, known = problem.partition(_KNOWN)
        yield what if known in listed else problem
        listed.add(known)


def _describe(problem: ErrorDetails, data: Mapping[str, Any]) -> str:
    """One of pydantic's errors in our words: the key's path, the value seen, what would be right."""
    kind, loc, value, context = problem["type"], problem["loc"], problem["input"], problem.get("ctx", {})
    path = ".".join(str(key) for key in loc)
    if loc[:1] == ("stages",) and len(loc) > 1:
        stage = data["stages"][loc[1]]
        name = stage.get("stage_id", "?") if isinstance(stage, dict) else "?"
        path = ".".join([f"stages[stage_id={name}]", *map(str, loc[2:])])
    if kind == "extra_forbidden":
        section = next((str(key) for key in reversed(loc[:-1]) if key in SECTIONS), "the top of the file")
        hint = suggest(str(loc[-1]), SECTIONS[section].model_fields)
        return f"{path} is not a known key (value {value!r:.80}); {hint}"
    if kind == "missing":
        return f"{path} is missing; add it"
    if kind == "value_error":
        return f"{path}: {context['error']}"
    wanted = WANTED[kind].format(**context) if kind in WANTED else f"right ({problem['msg']})"
    if kind in ("greater_than", "greater_than_equal", "less_than_equal"):
        wanted = _range(loc) or wanted
    return f"{path} is {value!r:.80}; it must be {wanted}"


def _range(loc: tuple[int | str, ...]) -> str | None:
    """The whole range of a number, whichever end was passed; None where it has one end."""
    key = str(loc[-1])
    field = next(model.model_fields[key] for model in SECTIONS.values() if key in model.model_fields)
    ends = _ends(field.annotation) | _bounds(field)
    if len(ends) < 2:
        return None
    return in_words(above=ends.get("gt"), at_least=ends.get("ge"), at_most=ends.get("le"))


def _ends(kind: Any) -> dict[str, float]:
    """The ends of a number's range, wherever in its annotation they stand."""
    found = _bounds(kind) if isinstance(kind, FieldInfo) else {}
    for part in (*get_args(kind), *getattr(kind, "__metadata__", ())):
        found |= _ends(part)
    return found


def _bounds(field: FieldInfo) -> dict[str, float]:
    return {end: getattr(each, end) for each in field.metadata for end in ("gt", "ge", "le") if hasattr(each, end)}


def suggest(key: str, known: Collection[str]) -> str:
    """What an unknown key may have been meant to be."""
    for section, model in SECTIONS.items():
        if key in model.model_fields:
            return f"it belongs in {section}"
    return instead_of(key, DEPLOY_INSTEAD, known) or _KNOWN.removeprefix("; ") + ", ".join(sorted(known))
