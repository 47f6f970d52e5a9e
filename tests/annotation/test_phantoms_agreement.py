"""The promise of the demo: with nothing configured, judged labels agree with the known truth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.metrics import cohen_kappa_score

from annotation.judge import judge
from annotation.prompts import Framing
from annotation.propose import propose
from annotation.vlm.client import VlmClient
from annotation.vlm.questions import questions_of
from data_contracts.tables import vocabulary_of
from pipeline.phantoms import CONCEPT_RATES, PHANTOM_MODALITY, make_phantoms


async def test_blind_judgements_of_proposed_concepts_reach_kappa_0_7(
    tmp_path: Path, make_embedded: Callable[..., VlmClient]
) -> None:
    make_phantoms(tmp_path, n_images=96, seed=11)
    truth = pd.read_csv(tmp_path / "truth.csv").set_index("path")
    paths = list(truth.index)

    def read(path: str) -> np.ndarray:
        return np.asarray(Image.open(tmp_path / path).convert("RGB"))

    samples: dict[str, list[str]] = {}
    for path in paths[:36]:
        samples.setdefault(path.split("/")[1], []).append(path)
    async with make_embedded() as client:
        concepts = await propose(samples, read, client, PHANTOM_MODALITY)
        questions = questions_of(vocabulary_of(concepts))
        judged = await judge(paths[36:], questions, read, client, Framing(PHANTOM_MODALITY))
    wide = judged.judgements.pivot(index="image_id", columns="concept_id", values="probability")
    known = [c for c in CONCEPT_RATES if c in wide]
    kappas = {c: cohen_kappa_score(truth.loc[wide.index, c], wide[c] > 0.5) for c in known}
    assert len(known) >= 6, f"proposed only {sorted(wide.columns)}"
    assert np.mean(list(kappas.values())) >= 0.7, kappas
    assert min(kappas.values()) > 0.4, kappas
