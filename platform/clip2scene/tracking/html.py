"""Self-contained HTML pages from ``templates``: style and figures are inside the file, and it can be printed."""

from __future__ import annotations

import base64
import io
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure


def render(template: str, **values: Any) -> str:
    """A page from a template of ``templates``, with all values escaped."""
    pages = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.globals["zip"] = zip
    pages.filters["png"] = _png
    return pages.get_template(template).render(values) + "\n"


def _png(figure: Figure) -> str:
    """A figure's PNG in base64."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return base64.b64encode(file.getvalue()).decode()
