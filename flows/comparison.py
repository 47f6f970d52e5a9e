"""Systems side by side on the data set of a run."""

from __future__ import annotations

import pandas as pd

from data_contracts.spreadsheet import write_csv
from flows.chain import Context
from flows.steps import image_reader
from model.compare import compare
from model.systems.registry import SYSTEMS

COMPARISON_CSV = "comparison.csv"


def compare_systems(context: Context, names: str) -> pd.DataFrame:
    """Train and measure the named systems (comma-separated, or `all`) with the run's settings; writes the table."""
    run = context.run
    chosen = list(SYSTEMS) if names == "all" else [name.strip() for name in names.split(",") if name.strip()]
    dataset = run.read_dataset()
    with context.console.bar("reading features", len(dataset)) as advance:
        table = compare(
            dataset,
            image_reader(context),
            context.settings.train,
            cache_dir=run.cache_dir,
            systems=chosen,
            advance=advance,
        )
    write_csv(run.path / COMPARISON_CSV, table)
    return table
