"""Who may not label what, after the honesty and leak tests, and which concepts nobody is left for.

A text that the untouched aligner does not follow says nothing against another witness: only the aligner falls silent,
as it does where people marked regions and its map does not point into them. Where heads were fitted to judgements and
beat no null, the judgements themselves do not follow the pixels, so every machine falls silent. A leak is the leaking
witness's own, and that of heads that read nobody else. A concept stays as long as one witness is left that can label
it; people count as one once they answered on enough images.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from annotation.trust.honesty import refusals
from annotation.trust.leaks import leak_refusals
from annotation.trust.localisation import misplaced
from annotation.votes import latest
from data_contracts.errors import DropReason
from data_contracts.tables import ConceptStatus, State, Witness

COLUMNS = ("source", "concept_id", "reason", "detail")
"""Of the table that `refused_witnesses` gives."""
PEOPLES_SHARE = 0.2
"""People carry a concept alone when they answered on at least this share of the images (the paper annotates 20 %)."""

_PEOPLE = (Witness.EXPERT, Witness.GIVEN)


def refused_witnesses(
    honesty: pd.DataFrame,
    leaks: pd.DataFrame,
    judgements: pd.DataFrame,
    *,
    fitted: bool,
    names: Mapping[str, str] | None = None,
    localisation: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """One row per witness (`alignment`, or `vlm:MODEL`) and concept it may not label; columns as `COLUMNS`.

    Args:
        honesty: From `honesty_table`.
        leaks: From `class_leak` of the judgements.
        judgements: The ledger: who has answered what.
        fitted: Whether the aligner's heads were fitted to these judgements.
        names: Concept id → name, for the sentences.
        localisation: From `localisation_table`, where people marked regions.
    """
    machines = _machines(judgements)
    found: list[tuple[str, str, str, str]] = []
    for (source, concept_id), detail in leak_refusals(leaks, names).items():
        found.append((source, concept_id, DropReason.LEAKS_CLASS.value, detail))
    leaked = {(source, concept_id) for source, concept_id, _, _ in found}
    for source, concept_id, reason, detail in list(found):
        if fitted and all((other, concept_id) in leaked for other in machines.get(concept_id, [source])):
            found.append((str(Witness.ALIGNMENT), concept_id, reason, detail))
    for concept_id, detail in refusals(honesty, names).items():
        silent = [str(Witness.ALIGNMENT), *(machines.get(concept_id, []) if fitted else [])]
        found += [(source, concept_id, DropReason.FAILS_NULL_TEST.value, detail) for source in silent]
    # A map in the wrong place says nothing of those who answered without it.
    for concept_id, detail in misplaced(localisation, names).items() if localisation is not None else ():
        found.append((str(Witness.ALIGNMENT), concept_id, DropReason.FAILS_NULL_TEST.value, detail))
    return pd.DataFrame(found, columns=list(COLUMNS)).drop_duplicates(["source", "concept_id"], ignore_index=True)


def silenced(
    judgements: pd.DataFrame, scores: pd.DataFrame, refused: pd.DataFrame
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Judgements and alignment scores without what refused witnesses say; to be fused instead of the whole."""
    pairs = set(zip(refused["source"], refused["concept_id"], strict=True))
    sources = judgements["witness"].astype(str) + ":" + judgements["witness_model"].astype(str)
    said = [pair not in pairs for pair in zip(sources, judgements["concept_id"], strict=True)]
    quiet = {concept_id for source, concept_id in pairs if source == Witness.ALIGNMENT}
    return judgements[said].reset_index(drop=True), scores[~scores["concept_id"].isin(quiet)].reset_index(drop=True)


def unwitnessed(refused: pd.DataFrame, judgements: pd.DataFrame, n_images: int) -> dict[str, DropReason]:
    """Concept id → reason, for the concepts that no witness is left for."""
    by_people = latest(judgements[judgements["witness"].isin(_PEOPLE)])
    decided = by_people[by_people["state"].isin([State.PRESENT, State.ABSENT])]
    n_answered = decided.groupby("concept_id")["image_id"].nunique()
    machines = _machines(judgements)
    result: dict[str, DropReason] = {}
    for concept_id, rows in refused.groupby("concept_id", sort=False):
        left = {str(Witness.ALIGNMENT), *machines.get(str(concept_id), [])} - set(rows["source"])
        if not left and n_answered.get(concept_id, 0) < PEOPLES_SHARE * n_images:
            result[str(concept_id)] = DropReason(rows["reason"].iloc[0])
    return result


def without_refused(concepts: pd.DataFrame, dropped: Mapping[str, DropReason]) -> pd.DataFrame:
    """The `concepts` table after the tests: `dropped` are out, what an earlier run dropped for them is judged anew.

    Positions stay, so that the question that images are judged with, and its order, stays what was paid for.
    """
    earlier = concepts["reason"].isin([DropReason.FAILS_NULL_TEST, DropReason.LEAKS_CLASS])
    asked = earlier | (concepts["status"] == ConceptStatus.KEPT)
    out = asked & concepts["concept_id"].isin(list(dropped))
    status = concepts["status"].mask(earlier, ConceptStatus.KEPT.value).mask(out, ConceptStatus.DROPPED.value)
    why = concepts["concept_id"].map({concept_id: reason.value for concept_id, reason in dropped.items()})
    reason = concepts["reason"].astype("object").mask(earlier, None).mask(out, why)
    return concepts.assign(status=status, reason=reason)


def _machines(judgements: pd.DataFrame) -> dict[str, list[str]]:
    """Concept id → the machine sources that answered it."""
    rows = judgements[judgements["witness"] == Witness.VLM]
    pairs = rows[["concept_id", "witness", "witness_model"]].drop_duplicates()
    result: dict[str, list[str]] = {}
    for concept_id, witness, model in pairs.itertuples(index=False):
        result.setdefault(str(concept_id), []).append(f"{witness}:{model}")
    return result
