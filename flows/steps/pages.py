"""The report step: everything the run knows, gathered for one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_contracts.files import sha256_of_file, write_text
from flows.chain import Context, ShardRunner, Step, StepResult
from flows.steps import card
from pipeline.report.evidence import EVIDENCE, TRUST

_READ = (
    "images.parquet",
    "concepts.parquet",
    "labels.parquet",
    "agreement.csv",
    "leaks.csv",
    "truth_agreement.csv",
    "dataset.parquet",
    "model/metrics.json",
    "explanations/rules.csv",
    "explanations/concept_use.md",
    "comparison.csv",
    *(spec.file for spec in (*TRUST.values(), *EVIDENCE.values())),
)


def _inputs(context: Context) -> Mapping[str, Any]:
    files = {name: context.run.path / name for name in (*_READ, *card.READ)}
    steps = context.run.read_manifest().steps
    return {
        "files": {name: sha256_of_file(path) for name, path in files.items() if path.is_file()},
        # When a step ran again with the same result, its seconds and cost on the page are still new.
        "steps": {name: record.finished_at.isoformat() for name, record in steps.items() if name != "report"},
    }


def _work(context: Context, _shards: ShardRunner) -> StepResult:
    from flows.report_content import gather
    from pipeline.report.render import render

    page = render(gather(context))
    write_text(context.run.report_path, page)
    return StepResult(
        [context.run.report_path, *card.write_cards(context)], {"kilobytes": round(len(page.encode()) / 1024)}
    )


REPORT = Step("report", "Writing the report", _inputs, _work)
