"""What the report shows of a comparison; imports no torch, as the report needs none."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from data_contracts.spreadsheet import read_csv

_SHOWN = ("macro_f1", "accuracy", "auroc", "ece", "concept_auroc", "concept_macro_f1", "rule_macro_f1")


def systems_for_report(csv: Path) -> pd.DataFrame | None:
    """`system` and the main metrics with their sd; None where nothing was compared.

    A row of the paper's protocol says so in its name, with how much choosing on test images added to its macro-F1.
    """
    if not csv.is_file():
        return None
    table = read_csv(csv)
    columns = [name for metric in _SHOWN for name in (metric, f"{metric}_sd") if name in table]
    return table[columns].assign(system=[_named(row) for row in table.to_dict("records")])


def _named(row: dict[str, object]) -> str:
    if row.get("protocol") != "paper":
        return str(row["system"])
    return f"{row['system']} (chosen on test images: optimism {row['optimism_macro_f1']:+.3f})"
