"""Labels against a known truth: for generated images, and for expert attributes kept aside as an answer sheet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from data_contracts.store import RunFolder


def read_truth(path: Path) -> pd.DataFrame:
    """`truth.csv` beside a folder of generated images, with paths relative to that folder."""
    truth = pd.read_csv(path)
    return truth.assign(path=truth["path"].str.removeprefix("images/"))


def compare_with_truth(run: RunFolder, truth: pd.DataFrame) -> pd.DataFrame:
    """Per kept concept: agreement of the fused label with `truth`; NaN where the truth has no such column.

    `kappa` counts every image: where the label abstains, the likelier side stands for it, so that abstaining
    cannot flatter. `kappa_decided` leaves abstentions out.

    Args:
        run: a run with labels.
        truth: `path`, and one 0/1 column per concept id.

    Returns:
        concept_id, concept, n, prevalence, kappa, kappa_decided, auroc, abstained_fraction.
    """
    images = run.read_images()
    paths = images.set_index("image_id")["path"]
    labels = run.read_labels()
    labels = labels.assign(path=labels["image_id"].map(paths))
    answers = truth.set_index("path")
    rows = []
    for concept in run.vocabulary():
        own = labels[labels["concept_id"] == concept.concept_id].set_index("path")
        row = {"concept_id": concept.concept_id, "concept": concept.name}
        if concept.concept_id in answers:
            row |= _agreement(own, answers[concept.concept_id])
        rows.append(row)
    columns = [
        "concept_id",
        "concept",
        "n",
        "prevalence",
        "kappa",
        "kappa_decided",
        "auroc",
        "abstained_fraction",
    ]
    return pd.DataFrame(rows).reindex(columns=columns)


def _agreement(own: pd.DataFrame, answers: pd.Series) -> dict[str, float]:
    joined = own.join(answers.rename("truth"), how="inner").dropna(subset=["truth"])
    truth = joined["truth"].to_numpy(int)
    guessed = (joined["probability"].to_numpy() >= 0.5).astype(int)
    decided = joined["present"].notna().to_numpy()
    both_seen = len(np.unique(truth)) == 2
    return {
        "n": len(joined),
        "prevalence": float(truth.mean()) if len(joined) else float("nan"),
        "kappa": float(cohen_kappa_score(truth, guessed)) if both_seen else float("nan"),
        "kappa_decided": _kappa_decided(truth, guessed, decided),
        "auroc": float(roc_auc_score(truth, joined["probability"])) if both_seen else float("nan"),
        "abstained_fraction": float(1 - decided.mean()) if len(joined) else float("nan"),
    }


def _kappa_decided(truth: np.ndarray, guessed: np.ndarray, decided: np.ndarray) -> float:
    if len(np.unique(truth[decided])) < 2:
        return float("nan")
    return float(cohen_kappa_score(truth[decided], guessed[decided]))
