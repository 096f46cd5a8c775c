"""Job files: YAML, on top of another (``base``), with ``key=value`` overrides; and the sentence that a mistake gets.

The sentence names the key's path, the value and what is allowed.
"""

from __future__ import annotations

import copy
import difflib
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from clip2scene.config import ConfigError, Job, merged

Model = TypeVar("Model", bound=BaseModel)
Schema = dict[str, Any]
"""JSON schema of a setting, or of a group of settings, which has ``properties``."""
Kind = Literal["job", "table", "sweep"]
BASE = "base"
"""Key of a job file that names another one, whose settings it has where it does not give its own."""
OF_THE_TABLE = ("name", "seed", "storage", "experiment")
"""What a job in a table does not say itself."""
_WITH_OTHERS = ("missing", "value_error")
"""Problems of settings that are each allowed."""


def kind_of(path: str | Path) -> Kind:
    """What a file is, by its key ``table`` or ``sweep``; one that cannot be read is a job, whose reading says so."""
    try:
        return _kind(_read(Path(path), "job"))
    except ConfigError:
        return "job"


def kind_with_job(path: str | Path, job_path: str | Path | None) -> Kind:
    """:func:`kind_of` a file that stands beside ``--job JOB``, or not.

    Raises:
        ConfigError: a search space without a job, or something else with one.
    """
    kind = kind_of(path)
    if kind == "sweep" and job_path is None:
        raise ConfigError(f"{path}: a search space varies a job; give --job JOB")
    if kind != "sweep" and job_path is not None:
        raise ConfigError(f"{path}: a {kind}; --job JOB belongs to a search space (a file with the key 'sweep')")
    return kind


def load_job(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Job:
    """Read a job file and apply ``key.path=value`` overrides.

    Raises:
        ConfigError: the file is missing or not YAML, or a key or value is wrong.
    """
    values = read_values(path, overrides, "job")
    return parse(Job, values, str(path))


def read_values(path: str | Path, overrides: list[str] | tuple[str, ...], kind: str) -> dict[str, Any]:
    """The mapping of a YAML file with ``key.path=value`` overrides, not validated; ``kind`` names the file in errors.

    A job, or one in a table's ``jobs``, that has the key ``base`` is what that job file holds, with its own settings on
    top. The file is looked for beside the one that names it.

    Raises:
        ConfigError: a file is missing or not a mapping in YAML, a base holds a wrong setting, or an override is
            malformed.
    """
    path = Path(path)
    values = _read(path, kind)
    if kind == "job":
        values = _on_base(values, path, str(path))
    elif isinstance(jobs := values.get("jobs"), dict):
        for name, job in jobs.items():
            if isinstance(job, dict) and BASE in job:
                whole = copy.deepcopy(
                    _on_base(job, path, f"{path}: jobs.{name}")
                )  # an anchor's keys are each job's own
                jobs[name] = {key: value for key, value in whole.items() if key in job or key not in OF_THE_TABLE}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r} is not of the form key.path=value")
        if key.rpartition(".")[2] == BASE:
            raise ConfigError(f"override {override!r}: a base stands in the file; it cannot be given here")
        try:
            put(values, key, yaml.safe_load(text), f"override {override!r}")
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not valid YAML") from error
    return values


def parse(model: type[Model], values: dict[str, Any], source: str) -> Model:
    """Validate ``values``; the first problem becomes one sentence that starts with ``source`` and the key's path.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range or an impossible combination.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    raise ConfigError(f"{source}: {_sentence(model, problems)}")


def settings_of(model: type[BaseModel]) -> dict[str, Schema]:
    """Every setting and every group of settings of a model by dotted key, a group's own settings before its groups."""
    schema = model.model_json_schema()
    return dict(_below(schema, schema.get("$defs", {}), ""))


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """``; did you mean KEY?``: nearest to an unknown key in its group, or of its last word elsewhere; else nothing."""
    known = list(known)
    if key in known:  # a key with dots, where groups are nested
        return f"; in a file it stands in its group, {key.replace('.', ': {')}: ...{'}' * key.count('.')}"
    group, dot, word = key.rpartition(".")
    beside = [name.removeprefix(group + dot) for name in known if name.rpartition(".")[0] == group]
    meant = [group + dot + near for near in difflib.get_close_matches(word, beside, 1)]
    meant = meant or [name for name in known if name.rpartition(".")[2] == word]
    if not meant and not beside:
        meant = difflib.get_close_matches(key, known, 1)
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


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


def _read(path: Path, kind: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the {kind} file ({error.strerror})") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        given = "empty" if values is None else f"a {type(values).__name__}"
        raise ConfigError(f"{path}: a {kind} file is a mapping of keys to values, and this is {given}")
    return values


def _kind(values: dict[str, Any]) -> Kind:
    kinds: tuple[Kind, ...] = ("table", "sweep")
    return next((kind for kind in kinds if kind in values), "job")


def _on_base(values: dict[str, Any], path: Path, where: str, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Settings in ``path`` on top of those of the job file that they name as ``base``, and of its base."""
    if BASE not in values:
        return values
    name, own = values[BASE], {key: value for key, value in values.items() if key != BASE}
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}: base={name!r}: the name of a job file beside this one is needed")
    where, base, above = f"{where}: base={name}", path.parent / name, (*above, path.resolve())
    try:
        leads_back = base.resolve() in above
        below = _read(base, "job")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{where}: no file can be called so ({error})") from error
    if leads_back:
        raise ConfigError(f"{where}: leads back to this file")
    if (kind := _kind(below)) != "job":
        raise ConfigError(f"{where}: a {kind}, and a job is needed")
    whole = _on_base(below, base, where, above)
    try:
        Job.model_validate(whole)
    except ValidationError as error:
        # What is missing there, or does not go together, may be given on top of it.
        wrong = [problem for problem in error.errors(include_url=False) if problem["type"] not in _WITH_OTHERS]
        if wrong:
            raise ConfigError(f"{where}: {_sentence(Job, wrong)}") from error
    return merged(whole, own)


def _sentence(model: type[BaseModel], problems: Sequence[Any]) -> str:
    """What is wrong first, an unknown key before anything else: what it stands for is missing then."""
    problem = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    location = problem["loc"]
    key, kind, given = ".".join(map(str, location)), problem["type"], problem["input"]
    if kind == "extra_forbidden":
        more = [BASE] if model is Job and len(location) == 1 else []
        allowed = ", ".join(sorted([*_fields(_model_at(model, location[:-1])), *more]))
        return f"{key}: unknown key; allowed here: {allowed}{did_you_mean(key, [*settings_of(model), *more])}"
    if kind == "missing":
        return f"{key}: required, and not given"
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
    inner = {}
    for name, schema in group["properties"].items():
        if "$ref" in schema:
            inner[f"{prefix}{name}"] = groups[schema["$ref"].rpartition("/")[2]] | schema
        else:
            yield f"{prefix}{name}", schema
    for key, schema in inner.items():
        yield key, schema
        yield from _below(schema, groups, f"{key}.")


def _model_at(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    names = iter(location)
    for name in names:
        if isinstance(name, int):  # a place in a list
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
