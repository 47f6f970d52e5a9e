"""The template environment of the report and the review page: escaped always, and strict about what is missing."""

from __future__ import annotations

import functools
from typing import Any, cast

import jinja2

from pipeline.report import words


@functools.cache
def environment(package: str) -> jinja2.Environment:
    """Templates of `package` (its `templates` folder) with the project's words for numbers."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        lstrip_blocks=True,
    )
    found.filters.update(words.FILTERS)
    cast(dict[str, Any], found.globals).update(known=words.known, plural=words.plural)
    return found


def source(package: str, name: str) -> str:
    """The text of one template file, unrendered."""
    loader = environment(package).loader
    if loader is None:
        raise RuntimeError(f"{package}: the template environment has no loader")
    return loader.get_source(environment(package), name)[0]
