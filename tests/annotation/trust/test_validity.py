from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ks_2samp

from annotation.trust.validity import FALSE_ALARM, changes, fingerprints, quantiles_of, shifted
from data_contracts.concepts import Concept, Vocabulary

RED = Concept("red", "red", "It is red.", synonyms=("crimson",))
VOCABULARY = Vocabulary.of([RED, Concept("round", "round")])


def ledger(model: str = "m", prompt: str = "p") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "image_id": ["i", "i", "j", "j"],
            "concept_id": ["red", "round"] * 2,
            "witness": "vlm",
            "witness_model": model,
            "prompt_sha256": prompt,
        }
    )


def fitted_for(
    vocabulary: Vocabulary = VOCABULARY, judgements: pd.DataFrame | None = None, **more: object
) -> pd.Series:
    content = {"aligner": "hf-hub:org/name", "templates": ("{}",), "judged": True} | more
    return fingerprints(vocabulary, ledger() if judgements is None else judgements, **content)  # type: ignore[arg-type]


def parts(one: pd.Series, other: pd.Series, concept: str = "red") -> list[str]:
    return [change.part for change in changes(one[concept], other[concept])]


def test_every_part_that_a_scale_hangs_on_is_told_apart() -> None:
    now = fitted_for()
    assert parts(now, fitted_for()) == []
    assert parts(now, fitted_for(aligner="ViT-B-32")) == ["aligner"]
    assert parts(now, fitted_for(templates=("a photo of {}",))) == ["templates"]
    assert parts(now, fitted_for(judgements=ledger(model="other"))) == ["judges"]
    assert parts(now, fitted_for(judgements=ledger(prompt="q"))) == ["prompt"]
    renamed = Vocabulary.of([replace(RED, synonyms=("scarlet",)), VOCABULARY["round"]])
    assert parts(now, fitted_for(renamed)) == ["words"]
    assert parts(now, fitted_for(renamed), "round") == []


def test_an_untouched_aligner_does_not_know_the_judges() -> None:
    one, other = (fitted_for(judgements=ledger(model=m), judged=False) for m in ("m", "other"))
    assert one.equals(other)


def test_a_change_reads_as_a_sentence() -> None:
    (change,) = changes(fitted_for()["red"], fitted_for(aligner="b")["red"])
    assert str(change) == "the alignment model was 'hf-hub:org/name' and is now 'b'"


def stored(score: np.ndarray, concept: str = "red") -> pd.DataFrame:
    return pd.DataFrame({"concept_id": [concept], "n": [len(score)], "score_quantiles": [quantiles_of(score)]})


@pytest.mark.parametrize("shape", ["normal", "two values", "crowded near one"])
@pytest.mark.parametrize("moved", [0.0, 0.5])
def test_distance_is_that_of_scipy_to_one_in_fifty(shape: str, moved: float) -> None:
    rng = np.random.default_rng(0)

    def drawn(n: int, shift: float) -> np.ndarray:
        x = rng.normal(shift, 1, n)
        return {"normal": x, "two values": (x > 0.5).astype(float), "crowded near one": 1 - 1e-9 ** (1 / (1 + x**2))}[
            shape
        ]

    old, new = drawn(500, 0.0), drawn(300, moved)
    found = shifted(stored(old), {"red": new}).iloc[0]
    assert found["distance"] == pytest.approx(ks_2samp(old, new).statistic, abs=0.03)


def test_false_alarms_over_all_concepts_are_as_rare_as_stated() -> None:
    rng, n_alarms, n_runs = np.random.default_rng(1), 0, 100
    for _ in range(n_runs):
        old, new = rng.normal(size=(10, 200)), rng.normal(size=(10, 150))
        table = pd.concat([stored(column, str(k)) for k, column in enumerate(old)])
        n_alarms += bool(shifted(table, {str(k): column for k, column in enumerate(new)})["alarm"].any())
    assert n_alarms <= n_runs * FALSE_ALARM + 3 * np.sqrt(n_runs * FALSE_ALARM)


def test_a_shift_is_seen_and_a_sure_but_small_one_is_none() -> None:
    rng = np.random.default_rng(2)
    old = rng.normal(size=2000)
    found = shifted(
        pd.concat([stored(old, c) for c in ("same", "moved", "little", "silent")]),
        {"same": rng.normal(size=300), "moved": rng.normal(0.8, 1, 300), "little": rng.normal(0.15, 1, 20_000)},
    ).set_index("concept_id")
    assert found["alarm"].to_dict() == {"same": False, "moved": True, "little": False}
    assert found.loc["little", "p"] < FALSE_ALARM
