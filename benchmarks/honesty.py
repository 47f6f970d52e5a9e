"""Are concepts that were answered at random, or from the class only, found out, and real ones left alone?

A simulated vision-language model answers the expert attributes of wbcatt (sensitivity 0.75-0.95, specificity
0.5-0.85 per concept, errors independent). Two of its 31 columns are replaced: one is answered at random, one from the
class only. The embedded aligner's heads are fitted to all of it, cross-fitted, and every concept takes the honesty
test and the leak test. Experts' answers are used for simulating only; the tests see no class of the test split.

    python benchmarks/honesty.py [--data ../shared/data] [--cache FOLDER] [--seeds 5] [--first-seed 0]

The tests were designed on the seeds 100-102. Seed 4 then showed that DeLong's interval alone is too narrow, so the
seeds 0-4 have been looked at once; 10-14 have not.

The second table is the ceiling: the class-only column with more and more independent errors, beside the real columns
that a test strict enough to find it would refuse too. With the errors of the simulated model itself, such a column has
the same distribution as an honest one: wbcatt's red granules are present in all eosinophils and in no other cell.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from label_trust import Sheet

from annotation.alignment.adapt import fold_of
from annotation.alignment.controls import N_PERMUTATIONS, Controls, fitted_controls
from annotation.alignment.inputs import cell_source
from annotation.alignment.options import AlignOptions
from annotation.trust.honesty import Verdict, count_nulls, honesty_table, verdicts
from annotation.trust.leaks import LeakOptions, class_leak
from annotation.votes import Votes

ERROR_RATES = (0.0, 0.02, 0.05, 0.1)
LIMITS = (0.9, 0.7, 0.5, 0.3, 0.0)

Flaws = Callable[[np.ndarray, np.random.Generator], np.ndarray]


class Bench:
    """Images, their features and classes."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.sheet = Sheet(folder, cache)
        table = pd.read_csv(folder / "labels.csv")
        self.label = table["label"].to_numpy(object)
        self.images = pd.DataFrame(
            {"image_id": self.sheet.image_ids, "label": self.label, "split": table["split"], "rejected": None}
        )
        seen = zip(self.sheet.image_ids, self.label, ~self.sheet.is_test, strict=True)
        self.known_labels = {image_id: label for image_id, label, known in seen if known}
        self.features = self._features(cache)

    def _features(self, cache: Path) -> np.ndarray:
        source = cell_source(self.sheet.read, AlignOptions(), cache)
        parts = [(ids, cells.astype(np.float32).mean((1, 2))) for ids, cells in source.shards(self.sheet.image_ids)]
        found = {i: row for ids, rows in parts for i, row in zip(ids, rows, strict=True)}
        return np.stack([found[i] for i in self.sheet.image_ids])

    def planted(self, seed: int, flawed: Flaws | None = None) -> tuple[np.ndarray, int, int]:
        """(n, 31) answers, the column that is answered at random and the one answered from the class only."""
        answers = recall_heavy(self.sheet.truth, np.random.default_rng(seed))
        rng = np.random.default_rng([seed, 1])
        at_random, from_class = rng.choice(answers.shape[1], 2, replace=False)
        answers[:, at_random] = rng.random(len(answers)) < rng.uniform(0.2, 0.7)
        classes = np.unique(self.label)
        chosen = rng.choice(classes, rng.integers(1, len(classes)), replace=False)
        rule = np.isin(self.label, chosen).astype(float)
        answers[:, from_class] = rule if flawed is None else flawed(rule, rng)
        return answers, int(at_random), int(from_class)

    def controls(self, answers: np.ndarray, seed: int, n_permutations: int = N_PERMUTATIONS) -> Controls:
        """Scores and nulls of heads fitted to the answers."""
        options = AlignOptions(seed=seed)
        votes = Votes(answers.astype(np.float32), np.ones(answers.shape, np.float32))
        folds = fold_of(self.sheet.image_ids, options.n_folds, seed)
        return fitted_controls(
            self.sheet.image_ids,
            self.features,
            votes,
            folds,
            options.n_folds,
            labels=self.known_labels,
            seed=seed,
            n_permutations=n_permutations,
        )

    def verdicts(self, controls: Controls) -> tuple[pd.DataFrame, np.ndarray]:
        """The honesty table and which concepts fail it."""
        ids = self.sheet.vocabulary(grouped=False).ids
        table = honesty_table(count_nulls(controls.own, controls.answers, controls.nulls, strata=controls.folds), ids)
        said = verdicts(table)
        return table, np.array([said[i] == Verdict.FAILS for i in ids])

    def leaks(self, answers: np.ndarray, controls: Controls, options: LeakOptions | None = None) -> pd.DataFrame:
        """The leak table, one row a concept in order."""
        vocabulary = self.sheet.vocabulary(grouped=False)
        ledger = pd.DataFrame(
            {
                "image_id": np.repeat(self.sheet.image_ids, len(vocabulary)),
                "concept_id": np.tile(vocabulary.ids, len(answers)),
                "witness": "vlm",
                "witness_model": "simulated",
                "state": np.where(answers.ravel() > 0, "present", "absent"),
            }
        )
        found = class_leak(ledger, self.images, options, scores=controls.scores(vocabulary))
        return found.set_index("concept_id").loc[list(vocabulary.ids)].reset_index()


def one_seed(bench: Bench, seed: int) -> dict[str, object]:
    answers, at_random, from_class = bench.planted(seed)
    controls = bench.controls(answers, seed)
    table, fails = bench.verdicts(controls)
    leaks = bench.leaks(answers, controls)
    refused = leaks["refused"].to_numpy(bool)
    real = np.ones(len(fails), bool)
    real[[at_random, from_class]] = False
    permuted = table[table["null"] == "permutation"]["difference"].to_numpy()
    shuffled = table[table["null"] == "shuffled"]["difference"].to_numpy()
    wrongly = [bench.sheet.names[k][0] for k in np.flatnonzero((fails | refused) & real)]
    return {
        "seed": seed,
        "random: found by": _by(fails[at_random], refused[at_random]),
        "its difference": f"{permuted[at_random]:+.3f}",
        "class only: found by": _by(fails[from_class], refused[from_class]),
        "explained": f"{leaks.loc[from_class, 'explained_fraction']:.2f}",
        "least difference of real": f"{permuted[real].min():+.3f} / {shuffled[real].min():+.3f}",
        "most explained of real": f"{leaks.loc[real, 'explained_fraction'].max():.2f}",
        "false refusals of 29": f"{len(wrongly)} {'; '.join(wrongly)}".strip(),
    }


def _by(fails: bool, refused: bool) -> str:
    return " and ".join(["fails_null_test"] * bool(fails) + ["leaks_class"] * bool(refused)) or "NOT FOUND"


def ceiling(bench: Bench, seeds: range) -> pd.DataFrame:
    """Share of seeds in which the class-only column is refused, by its errors and the limit; and real ones refused."""
    found = np.zeros((len(ERROR_RATES) + 1, len(LIMITS)))
    wrongly = np.zeros((len(ERROR_RATES) + 1, len(LIMITS)))
    flaws: list[tuple[str, Flaws]] = [(f"{rate:.0%} errors", partial(_flipped, rate)) for rate in ERROR_RATES]
    flaws.append(("the model's own errors", _own_errors))
    for seed in seeds:
        for i, (_, flawed) in enumerate(flaws):
            answers, at_random, from_class = bench.planted(seed, flawed)
            controls = bench.controls(answers, seed, 0)
            for j, limit in enumerate(LIMITS):
                options = LeakOptions(max_explained_fraction=max(limit, 1e-9))
                refused = bench.leaks(answers, controls, options)["refused"].to_numpy(bool).copy()
                found[i, j] += refused[from_class] / len(seeds)
                refused[[at_random, from_class]] = False
                wrongly[i, j] += refused.sum() / len(seeds)
    shown = [[f"{f:.1f} ({w:.1f})" for f, w in zip(*rows, strict=True)] for rows in zip(found, wrongly, strict=True)]
    return pd.DataFrame(shown, [name for name, _ in flaws], [f"limit {limit}" for limit in LIMITS])


def _flipped(rate: float, rule: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.where(rng.random(len(rule)) < rate, 1 - rule, rule)


def recall_heavy(truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Answers of a judge with high recall and poor precision, errors independent, to (n, K) truths."""
    n_concepts = truth.shape[1]
    sensitivity, specificity = rng.uniform(0.75, 0.95, n_concepts), rng.uniform(0.5, 0.85, n_concepts)
    draw = rng.random(truth.shape)
    return np.where(truth > 0, draw < sensitivity, draw > specificity).astype(float)


def _own_errors(rule: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return recall_heavy(rule[:, None], rng)[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("MEDMICN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "medmicn-benchmarks")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--ceiling-seeds", type=int, default=2, help="seeds of the second table; 0 leaves it out")
    options = parser.parse_args()
    bench = Bench(options.data / "wbcatt", options.cache)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    print("Two planted columns among 29 real ones (differences: least over permutation / shuffled nulls)")
    print(pd.DataFrame([one_seed(bench, seed) for seed in seeds]).to_string(index=False), flush=True)
    if options.ceiling_seeds:
        print("\nClass-only column with independent errors: share of seeds refused (false refusals of 29), by limit")
        print(ceiling(bench, seeds[: options.ceiling_seeds]).to_string())


if __name__ == "__main__":
    main()
