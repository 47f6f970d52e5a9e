"""Whether a threshold still holds: what it was fitted for, what has changed since, and whether scores have shifted.

A threshold is a property of the model that scores, of its prompts, and of the images. The first two are written beside
it (`fitted_for`), the third as quantiles of the scores it was fitted on (`score_quantiles`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import kstwo

from annotation.votes import latest
from data_contracts.concepts import Concept, Vocabulary
from data_contracts.manifest import content_hash
from data_contracts.tables import Witness

Array = npt.NDArray[np.float64]

FALSE_ALARM = 0.01
"""Probability of any alarm, over all concepts of one comparison together, where nothing has shifted (Holm, 1979)."""
LEAST_SHIFT = 0.1
"""Smaller distances raise no alarm however sure: at no cut do so many images change sides."""
MODEL_PARTS = ("aligner", "judges")
"""Parts of `fitted_for` that name a model: another one gives scores of another scale."""
_QUANTILES = np.linspace(0, 1, 51)
_FORMAT = "%.5g"
_FEW = 5
_IN_WORDS = {
    "aligner": "the alignment model",
    "judges": "the judging model",
    "templates": "the prompt templates of the alignment model",
    "words": "the words of the concept",
    "prompt": "the question that the judging model is asked",
}


class Changed(NamedTuple):
    """One part of what a threshold was fitted for that is no longer so."""

    part: str
    before: str
    now: str

    @property
    def in_words(self) -> str:
        """What changed, for a sentence."""
        return _IN_WORDS.get(self.part, self.part)

    def __str__(self) -> str:
        """`the alignment model was 'a' and is now 'b'`."""
        return f"{self.in_words} was {self.before!r} and is now {self.now!r}"


def fingerprints(
    vocabulary: Vocabulary,
    judgements: pd.DataFrame,
    *,
    aligner: str,
    templates: tuple[str, ...],
    judged: bool,
) -> pd.Series:
    """Concept id → `fitted_for`: everything that the scale of its scores hangs on, as `part=value; …`.

    Args:
        vocabulary: The concepts: name, definition, synonyms and contrast count.
        judgements: The ledger.
        aligner: The alignment model, by a name that changes with its weights.
        templates: Its prompt templates.
        judged: Whether the answers of judging models enter the score: a fitted aligner's, or the fused label's.
    """
    common = {"aligner": aligner, "templates": _short({"templates": templates})}
    asked = _questions(judgements) if judged else {}
    found = {}
    for concept in vocabulary:
        parts = common | {"words": _words(concept)}
        if judged:
            judges, prompt = asked.get(concept.concept_id, ("none", "none"))
            parts |= {"judges": judges, "prompt": prompt}
        found[concept.concept_id] = "; ".join(f"{name}={value.replace(';', ',')}" for name, value in parts.items())
    return pd.Series(found, dtype="str")


def changes(before: str, now: str) -> list[Changed]:
    """What differs between two `fitted_for`; a part that one of them lacks has changed from or to `none`."""
    old, new = _parts(before), _parts(now)
    return [
        Changed(name, old.get(name, "none"), new.get(name, "none"))
        for name in dict.fromkeys([*old, *new])
        if old.get(name, "none") != new.get(name, "none")
    ]


def quantiles_of(score: Array) -> str:
    """The scores' distribution as 51 evenly spaced quantiles; empty for none."""
    finite = score[np.isfinite(score)]
    return " ".join(_FORMAT % value for value in np.quantile(finite, _QUANTILES)) if len(finite) else ""


def shifted(fitted_on: pd.DataFrame, scores: Mapping[str, Array]) -> pd.DataFrame:
    """concept_id, n, distance, p and `alarm` of every concept that both sides know.

    A two-sample Kolmogorov-Smirnov test of new scores against those a cut was fitted on, the latter known to one in
    fifty by their quantiles. Alarm: p, adjusted by Holm over the concepts, is below `FALSE_ALARM`, and the distance
    at least `LEAST_SHIFT`. Images of one patient are not independent: with many of each, alarms come more often.

    Args:
        fitted_on: concept_id, n and score_quantiles.
        scores: Concept id → new scores.
    """
    rows = []
    for concept_id, n, text in fitted_on[["concept_id", "n", "score_quantiles"]].itertuples(index=False):
        new = scores.get(str(concept_id), np.zeros(0))
        new = new[np.isfinite(new)]
        if len(new) >= _FEW and isinstance(text, str) and text:
            distance = _distance(np.array(text.split(), np.float64), new)
            effective = max(round(n * len(new) / (n + len(new))), 1)
            rows.append((concept_id, len(new), distance, float(kstwo.sf(distance, effective))))
    found = pd.DataFrame(rows, columns=["concept_id", "n", "distance", "p"])
    found["p"] = _holm(found["p"].to_numpy(np.float64))
    return found.assign(alarm=(found["p"] < FALSE_ALARM) & (found["distance"] >= LEAST_SHIFT))


def _distance(quantiles: Array, new: Array) -> float:
    """Greatest distance of the two distribution functions at the known quantiles."""
    values, first = np.unique(quantiles, return_index=True)
    last = np.append(first[1:], len(quantiles)) - 1
    # Rounded as the quantiles are, or scores crowded near 1 would lie beside them.
    ordered = np.sort(np.char.mod(_FORMAT, new).astype(np.float64))
    up_to = np.searchsorted(ordered, values, side="right") / len(new)
    below = np.searchsorted(ordered, values, side="left") / len(new)
    # Many images may share one score: its own share of them is between the two levels.
    above_it, below_it = up_to - _QUANTILES[last], _QUANTILES[first] - below
    return float(np.max(np.abs(np.concatenate([above_it, below_it])), initial=0.0))


def _holm(p: Array) -> Array:
    """Adjusted p-values of Holm's step-down procedure."""
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1)
    return adjusted


def _questions(judgements: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Concept id → its judging models, and a hash of the question that each was mostly asked."""
    rows = latest(judgements[judgements["witness"] == Witness.VLM])
    asked = rows.assign(prompt_sha256=rows["prompt_sha256"].astype("object").fillna("none"))
    mostly = asked.groupby(["concept_id", "witness_model"], observed=True)["prompt_sha256"].agg(_most_common)
    found = {}
    for concept_id, part in mostly.groupby(level=0):
        models = part.index.get_level_values(1).astype(str)
        found[str(concept_id)] = ("+".join(models), _short({"asked": list(part)}))
    return found


def _most_common(values: pd.Series) -> str:
    return str(values.mode()[0])


def _words(concept: Concept) -> str:
    return _short({"words": [concept.name, concept.definition, list(concept.synonyms), concept.contrast]})


def _short(content: Mapping[str, object]) -> str:
    return content_hash(content)[:12]


def _parts(text: str) -> dict[str, str]:
    pairs = (part.partition("=") for part in text.split("; ") if part)
    return {name: value for name, _, value in pairs}
