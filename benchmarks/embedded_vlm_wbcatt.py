"""How far the embedded vision-language model gets with concepts that experts named for blood cells.

    python benchmarks/embedded_vlm_wbcatt.py [--data DIR] [--images 600]

The *names* of WBCAtt's attribute values are its vocabulary; the experts' answers are only used to score it. Nothing
is fitted. Concepts that the model cannot measure are answered `uncertain`, and counted as such.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import tempfile
import time
from pathlib import Path

import pandas as pd
from sklearn.metrics import cohen_kappa_score

from annotation.judge import judge
from annotation.prompts import Framing
from annotation.vlm.client import VlmClient
from annotation.vlm.journal import Journal
from annotation.vlm.questions import questions_of
from annotation.vlm.settings import VlmSettings
from data_contracts.tables import State, vocabulary_of
from pipeline.decode import read_pixels
from pipeline.import_labels import given_concepts

DEFAULT_DATA = Path(os.environ.get("MEDMICN_DATA", "../shared/data"))


async def judged(paths: list[str], root: Path, sheet: Path) -> pd.DataFrame:
    """Judgements of the images at these paths, with the path as image id."""
    vocabulary = vocabulary_of(given_concepts(sheet))
    with tempfile.TemporaryDirectory() as folder, Journal(Path(folder)) as journal:
        async with VlmClient(VlmSettings(), None, journal) as client:
            framing = Framing("blood smear microscopy")
            found = await judge(paths, questions_of(vocabulary), lambda p: read_pixels(root / p), client, framing)
    return found.judgements


def truth_of(sheet: Path, concepts: pd.DataFrame) -> pd.DataFrame:
    """Path × concept_id: whether the expert chose this value of its attribute."""
    answers = pd.read_csv(sheet)
    columns = {}
    for concept in concepts.itertuples():
        attribute = concept.group.replace(" ", "_")
        columns[concept.concept_id] = answers[attribute] == concept.name.removeprefix(concept.group).strip()
    return pd.DataFrame(columns).set_index(answers["path"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--images", type=int, default=600, help="images of the test split")
    arguments = parser.parse_args()
    root = arguments.data / "wbcatt"
    sheet = root / "expert_attributes.csv"
    table = pd.read_csv(root / "labels.csv")
    paths = table.loc[table["split"] == "test", "path"].sort_values().tolist()[: arguments.images]
    started = time.monotonic()
    judgements = asyncio.run(judged(paths, root, sheet))
    seconds = time.monotonic() - started
    truth = truth_of(sheet, given_concepts(sheet))
    rows = []
    for concept_id, group in judgements.groupby("concept_id", sort=False):
        decided = group[group["state"].isin([State.PRESENT, State.ABSENT])]
        answers = truth.loc[decided["image_id"], concept_id].to_numpy()
        said = (decided["state"] == State.PRESENT).to_numpy()
        kappa = cohen_kappa_score(answers, said) if len(set(answers)) == 2 else float("nan")
        rows.append((concept_id, len(decided) / len(group), answers.mean() if len(answers) else float("nan"), kappa))
    print(f"| concept ({len(paths)} test images) | answered | prevalence | kappa |")
    print("|---|---|---|---|")
    for concept_id, answered, prevalence, kappa in rows:
        print(f"| {concept_id} | {answered:.2f} | {prevalence:.2f} | {kappa:.2f} |")
    measured = [kappa for _, answered, _, kappa in rows if answered > 0.5 and not math.isnan(kappa)]
    if measured:
        mean = sum(measured) / len(measured)
        print(f"\nmeasurable: {len(measured)} of {len(rows)} concepts, mean kappa {mean:.2f}; {seconds:.0f} s")
    else:
        print(f"\nmeasurable: none of {len(rows)} concepts; {seconds:.0f} s")


if __name__ == "__main__":
    main()
