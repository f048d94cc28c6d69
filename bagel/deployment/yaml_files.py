"""Read YAML strictly, and merge one mapping into another."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bagel.errors import ConfigError

MOST_VALUES = 10_000
"""Values of one file, those behind aliases counted wherever they are used; the largest shipped one has a hundred."""


class _Loader(yaml.SafeLoader):
    """A loader that refuses repeated keys, of which PyYAML would silently take the last, and aliases without bound."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        # Before anything is made of it: nine lines of aliases can stand for a thousand million values.
        if node is not None and _count(node, {}) > MOST_VALUES:
            problem = f"it has more than {MOST_VALUES} values, aliases included, or one within itself"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = sorted(key for key, count in Counter(keys).items() if count > 1)
        if twice:
            problem = f"the key {twice[0]} is there twice"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


def _count(node: yaml.Node, counted: dict[int, float]) -> float:
    """A node and all that is in it."""
    if id(node) not in counted:
        counted[id(node)] = math.inf  # one that is met again before it is counted lies within itself
        inside = [each for pair in node.value for each in pair] if isinstance(node, yaml.MappingNode) else node.value
        nodes = () if isinstance(node, yaml.ScalarNode) else inside
        counted[id(node)] = 1 + sum(_count(each, counted) for each in nodes)
    return counted[id(node)]


def read_yaml(path: Path, remedy: str) -> dict[str, Any]:
    """Read the mapping in a YAML file; raises ConfigError, which ends with the remedy, if it cannot be read."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; {remedy}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path} is no valid YAML{line}: {problem}; mend it or start from a shipped file") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {data!r:.40}; it must hold keys and values, like pipeline: bagel")
    return data


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `over` into `base`: mappings are merged key by key, any other value replaces the base's."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged
