"""A page of the report: self-contained HTML out of a template.

The page needs no network and no script. Ids, sources, group names, messages and errors come from
the pool and are escaped wherever they appear.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jinja2

from influence import storage
from influence.report_format import FILTERS


def render_page(template: str, context: Mapping[str, Any]) -> str:
    """A template of this package, filled; a name that the context lacks is an error."""
    return _environment().get_template(template).render(**context)


@functools.cache
def _environment() -> jinja2.Environment:
    """Kept, with the templates that it has compiled: that takes longer than to fill one."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("influence"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    return environment


def write_page(run_url: str, page: str) -> str:
    """Put the page into the directory as `report.html`; returns its URL."""
    url = storage.join(run_url, "report.html")
    # Text of the pool may hold lone surrogates, which UTF-8 cannot carry.
    storage.put(url, page.encode("utf-8", "xmlcharrefreplace"))
    return url
