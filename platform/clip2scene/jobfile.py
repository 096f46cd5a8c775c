"""Reads job files: YAML, on top of another job file (``base``), with ``key=value`` overrides.

A mistake becomes one sentence with the key's path, the value and what is allowed.
"""

from __future__ import annotations

import copy
import difflib
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from clip2scene.config import Job, merged
from clip2scene.errors import ConfigError, one_line

Model = TypeVar("Model", bound=BaseModel)
Schema = dict[str, Any]
"""JSON schema of a setting, or of a group of settings; only a group has ``properties``."""
Kind = Literal["job", "table", "sweep"]
_NAMES: Mapping[Kind, str] = {"job": "job", "table": "table", "sweep": "search space"}
BASE = "base"
"""Key of a job file that names another one, from which it takes all settings that it does not give itself."""
TABLE_KEYS = ("name", "seed", "storage", "experiment")
"""Keys that a table sets for all its jobs."""
_CROSS_FIELD_PROBLEMS = ("missing", "value_error")
"""Problems that further settings may solve: each setting by itself is valid."""
_PLACEHOLDERS = {"additionalProperties": "KEY", "items": "N"}
"""What stands for a user's own key in a dotted key, and for an index in a list."""
_ENTRIES: Mapping[Kind, tuple[str, ...]] = {"job": (), "sweep": ("parameters", "variants"), "table": ("rows",)}
"""Groups and lists from which an override leaves out an entry: ``variants.NAME=null``."""


class _LeftOut:
    """Stands for an entry until all overrides are applied, so that indices stay those of the file."""


def kind_of(path: str | Path) -> Kind:
    """What a file is, by its key ``table`` or ``sweep``. An unreadable file counts as a job, and reading it fails."""
    try:
        return _kind(_read(Path(path), "job"))
    except ConfigError:
        return "job"


def kind_with_job(path: str | Path, job_path: str | Path | None) -> Kind:
    """As :func:`kind_of`, for a command that may have ``--job JOB``.

    Raises:
        ConfigError: a search space without a job, another file with one, or the file cannot be read.
    """
    kind = _kind(_read(Path(path), "job" if job_path is None else "sweep"))
    if kind == "sweep" and job_path is None:
        raise ConfigError(f"{path}: a search space varies a job; give --job JOB")
    if kind != "sweep" and job_path is not None:
        raise ConfigError(f"{path}: a {kind}; --job JOB belongs to a search space (a file with the key 'sweep')")
    return kind


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read a job file and apply ``key.path=value`` overrides.

    Raises:
        ConfigError: the file is missing or not YAML, or a key or value is invalid.
    """
    values = read_values(path, overrides, "job")
    return parse(Job, values, str(path))


def read_values(path: str | Path, overrides: Sequence[str], kind: Kind) -> dict[str, Any]:
    """Read a YAML file and apply ``key.path=value`` overrides, without validation; ``kind`` names the file in errors.

    ``variants.NAME=null``, ``parameters.KEY=null`` and a table's ``rows.N=null`` leave that entry out.

    A job with the key ``base``, also one in a table's ``jobs``, has the settings of that job file with its own on top.
    The path of ``base`` is relative to the file that names it.

    Raises:
        ConfigError: a file is missing or not a mapping in YAML, a base has an invalid setting, or an override is
            malformed.
    """
    path = Path(path)
    values = _read(path, kind)
    if kind == "job":
        values = _on_base(values, path, str(path))
    elif isinstance(jobs := values.get("jobs"), dict):
        for name, job in jobs.items():
            if isinstance(job, dict) and BASE in job:
                whole = _on_base(job, path, f"{path}: jobs.{name}")
                jobs[name] = {key: value for key, value in whole.items() if key in job or key not in TABLE_KEYS}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r} is not of the form key.path=value")
        if key.rpartition(".")[2] == BASE:
            raise ConfigError(f"override {override!r}: base can only be set in the file")
        try:
            value = _parsed(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not valid YAML") from error
        node, place = _place(values, key, f"override {override!r}")
        if value is None and any(node is values.get(group) for group in _ENTRIES[kind]):
            if isinstance(node, dict) and place not in node:
                raise ConfigError(f"override {override!r}: not there to be left out; allowed: {', '.join(node)}")
            value = _LeftOut
        node[place] = value
    for group in _ENTRIES[kind]:
        entries = values.get(group)
        if isinstance(entries, dict):
            values[group] = {key: value for key, value in entries.items() if value is not _LeftOut}
        elif isinstance(entries, list):
            values[group] = [value for value in entries if value is not _LeftOut]
    return values


def parse(model: type[Model], values: dict[str, Any], source: str) -> Model:
    """Validate ``values``; the first problem becomes one sentence that starts with ``source`` and the key's path.

    Raises:
        ConfigError: a key is unknown, a value has the wrong type or is out of range, or values do not fit together.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    raise ConfigError(f"{source}: {_sentence(model, problems)}")


def settings_of(model: type[BaseModel]) -> dict[str, Schema]:
    """Settings and groups of settings of a model by dotted key; a group's own settings come before its subgroups.

    In the keys, ``KEY`` stands for a user's own key (``parameters.KEY.grid``), and ``N`` for an index in a list.
    """
    schema = model.model_json_schema()
    return dict(_below(schema, schema.get("$defs", {}), ""))


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """``; did you mean KEY?`` with the most similar key of the same group, or the same word in another; or nothing."""
    known = list(known)
    if key in known:  # written with dots in a file, which nests groups
        return f"; in a file it belongs in its group, {key.replace('.', ': {')}: ...{'}' * key.count('.')}"
    group, dot, word = key.rpartition(".")
    beside = [name.removeprefix(group + dot) for name in known if name.rpartition(".")[0] == group]
    meant = [group + dot + near for near in difflib.get_close_matches(word, beside, 1)]
    meant = meant or [name for name in known if name.rpartition(".")[2] == word]
    if not meant and not beside:
        meant = difflib.get_close_matches(key, known, 1)
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def put(values: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Set a dotted key in nested values; a part of it may be an index in a list, or a key that has dots itself.

    Raises:
        ConfigError: a part of the key is already a value, or no index in a list.
    """
    node, place = _place(values, key, source)
    node[place] = copy.deepcopy(value)


def _place(values: dict[str, Any], key: str, source: str) -> tuple[Any, Any]:
    """The group or list that holds a dotted key, and the place in it: the longest name that is there at each level.

    What lies on the way is copied, because a YAML anchor may have put it elsewhere too.
    """
    node: Any = values
    parts, above = key.split("."), ""
    while True:
        length = 1
        if isinstance(node, dict):
            length = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in node), 1)
        elif not isinstance(node, list):
            raise ConfigError(f"{source}: {key}: {above} is a value, not a group of keys")
        elif not (parts[0].isdecimal() and int(parts[0]) < len(node)):
            allowed = f"an index from 0 to {len(node) - 1}" if node else "nothing, as it is empty"
            raise ConfigError(f"{source}: {key}: {above} is a list; allowed after it: {allowed}")
        above, parts = ".".join(parts[:length]), parts[length:]
        place: Any = int(above) if isinstance(node, list) else above
        if not parts:
            return node, place
        node[place] = copy.copy(node[place] if isinstance(node, list) else node.get(place, {}))
        node = node[place]


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice in a group, of which YAML would silently drop the first."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for at, key in enumerate(keys):
            if any(key.value == before.value for before in keys[:at]):
                problem = f"the key {key.value!r} is given twice, again in line {key.start_mark.line + 1}"
                raise yaml.MarkedYAMLError(problem=problem)
        return node


def _parsed(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _read(path: Path, kind: Kind) -> dict[str, Any]:
    try:
        values = _parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the {_NAMES[kind]} file ({error.strerror})") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML ({one_line(error)})") from error
    if not isinstance(values, dict):
        given = "empty" if values is None else f"a {type(values).__name__}"
        raise ConfigError(f"{path}: a {_NAMES[kind]} file is a mapping of keys to values, but this is {given}")
    return values


def _kind(values: dict[str, Any]) -> Kind:
    kinds: tuple[Kind, ...] = ("table", "sweep")
    return next((kind for kind in kinds if kind in values), "job")


def _on_base(values: dict[str, Any], path: Path, where: str, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Put settings from ``path`` on top of those of the job file that they name as ``base``, and of its own base."""
    if BASE not in values:
        return values
    name, own = values[BASE], {key: value for key, value in values.items() if key != BASE}
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}: base={name!r}: the path of a job file is needed")
    where, base, above = f"{where}: base={name}", path.parent / name, (*above, path.resolve())
    try:
        leads_back = base.resolve() in above
        below = _read(base, "job")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{where}: not a valid path ({error})") from error
    if leads_back:
        raise ConfigError(f"{where}: this file is based on itself")
    if (kind := _kind(below)) != "job":
        raise ConfigError(f"{where}: a {kind}, but a job is needed")
    whole = _on_base(below, base, where, above)
    try:
        Job.model_validate(whole)
    except ValidationError as error:
        # Settings on top may add what is missing in a base, or change what does not fit together.
        wrong = [problem for problem in error.errors(include_url=False) if problem["type"] not in _CROSS_FIELD_PROBLEMS]
        if wrong:
            raise ConfigError(f"{where}: {_sentence(Job, wrong)}") from error
    return merged(whole, own)


def _sentence(model: type[BaseModel], problems: Sequence[Any]) -> str:
    """Describe the first problem, but an unknown key before all others: it may cause them."""
    problem = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    location = problem["loc"]
    key, kind, given = ".".join(map(str, location)), problem["type"], problem["input"]
    if kind == "extra_forbidden":
        more = [BASE] if model is Job and len(location) == 1 else []
        allowed = ", ".join(sorted([*_fields(_model_at(model, location[:-1])), *more]))
        known = [name for name in settings_of(model) if not set(name.split(".")) & {*_PLACEHOLDERS.values()}]
        return f"{key}: unknown key; allowed here: {allowed}{did_you_mean(key, [*known, *more])}"
    if kind == "missing":
        return f"{key}: required, but not given"
    message = problem["msg"].removeprefix("Value error, ").replace("Tuple should", "List should")
    if kind == "value_error" and isinstance(given, dict):
        return str(message)
    if kind == "model_type":
        message = f"a group of keys is needed, such as {key}.{next(iter(_fields(_model_at(model, location))))}"
    elif kind == "dict_type":
        message = "a group of keys is needed"
    elif kind == "tuple_type":
        message = "a list is needed" + (f", such as {key}=[{given}]" if isinstance(given, str | int | float) else "")
    return f"{key}={given!r}: {message[0].lower()}{message[1:]}"


def _below(group: Schema, groups: dict[str, Schema], prefix: str) -> Iterator[tuple[str, Schema]]:
    subgroups = {}
    for name, schema in group["properties"].items():
        path, reference = _group_in(schema)
        if reference:
            subgroups[f"{prefix}{name}"] = (path, groups[reference.rpartition("/")[2]] | schema)
        else:
            optional = {} if name in group.get("required", ()) else {"default": None}
            yield f"{prefix}{name}", optional | schema
    for key, (path, schema) in subgroups.items():
        yield key, schema
        yield from _below(schema, groups, f"{key}{path}.")


def _group_in(schema: Schema) -> tuple[str, str]:
    """The path from a setting to a group of settings in it, and the group's reference; both empty if there is none."""
    for name, placeholder in _PLACEHOLDERS.items():
        if isinstance(schema.get(name), dict):
            path, reference = _group_in(schema[name])
            return f".{placeholder}{path}", reference
    return "", schema.get("$ref", "")


def _model_at(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    names = iter(location)
    for name in names:
        if isinstance(name, int):  # an index in a list
            continue
        annotation = _fields(model)[name].annotation
        if typing.get_origin(annotation) is dict:
            next(names, None)  # a key of the user's own
        model = next(_models_in(annotation))
    return model


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in model.model_fields.items()}
