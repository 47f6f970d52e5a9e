"""Aligned data set in, trained and explained classifier out.

METHOD, section 3, is `concept_encoder`, `logic`, `network` and `losses`, in this order. `data` feeds them,
`fit` trains, `evaluate` measures, `checkpoint` keeps, `predict` uses, `explain` explains; `calibration`, `reject`,
`robustness` and `subgroups` say how far it can be relied on. `from model import load` opens a trained one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.api import Model as Model
    from model.api import load as load

__all__ = ["Model", "load"]


def __getattr__(name: str) -> Any:
    """`load` and `Model`, imported when they are first asked for: the command line reads `model.config` at start."""
    if name in __all__:
        from model import api  # noqa: PLC0415

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
