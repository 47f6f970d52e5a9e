"""Images, concepts and labels as the page's templates show them: plain rows, and what deserves a second look."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import pandas as pd

from data_contracts.tables import ConceptStatus, Split
from pipeline.report import words
from pipeline.report.content import ReportContent

Row = dict[str, Any]
MAX_CLASSES = 12

# Where a number deserves a second look. Shown on the page beside the table, so that they can be argued with.
LOOK_KAPPA = 0.4
LOOK_LEAK = 0.95
LOOK_ABSTAINED = 0.3
LOOK_RARE = 0.02


def present(frame: pd.DataFrame | None) -> TypeGuard[pd.DataFrame]:
    """Whether there is a table with at least one row."""
    return frame is not None and len(frame) > 0


def data_view(images: pd.DataFrame) -> Row:
    """Counts of classes by split, rejections by reason, and what else the data section says."""
    accepted = images[images["rejected"].isna()]
    by_class = accepted.assign(label=accepted["label"].fillna("no class"), split=accepted["split"].fillna("no split"))
    table = pd.crosstab(by_class["label"], by_class["split"])
    order = [s for s in (*Split, "no split") if s in table.columns]
    sizes = accepted[["width_px", "height_px"]].astype("Float64").max(axis=1).dropna()
    return {
        "n_given": len(images),
        "n_accepted": len(accepted),
        "splits": [str(s) for s in order],
        "classes": [
            {"name": c, "counts": table.loc[c, order].tolist(), "n": int(table.loc[c].sum())} for c in table.index
        ],
        "totals": table[order].sum().tolist(),
        "rejected": _reasons(images["rejected"], words.REJECTED),
        "n_near_duplicates": int(accepted["near_duplicate_of"].notna().sum()),
        "n_groups": int(accepted["group_id"].nunique()),
        "formats": accepted["format"].value_counts().to_dict(),
        "size_px": (int(sizes.min()), int(sizes.max())) if len(sizes) else None,
    }


def concepts_view(concepts: pd.DataFrame) -> Row:
    """Kept concepts in order, dropped ones with their reason in words."""
    is_kept = concepts["status"] == ConceptStatus.KEPT
    kept = concepts[is_kept].sort_values("position", kind="stable")
    names = dict(zip(concepts["concept_id"], concepts["name"], strict=True))
    dropped = [
        {
            "name": row["name"],
            "reason": words.DROPPED.get(row["reason"], words.words(row["reason"])),
            "nearest": names.get(row["nearest"], None if pd.isna(row["nearest"]) else row["nearest"]),
            "similarity": row["similarity"],
        }
        for row in concepts[~is_kept].to_dict("records")
    ]
    return {
        "kept": [_concept(row) for row in kept.to_dict("records")],
        "dropped": dropped,
        "reasons": _reasons(concepts.loc[~is_kept, "reason"], words.DROPPED),
        "origins": concepts["origin"].value_counts().to_dict(),
    }


def quality_view(content: ReportContent, concepts: Sequence[Row]) -> list[Row]:
    """One row a kept concept: how often present, abstained, agreed, leaked, predicted; and what to look at."""
    labels = content.labels if content.labels is not None else pd.DataFrame()
    counted = _label_counts(labels) if len(labels) else {}
    agreed = _by_concept(_first_rows(content.agreement))
    leaks = _by_concept(content.leaks)
    predicted = _by_concept(content.concept_metrics)
    rows = []
    for concept in concepts:
        concept_id = concept["concept_id"]
        leak = leaks.get(concept_id, {})
        row = {
            **concept,
            **counted.get(concept_id, {}),
            "kappa": agreed.get(concept_id, {}).get("kappa"),
            "kappa_low": agreed.get(concept_id, {}).get("kappa_low"),
            "kappa_high": agreed.get(concept_id, {}).get("kappa_high"),
            "n_compared": agreed.get(concept_id, {}).get("n"),
            "leak": leak.get("auroc"),
            "auroc": predicted.get(concept_id, {}).get("auroc"),
        }
        # A concept that never changes is flagged as a leak too, but that is another thing to say.
        follows_class = bool(leak.get("flagged", False)) and not bool(leak.get("constant", False))
        rows.append({**row, "look": _look(row, follows_class)})
    return rows


def mean_kappa(rows: Sequence[Row]) -> float | None:
    """Mean kappa over the concepts that have one."""
    known = [float(row["kappa"]) for row in rows if words.known(row["kappa"])]
    return sum(known) / len(known) if known else None


def class_table(images: pd.DataFrame, labels: pd.DataFrame, concepts: Sequence[Row]) -> Row | None:
    """How often each concept is present in each class: fractions of the images whose label does not abstain."""
    accepted = images[images["rejected"].isna() & images["label"].notna()]
    classes = sorted(accepted["label"].unique())[:MAX_CLASSES]
    if len(classes) < 2:
        return None
    joined = labels[labels["present"].notna()].merge(accepted[["image_id", "label"]], on="image_id")
    fraction = joined.assign(present=joined["present"].astype(float)).pivot_table(
        index="concept_id", columns="label", values="present", aggfunc="mean"
    )
    fraction = fraction.reindex(index=[c["concept_id"] for c in concepts], columns=classes)
    rows = [{"name": c["name"], "fractions": fraction.loc[c["concept_id"]].tolist()} for c in concepts]
    return {"classes": classes, "rows": rows}


def first_pair(agreement: pd.DataFrame | None) -> tuple[str, str] | None:
    """Who is compared with whom in the first comparison of an agreement table."""
    if not present(agreement):
        return None
    head = _named_pairs(agreement).iloc[0]
    return _who(head["first"]), _who(head["second"])


def pairs_view(agreement: pd.DataFrame | None) -> list[Row]:
    """One row a pair of witnesses: means over the concepts for which a number is defined."""
    if not present(agreement):
        return []
    named = _named_pairs(agreement)
    numbers = [c for c in ("kappa", "sensitivity", "specificity", "ppv", "npv", "auroc") if c in named]
    grouped = named.groupby(["first", "second"], sort=False)
    means = grouped[numbers].mean()
    sizes = grouped.agg(n_concepts=("concept_id", "nunique"))
    return [
        {
            "first": _who(key[0]),
            "second": _who(key[1]),
            "models": _models(key),
            **means.loc[key].to_dict(),
            **sizes.loc[key].to_dict(),
        }
        for key in means.index
    ]


def _named_pairs(agreement: pd.DataFrame) -> pd.DataFrame:
    """The table with `first` and `second` filled from `witness` and `reference` where those are used."""
    named = agreement.copy()
    for name, other in (("first", "witness"), ("second", "reference")):
        given = named[name] if name in named else pd.Series(pd.NA, named.index, dtype="str")
        named[name] = given.fillna(named[other]) if other in named else given
        named[name] = named[name].fillna("unnamed")
    return named


def _first_rows(agreement: pd.DataFrame | None) -> pd.DataFrame | None:
    if not present(agreement):
        return None
    named = _named_pairs(agreement)
    head = named.iloc[0]
    return named[(named["first"] == head["first"]) & (named["second"] == head["second"])]


def _models(pair: tuple[str, str]) -> str:
    """The models that `_who` leaves out."""
    return ", ".join(dict.fromkeys(model for name in pair if (model := str(name).partition(":")[2])))


def _who(name: str) -> str:
    """`vlm:some-model` as `vlm`; the model stands in the table of pairs."""
    return str(name).partition(":")[0]


def _reasons(codes: pd.Series, meanings: Mapping[str, str]) -> list[Row]:
    counts: Iterable[tuple[Any, int]] = codes.dropna().value_counts().items()
    return [{"code": str(code), "meaning": meanings.get(str(code), ""), "n": int(n)} for code, n in counts]


def _concept(row: Row) -> Row:
    proposed = row.get("proposed_for")
    return {
        "concept_id": row["concept_id"],
        "name": row["name"],
        "definition": row["definition"],
        "group": None if pd.isna(row["group"]) else row["group"],
        "origin": row["origin"],
        "proposed_for": [] if proposed is None else [str(p) for p in proposed],
    }


def _label_counts(labels: pd.DataFrame) -> dict[str, Row]:
    grouped = labels.assign(
        said=labels["present"].notna(), yes=labels["present"].astype("boolean").fillna(False).astype(bool)
    ).groupby("concept_id")
    table = grouped.agg(
        n=("said", "size"), n_said=("said", "sum"), n_yes=("yes", "sum"), disagreement=("disagreement", "mean")
    )
    table["prevalence"] = table["n_yes"] / table["n_said"].where(table["n_said"] > 0)
    table["abstained"] = 1 - table["n_said"] / table["n"]
    return {str(concept_id): row for concept_id, row in table.to_dict("index").items()}


def _by_concept(frame: pd.DataFrame | None) -> dict[str, Row]:
    if not present(frame):
        return {}
    return {str(row["concept_id"]): row for row in frame.to_dict("records")}


def _look(row: Row, leak_flagged: bool) -> list[str]:
    found = []
    if words.known(row["kappa"]) and row["kappa"] < LOOK_KAPPA:
        found.append("low agreement")
    if leak_flagged or (words.known(row["leak"]) and row["leak"] > LOOK_LEAK):
        found.append("follows the class")
    if words.known(row.get("abstained")) and row["abstained"] > LOOK_ABSTAINED:
        found.append("often undecided")
    prevalence: Any = row.get("prevalence")
    if words.known(prevalence) and not LOOK_RARE <= float(prevalence) <= 1 - LOOK_RARE:
        found.append("nearly constant")
    return found
