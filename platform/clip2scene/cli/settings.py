"""``clip2scene settings``: what can be set in a job."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from typing import Any

from clip2scene.config import ConfigError, Job
from clip2scene.jobfile import Schema, did_you_mean, settings_of

_INTRODUCTION = (
    "Settings of a job with what is allowed and [default]; key=value after the job file changes one, as in "
    "`clip2scene run jobs/demo.yaml distill.scr.tau=0.7`. A job file may also have `base: FILE`: another one "
    "beside it, from which it takes all others."
)
_TYPES = {"boolean": "true or false", "integer": "integer", "number": "number", "string": "text"}
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def register(verbs: Any) -> None:
    """Add the verb."""
    settings = verbs.add_parser("settings", help="every setting of a job: what it means, what is allowed, its default")
    settings.add_argument("key", nargs="?", metavar="KEY", help="only this setting or group, such as distill.stcr")
    settings.set_defaults(verb=_settings)


def _settings(options: argparse.Namespace) -> int:
    known, key = settings_of(Job), options.key
    wanted = {name: known[name] for name in known if key is None or name == key or name.startswith(f"{key}.")}
    if not wanted:
        raise ConfigError(f"settings {key}: unknown key; `clip2scene settings` lists all{did_you_mean(key, known)}")
    lines = [] if key else [_wrapped(_INTRODUCTION), "", _wrapped(Job.__doc__ or "")]
    for name, schema in wanted.items():
        meaning = schema.get("description", "")
        if "properties" in schema:
            lines += ["", _wrapped(f"{name}: {meaning}")]
        else:
            lines.append(f"  {name}  {_allowed(schema)}  [{_default(schema)}]")
            lines += [_wrapped(meaning, " " * 6)] if meaning else []
    print("\n".join(lines).lstrip("\n"))
    return 0


def _allowed(schema: Schema) -> str:
    """The values that can be chosen from, or type and bounds."""
    if "anyOf" in schema:  # or not given
        return _allowed(schema["anyOf"][0])
    if "enum" in schema:
        *others, last = schema["enum"]
        return f"{', '.join(others)} or {last}" if others else last
    if schema["type"] == "array":
        of = _allowed(schema["items"])
        bounds = _bounds({"minimum": schema.get("minItems"), "maximum": schema.get("maxItems")})
        return f"list of {of}{'' if 'enum' in schema['items'] else 's'}" + (f", {bounds} of them" if bounds else "")
    return ", ".join(filter(None, (_TYPES[schema["type"]], _bounds(schema))))


def _bounds(schema: Schema) -> str:
    given = {name: schema[name] for name in _BOUNDS if schema.get(name) is not None}
    if given.keys() == {"minimum", "maximum"}:
        return f"{given['minimum']} to {given['maximum']}"
    return ", ".join(f"{_BOUNDS[name]} {bound}" for name, bound in given.items())


def _default(schema: Schema) -> str:
    if "default" not in schema:
        return "required"
    default = schema["default"]
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list):
        return ", ".join(map(str, default))
    return "not given" if default is None else str(default)


def _wrapped(text: str, indent: str = "") -> str:
    """Paragraph of a docstring for the terminal, or for lines of 100 where there is none."""
    width = min(shutil.get_terminal_size((100, 0)).columns, 100)
    plain = " ".join(text.replace("``", "`").split())
    return textwrap.fill(plain, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
