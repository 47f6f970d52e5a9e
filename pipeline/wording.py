"""How lists stand in messages."""

from __future__ import annotations

from collections.abc import Sequence

_MAX_SHOWN = 5


def some(names: Sequence[object]) -> str:
    """The first five names, quoted, and how many more there are."""
    shown = ", ".join(repr(str(name)) for name in names[:_MAX_SHOWN])
    return shown + (f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else "")
