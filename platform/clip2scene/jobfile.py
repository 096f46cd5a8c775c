"""Job files: YAML with ``key=value`` overrides, and the one sentence that a mistake in them gets.

The sentence names the key's path, the value and what is allowed.
"""

from __future__ import annotations

import copy
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from clip2scene.config import ConfigError, Job

Model = TypeVar("Model", bound=BaseModel)


def load_job(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Job:
    """Read a job file and apply ``key.path=value`` overrides.

    Raises:
        ConfigError: the file is missing or not YAML, or a key or value is wrong.
    """
    values = read_values(path, overrides, "job")
    return parse(Job, values, str(path))


def read_values(path: str | Path, overrides: list[str] | tuple[str, ...], kind: str) -> dict[str, Any]:
    """The mapping of a YAML file with ``key.path=value`` overrides, not validated; ``kind`` names the file in errors.

    Raises:
        ConfigError: the file is missing or not a mapping in YAML, or an override is malformed.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the {kind} file ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a {kind} file is a mapping of keys to values, not {type(values).__name__}")
    for override in overrides:
        _apply_override(values, override)
    return values


def parse(model: type[Model], values: dict[str, Any], source: str) -> Model:
    """Validate ``values``; the first problem becomes one sentence that starts with ``source`` and the key's path.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range or an impossible combination.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        allowed = sorted(_keys(_model_at(model, location[:-1])))
        raise ConfigError(f"{source}: {key}: unknown key; allowed here: {', '.join(allowed)}")
    if problem["type"] == "missing":
        raise ConfigError(f"{source}: {key}: required, and not given")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        raise ConfigError(f"{source}: {message}")
    raise ConfigError(f"{source}: {key}={problem['input']!r}: {message[0].lower()}{message[1:]}")


def put(values: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Set a dotted key in nested values.

    Raises:
        ConfigError: a part of the key is a value already.
    """
    *parents, last = key.split(".")
    node = values
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{source}: {key}: {parent} is a value, not a group of keys")
    node[last] = copy.deepcopy(value)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form key.path=value")
    *parents, last = key.split(".")
    node = values
    for depth, parent in enumerate(parents):
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(
                f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a group of keys"
            )
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from error


def _model_at(model: type[BaseModel], location: list[str]) -> type[BaseModel]:
    names = iter(location)
    for name in names:
        annotation = _fields(model)[name].annotation
        if typing.get_origin(annotation) is dict:
            next(names, None)  # a key of the user's own
        candidates = (annotation, *typing.get_args(annotation))
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return model


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _keys(model: type[BaseModel]) -> set[str]:
    return set(_fields(model))
