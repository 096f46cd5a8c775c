"""``clip2scene settings``: what can be set in a job, a search space or a table."""

from __future__ import annotations

import argparse
import shutil
import textwrap

from pydantic import BaseModel

from clip2scene.cli.options import Commands
from clip2scene.config import Job
from clip2scene.errors import ConfigError
from clip2scene.jobfile import Schema, did_you_mean, settings_of

_INTRODUCTIONS = {
    "job": "Settings of a job with what is allowed and [default]; key=value after the job file changes one, as in "
    "`clip2scene run jobs/demo.yaml distill.scr.tau=0.7`. A job file may also have `base: FILE`: the path of another "
    "one, from which it takes all settings that it does not give itself.",
    "sweep": "Settings of a search space with what is allowed and [default]; key=value after the file changes one, as "
    "in `clip2scene sweep search_spaces/joint.yaml --job jobs/demo.yaml num_trials=8`. KEY is a setting of the job, "
    "such as distill.scr.tau; `clip2scene settings` lists those. variants.NAME=null and parameters.KEY=null leave one "
    "out.",
    "table": "Settings of a table with what is allowed and [default]; key=value after the file changes one, as in "
    "`clip2scene run jobs/table3_ablation.yaml seeds=[0]`. KEY is a data set, N an index in the list, from 0; "
    "rows.N=null leaves one out.",
}
_TYPES = {
    "boolean": "true or false",
    "integer": "integer",
    "number": "number",
    "object": "group of keys",
    "string": "text",
}
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def register(commands: Commands) -> None:
    """Add the command."""
    settings = commands.add_parser(
        "settings", help="every setting of a job: what it means, what is allowed, its default"
    )
    settings.add_argument("key", nargs="?", metavar="KEY", help="only this setting or group, such as distill.stcr")
    kinds = settings.add_mutually_exclusive_group()
    for kind, name in (("sweep", "search space"), ("table", "table")):
        words = f"settings of a {name} instead of a job"
        kinds.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind, help=words)
    settings.set_defaults(verb=_settings, kind="job")


def _settings(options: argparse.Namespace) -> int:
    model, key = _model(options.kind), options.key
    known = settings_of(model)
    wanted = {name: known[name] for name in known if key is None or name == key or name.startswith(f"{key}.")}
    if not wanted:
        command = "settings" if options.kind == "job" else f"settings --{options.kind}"
        raise ConfigError(f"{command} {key}: unknown key; `clip2scene {command}` lists all{did_you_mean(key, known)}")
    lines = [] if key else [_wrapped(_INTRODUCTIONS[options.kind]), "", _wrapped(model.__doc__ or "")]
    for name, schema in wanted.items():
        meaning = schema.get("description", "")
        if "properties" in schema:
            lines += ["", _wrapped(f"{name}: {meaning}")]
        else:
            lines.append(f"  {name}  {_allowed(schema)}  [{_default(schema)}]")
            lines += [_wrapped(meaning, " " * 6)] if meaning else []
    print("\n".join(lines).lstrip("\n"))
    return 0


def _model(kind: str) -> type[BaseModel]:
    if kind == "sweep":
        from clip2scene.sweeps.space import Space

        return Space
    if kind == "table":
        from clip2scene.tables.spec import Table

        return Table
    return Job


def _allowed(schema: Schema) -> str:
    """The values that can be chosen from, or type and bounds."""
    if "anyOf" in schema:  # or not given
        return _allowed(schema["anyOf"][0])
    if "enum" in schema:
        *others, last = schema["enum"]
        return f"{', '.join(others)} or {last}" if others else last
    if "type" not in schema:
        return "value"
    if schema["type"] == "array":
        items = schema.get("items") or schema.get("prefixItems", [{}])[0]
        bounds = _bounds({"minimum": schema.get("minItems"), "maximum": schema.get("maxItems")})
        return f"list of {_allowed(items)}{'' if 'enum' in items else 's'}" + (f", {bounds} of them" if bounds else "")
    return ", ".join(filter(None, (_TYPES[schema["type"]], _bounds(schema))))


def _bounds(schema: Schema) -> str:
    given = {name: schema[name] for name in _BOUNDS if schema.get(name) is not None}
    if given.keys() == {"minimum", "maximum"}:
        return " to ".join(str(bound) for bound in dict.fromkeys(given.values()))
    return ", ".join(f"{_BOUNDS[name]} {bound}" for name, bound in given.items())


def _default(schema: Schema) -> str:
    if "default" not in schema:
        return "required"
    default = schema["default"]
    if isinstance(default, bool):
        return str(default).lower()
    if default in (None, "", []):
        return "not given"
    return ", ".join(map(str, default)) if isinstance(default, list) else str(default)


def _wrapped(text: str, indent: str = "") -> str:
    """Paragraph of a docstring for the terminal, or for lines of 100 where there is none."""
    width = min(shutil.get_terminal_size((100, 0)).columns, 100)
    plain = " ".join(text.replace("``", "`").split())
    return textwrap.fill(plain, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
