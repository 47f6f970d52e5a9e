"""How good are labels fused from noisy judges, alignment fitted to them, and a handful of expert answers?

Simulated vision-language models answer the expert attributes of wbcatt, one answer a cell, without being shown
anything else:

* `recall-heavy`: per concept a sensitivity of 0.75-0.95 and a specificity of 0.5-0.85, errors independent.
* `class-biased`: the same, but per concept half of the classes are believed to have it (sensitivity + 0.1,
  specificity - 0.2) and the others not (sensitivity - 0.15, specificity + 0.2): errors follow the class.
* `two correlated`: two judges with the same rates; on 70 % of the cells the second one's luck is the first one's.
* `planted`: recall-heavy, but one concept is answered at random and one from the class alone (present in classes
  where most images have it). Their labels are part of all measures.
* `embedded`: not simulated. The embedded vision-language model judges the names of the experts' 31 attribute values
  as it is; most of them it cannot measure, and calls uncertain. Its own proposals have other words, which no answer
  sheet is for. Seeds differ in folds and audited cells only.

The embedded aligner's heads are fitted to those answers, cross-fitted, and then all is fused. Audited cells are drawn
at random from the training and validation images, enter the ledger as the witness `expert`, and heads are fitted
again with them. The experts' answers are used for nothing else but scoring on the test split. Fused labels are asked
for a precision of 0.90 (`labels.min_precision`), expected, or held against the audited cells as `medmicn fuse` does.

    python benchmarks/label_trust.py [--data ../shared/data] [--cache FOLDER] [--seeds 5] [--scenario NAME ...]

Rows of crowd-kit and cleanlab appear where these packages are installed. The first run computes image features (a
few minutes on 2 cores) and keeps them in the cache folder. The constants of the label model were chosen on the
training and validation images of runs with the seeds 101 and 102.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import re
import tempfile
from dataclasses import replace
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
from embedded_vlm_wbcatt import judged
from label_trust_measures import measures
from PIL import Image

from annotation.alignment.adapt import cross_fit, fold_of
from annotation.alignment.features import CellStore
from annotation.alignment.options import AlignOptions
from annotation.alignment.source import CellSource
from annotation.alignment.towers import load_aligner
from annotation.trust.calls import HeldOut, fit_calls, held_out_labels
from annotation.trust.cuts import otsu_cut
from annotation.trust.expert_cells import expert_cells
from annotation.trust.fuse import FuseOptions, learn_fusion
from annotation.votes import matrix, training_votes
from data_contracts.concepts import Concept, Vocabulary, slug
from pipeline.import_labels import given_concepts

N_FOLDS = 5
SCENARIOS = ("recall-heavy", "class-biased", "two correlated", "planted", "embedded")
AUDITED = {"no audit": 0.0, "1 % audited": 0.01, "5 % audited": 0.05}
SAME_LUCK = 0.7
ASKED_PRECISION = 0.9
Rows = dict[str, dict[str, float]]
"""Method → measure → value."""


class Sheet:
    """The expert attributes of wbcatt as one binary concept per value."""

    def __init__(self, folder: Path, cache: Path) -> None:
        labels = pd.read_csv(folder / "labels.csv")
        attributes = pd.read_csv(folder / "expert_attributes.csv").set_index("path").loc[labels["path"]]
        values = [(name, value) for name in attributes for value in sorted(attributes[name].dropna().unique())]
        self.folder, self.cache = folder, cache
        self.image_ids = [hashlib.sha256(path.encode()).hexdigest() for path in labels["path"]]
        self.path = dict(zip(self.image_ids, labels["path"], strict=True))
        self.is_test = (labels["split"] == "test").to_numpy()
        self.classes = labels["label"].astype("category").cat.codes.to_numpy()
        self.truth = np.stack([(attributes[name] == value).to_numpy(float) for name, value in values], 1)
        self.names = [(f"{name.replace('_', ' ')}: {value}", name) for name, value in values]

    def vocabulary(self, *, grouped: bool) -> Vocabulary:
        """One concept per attribute value; with groups, the values of an attribute exclude each other."""
        return Vocabulary.of(Concept(slug(n), n, group=group if grouped else None) for n, group in self.names)

    def read(self, image_id: str) -> np.ndarray:
        """The pixels of an image."""
        return np.asarray(Image.open(self.folder / self.path[image_id]).convert("RGB"))

    @cached_property
    def features(self) -> np.ndarray:
        """(N, F) mean cell of every image, as the embedded aligner sees it."""
        aligner, options = load_aligner("embedded"), AlignOptions()
        kept = self.cache / f"wbcatt-mean-cells-{aligner.fingerprint[:16]}.npy"
        if not kept.exists():
            folder = self.cache / "cells" / aligner.fingerprint[:16]
            store = CellStore(folder, aligner.cell_shape[-1], max_bytes=4_000_000_000)
            source = CellSource(aligner, self.read, store, options, lambda _: None, None)
            found = {
                i: c for ids, cells in source.shards(self.image_ids) for i, c in zip(ids, mean(cells), strict=True)
            }
            np.save(kept, np.stack([found[i] for i in self.image_ids]))
        return np.load(kept)


def mean(cells: np.ndarray) -> np.ndarray:
    return cells.astype(np.float32).mean((1, 2))


def embedded_judgements(sheet: Sheet) -> pd.DataFrame:
    """What the embedded vision-language model says of all images and concepts; kept in the cache folder."""
    kept = sheet.cache / "wbcatt-embedded-vlm.parquet"
    if not kept.exists():
        paths = [sheet.path[i] for i in sheet.image_ids]
        found = asyncio.run(judged(paths, sheet.folder, sheet.folder / "expert_attributes.csv"))
        found[["image_id", "concept_id", "state", "probability"]].to_parquet(kept)
    found = pd.read_parquet(kept)
    given = given_concepts(sheet.folder / "expert_attributes.csv")
    # Both name an attribute's value; only the words between them differ.
    own = {plain(name): id_ for (name, _), id_ in zip(sheet.names, sheet.vocabulary(grouped=False).ids, strict=True)}
    concept = {row.concept_id: own[plain(row.name)] for row in given.itertuples(index=False)}
    image = {path: image_id for image_id, path in sheet.path.items()}
    return found.assign(
        image_id=found["image_id"].map(image),
        concept_id=found["concept_id"].map(concept),
        witness="vlm",
        witness_model="embedded",
    )


def plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def votes_of_embedded(sheet: Sheet, judgements: pd.DataFrame) -> np.ndarray:
    """(N, K) 1 present, 0 absent, NaN for what it cannot tell."""
    value = judgements["state"].map({"present": 1.0, "absent": 0.0})
    vocabulary = sheet.vocabulary(grouped=False)
    return matrix(judgements.assign(value=value), "value", sheet.image_ids, vocabulary).astype(float)


def judges(sheet: Sheet, scenario: str, rng: np.random.Generator) -> list[np.ndarray]:
    """(N, K) answers of every judge."""
    if scenario == "embedded":
        return [votes_of_embedded(sheet, embedded_judgements(sheet))]
    truth, n_concepts = sheet.truth, sheet.truth.shape[1]
    sensitivity, specificity = rng.uniform(0.75, 0.95, n_concepts), rng.uniform(0.5, 0.85, n_concepts)
    if scenario == "class-biased":
        believed = (rng.random((sheet.classes.max() + 1, n_concepts)) < 0.5)[sheet.classes]
        sensitivity = np.where(believed, np.minimum(sensitivity + 0.1, 0.99), sensitivity - 0.15)
        specificity = np.where(believed, specificity - 0.2, np.minimum(specificity + 0.2, 0.98))
    luck = [rng.random(truth.shape)]
    if scenario == "two correlated":
        luck.append(np.where(rng.random(truth.shape) < SAME_LUCK, luck[0], rng.random(truth.shape)))
    votes = [np.where(truth > 0, draw < sensitivity, draw > specificity).astype(float) for draw in luck]
    if scenario == "planted":
        at_random, by_class = rng.choice(n_concepts, 2, replace=False)
        votes[0][:, at_random] = rng.random(len(truth)) < 0.5
        share = pd.Series(truth[:, by_class]).groupby(sheet.classes).mean()
        votes[0][:, by_class] = (share > share.median())[sheet.classes]
    return votes


def ledger(sheet: Sheet, scenario: str, votes: list[np.ndarray], audited: np.ndarray) -> pd.DataFrame:
    """Judgements of all judges, and of the expert where `audited`."""
    expert = ("expert", "answer sheet", np.where(audited, sheet.truth, np.nan))
    if scenario == "embedded":
        # As they are: with what it measured, and what it calls uncertain.
        return pd.concat([embedded_judgements(sheet), rows_of(sheet, [expert])], ignore_index=True)
    return rows_of(sheet, [*(("vlm", f"simulated {n}", vote) for n, vote in enumerate(votes)), expert])


def rows_of(sheet: Sheet, said: list[tuple[str, str, np.ndarray]]) -> pd.DataFrame:
    """Judgements by (witness, model, (N, K) answers); NaN is no answer."""
    ids = sheet.vocabulary(grouped=False).ids
    parts = [
        pd.DataFrame(
            {
                "image_id": np.repeat(sheet.image_ids, len(ids)),
                "concept_id": np.tile(ids, len(sheet.image_ids)),
                "witness": witness,
                "witness_model": model,
                "state": np.where(vote.ravel() > 0, "present", "absent"),
                "probability": np.nan,
            }
        )[np.isfinite(vote.ravel())]
        for witness, model, vote in said
    ]
    return pd.concat(parts, ignore_index=True)


def aligned(sheet: Sheet, judgements: pd.DataFrame, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, K) score and probability of the embedded aligner's cross-fitted heads."""
    votes = training_votes(judgements, sheet.image_ids, sheet.vocabulary(grouped=False))
    folds = fold_of(sheet.image_ids, N_FOLDS, seed)
    fit = cross_fit(sheet.features, votes, folds, N_FOLDS)
    probability = np.zeros_like(fit.held_out)
    for fold in range(N_FOLDS):
        probability[folds == fold] = fit.probability(fit.held_out[folds == fold], fold)
    return fit.held_out, probability


def one_run(sheet: Sheet, scenario: str, seed: int) -> Rows:
    rng = np.random.default_rng([seed, SCENARIOS.index(scenario)])
    votes = judges(sheet, scenario, rng)
    may_audit = np.repeat(~sheet.is_test[:, None], sheet.truth.shape[1], 1)
    order = rng.permutation(np.flatnonzero(may_audit))
    rows: Rows = {}
    for name, share in AUDITED.items():
        audited = np.zeros(sheet.truth.shape, bool)
        audited.ravel()[order[: round(share * len(order))]] = True
        judgements = ledger(sheet, scenario, votes, audited)
        score, probability = aligned(sheet, judgements, seed)
        if not share:
            rows |= comparisons(sheet, votes, score, probability)
        rows |= fused_rows(sheet, judgements, probability, name)
    return rows


def fused_rows(sheet: Sheet, judgements: pd.DataFrame, probability: np.ndarray, name: str) -> Rows:
    kinds = {"fused": False, "fused, attributes exclusive": True}
    return {
        f"{kind}, {name}": of_labels(sheet, fused(sheet, judgements, probability, grouped=grouped), grouped=grouped)
        for kind, grouped in kinds.items()
    }


def fused(sheet: Sheet, judgements: pd.DataFrame, probability: np.ndarray, *, grouped: bool) -> pd.DataFrame:
    """LABELS as the fuse step makes them: nothing is learned from the test split."""
    vocabulary = sheet.vocabulary(grouped=grouped)
    learn_from = [i for i, test in zip(sheet.image_ids, sheet.is_test, strict=True) if not test]
    scores = pd.DataFrame(
        {
            "image_id": np.repeat(sheet.image_ids, len(vocabulary)),
            "concept_id": np.tile(vocabulary.ids, len(sheet.image_ids)),
            "similarity": np.nan,
            "probability": probability.ravel(),
        }
    )
    options = FuseOptions(min_precision=ASKED_PRECISION)
    fusion = learn_fusion(judgements, scores, vocabulary, options, learn_from=learn_from)
    cells = expert_cells(judgements, None, vocabulary)
    if len(cells):
        held_out = held_out_labels(HeldOut(judgements, scores, learn_from=learn_from), vocabulary, options, cells)
        fusion = replace(fusion, calls=fit_calls(fusion, cells, held_out))
    return fusion.labels(judgements, scores)


def comparisons(sheet: Sheet, votes: list[np.ndarray], score: np.ndarray, probability: np.ndarray) -> Rows:
    """What else one could do with the same answers, none audited; the paper's rule is Otsu's cut of the heads."""
    cuts = np.array([otsu_cut(column) for column in score[~sheet.is_test].T])
    by_rule = (score > cuts).astype(float)
    said = np.mean(votes, 0)
    silent, said = np.isnan(said), np.nan_to_num(said, nan=0.5)
    probability = np.nan_to_num(probability, nan=0.5)  # of what no judge ever answered
    total = probability + said
    rows = {
        "VLM alone": numbers(sheet, said, np.where(silent, np.nan, said > 0.5)),
        "alignment, Otsu's threshold (paper)": numbers(sheet, score, by_rule),
        "regularised probe": numbers(sheet, probability, (probability > 0.5).astype(float), probability),
        "plain sum of probe and vote": numbers(sheet, total, (total > 1).astype(float)),
    }
    voters = [*votes, by_rule]
    if find_spec("crowdkit"):
        rows |= crowd_rows(sheet, voters)
    if find_spec("cleanlab"):
        rows["confident learning (cleanlab)"] = confident_row(sheet, said, probability)
    return rows


def crowd_rows(sheet: Sheet, voters: list[np.ndarray]) -> Rows:
    """crowd-kit's aggregates of the judges and of the paper's rule."""
    crowd = import_module("crowdkit.aggregation")
    found = {"majority vote (crowd-kit)": crowd.MajorityVote(), "Dawid-Skene (crowd-kit)": crowd.DawidSkene(n_iter=30)}
    rows: Rows = {}
    for name, method in found.items():
        columns = []
        for k in range(sheet.truth.shape[1]):
            long = pd.concat(
                pd.DataFrame({"task": range(len(v)), "worker": str(j), "label": v[:, k]})
                .dropna()
                .astype({"label": int})
                for j, v in enumerate(voters)
            )
            share = method.fit_predict_proba(long).sort_index()
            columns.append(share[1].to_numpy() if 1 in share else np.zeros(len(share)))
        p = np.stack(columns, 1)
        rows[name] = numbers(sheet, p, (p > 0.5).astype(float), p)
    return rows


def confident_row(sheet: Sheet, said: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    """The vote, turned round where cleanlab finds it wrong in the light of the probe; ranked by its sum with that."""
    find_label_issues = import_module("cleanlab.filter").find_label_issues
    called = (said > 0.5).astype(int)
    for k in range(called.shape[1]):
        both = np.stack([1 - probability[:, k], probability[:, k]], 1)
        called[:, k] ^= find_label_issues(called[:, k], both, n_jobs=1)
    return numbers(sheet, called + probability, called.astype(float))


def of_labels(sheet: Sheet, labels: pd.DataFrame, *, grouped: bool) -> dict[str, float]:
    vocabulary = sheet.vocabulary(grouped=grouped)
    probability = matrix(labels, "probability", sheet.image_ids, vocabulary)
    present = matrix(labels, "present", sheet.image_ids, vocabulary)
    return numbers(sheet, probability, present, probability)


def numbers(
    sheet: Sheet, score: np.ndarray, called: np.ndarray, probability: np.ndarray | None = None
) -> dict[str, float]:
    """Measures on the test split."""
    test = sheet.is_test
    return measures(sheet.truth[test], score[test], called[test], None if probability is None else probability[test])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("MEDMICN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "medmicn-benchmarks")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=SCENARIOS)
    options = parser.parse_args()
    sheet = Sheet(options.data / "wbcatt", options.cache)
    print(f"wbcatt, {len(sheet.names)} concepts, {sheet.is_test.sum()} test images, {options.seeds} seeds: mean ± sd")
    for scenario in options.scenario:
        found = [pd.DataFrame(one_run(sheet, scenario, seed)).T for seed in range(options.seeds)]
        table = pd.concat(found, keys=range(options.seeds)).groupby(level=1, sort=False)
        average, deviation = table.mean(), table.std(ddof=0)
        shown = average.map("{:.3f}".format) + " ± " + deviation.map("{:.3f}".format)
        print(f"\n{scenario}\n{shown.where(average.notna(), '').to_string()}", flush=True)


if __name__ == "__main__":
    main()
