"""Do the audit's 95 % intervals hold the true kappa as often as they say?

The expert attributes of wbcatt are the truth; a simulated vision-language model answers from it with a sensitivity of
0.75-0.95 and a specificity of 0.5-0.85 per concept, an alignment score ranks with an AUROC of about 0.88, and both are
fused. Audits of several sizes are drawn, answered from the truth and scored; the true kappa is that over all cells the
audit draws from. With `--rounds 2` half of the cells are asked in a second, adaptive round.

    python benchmarks/audit_coverage.py [--data ../shared/data] [--audits 200] [--cells 200 400 620 1550] [--rounds 1]

Takes two to four minutes a size on 2 cores. The rows below the first are the alternatives that were tried.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t as student
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from annotation.trust.agreement import FUSED, Interval, Source, kappa_interval
from annotation.trust.audit import AuditOptions, advice, answered_cells, samples_of
from annotation.trust.draw import DrawOptions, draw
from annotation.trust.fuse import fuse
from annotation.trust.intervals import Sample, audited, table_numbers, weighted_table
from annotation.votes import matrix
from data_contracts.concepts import Concept, Vocabulary, slug

CHOSEN = "Beta posterior, pooled design effect (chosen)"
N_WORLDS = 5
N_BOOTSTRAP = 300


class Sheet:
    """The expert attributes of wbcatt as one binary concept per value."""

    def __init__(self, folder: Path) -> None:
        self.labels = pd.read_csv(folder / "labels.csv")
        attributes = pd.read_csv(folder / "expert_attributes.csv").set_index("path").loc[self.labels["path"]]
        values = [(name, value) for name in attributes for value in sorted(attributes[name].dropna().unique())]
        self.image_ids = [hashlib.sha256(path.encode()).hexdigest() for path in self.labels["path"]]
        self.is_test = (self.labels["split"] == "test").to_numpy()
        self.truth = np.stack([(attributes[name] == value).to_numpy(float) for name, value in values], 1)
        self.names = [f"{name.replace('_', ' ')}: {value}" for name, value in values]

    def vocabulary(self) -> Vocabulary:
        """One concept per attribute value."""
        return Vocabulary.of(Concept(slug(name), name) for name in self.names)


def simulated_vlm(sheet: Sheet, seed: int) -> tuple[np.ndarray, pd.DataFrame]:
    """(votes, judgements) of a judge with high recall and poor precision."""
    rng = np.random.default_rng(seed)
    n_concepts = sheet.truth.shape[1]
    sensitivity, specificity = rng.uniform(0.75, 0.95, n_concepts), rng.uniform(0.5, 0.85, n_concepts)
    chance = rng.random(sheet.truth.shape)
    votes = np.where(sheet.truth > 0, chance < sensitivity, chance > specificity).astype(float)
    judgements = pd.DataFrame(
        {
            "image_id": np.repeat(sheet.image_ids, n_concepts),
            "concept_id": np.tile(sheet.vocabulary().ids, len(sheet.image_ids)),
            "witness": "vlm",
            "witness_model": "simulated",
            "state": np.where(votes.ravel() > 0, "present", "absent"),
            "probability": np.nan,
        }
    )
    return votes, judgements


class World:
    """One simulated machine: its labels, and the truth over the cells that audits draw from."""

    def __init__(self, sheet: Sheet, seed: int) -> None:
        self.vocabulary = sheet.vocabulary()
        votes, judgements = simulated_vlm(sheet, seed)
        rng = np.random.default_rng(1000 + seed)
        similarity = 1.7 * sheet.truth + rng.normal(size=sheet.truth.shape)
        scores = judgements[["image_id", "concept_id"]].assign(similarity=similarity.ravel(), probability=np.nan)
        self.labels = fuse(judgements, scores, self.vocabulary)
        self.images = pd.DataFrame(
            {
                "image_id": sheet.image_ids,
                "path": sheet.labels["path"],
                "label": sheet.labels["label"],
                "split": sheet.labels["split"],
                "rejected": None,
            }
        )
        self.image_ids = np.asarray(sheet.image_ids, object)
        present = matrix(self.labels, "present", self.image_ids, self.vocabulary)
        probability = matrix(self.labels, "probability", self.image_ids, self.vocabulary)
        self.sources = {"vlm": Source(votes, votes), FUSED: Source(present, probability)}
        self.truth = pd.Series(sheet.truth.ravel(), pd.MultiIndex.from_product([sheet.image_ids, self.vocabulary.ids]))
        drawn_from = ~sheet.is_test
        self.kappa = {
            name: self._true(sheet, s.answers, drawn_from, cohen_kappa_score) for name, s in self.sources.items()
        }
        self.auroc = {name: self._true(sheet, s.score, drawn_from, roc_auc_score) for name, s in self.sources.items()}

    @staticmethod
    def _true(sheet: Sheet, said: np.ndarray, rows: np.ndarray, measure: Callable[..., float]) -> list[float]:
        columns = zip(sheet.truth[rows].T, said[rows].T, strict=True)
        return [float(measure(t[np.isfinite(s)], s[np.isfinite(s)])) for t, s in columns]

    def answered(self, cells: pd.DataFrame) -> pd.DataFrame:
        """The drawn cells with the expert's answers."""
        keys = pd.MultiIndex.from_frame(cells[["image_id", "concept_id"]])
        return cells.assign(answer=np.where(self.truth.loc[keys].to_numpy() > 0, "present", "absent"))

    def samples(self, cells: pd.DataFrame, witness: str) -> list[Sample]:
        """One witness's answers on the cells, per concept."""
        found = answered_cells(cells, self.vocabulary)
        return samples_of(found, self.sources[witness], self.image_ids, self.vocabulary)

    def audit(self, n_cells: int, seed: int, n_rounds: int) -> pd.DataFrame:
        """Answered cells of an audit in one round, or with later rounds on what is undecided."""
        options = DrawOptions(n_cells=n_cells // n_rounds, seed=seed)
        cells = self.answered(draw(lambda: [self.labels], self.images, self.vocabulary, options))
        for _ in range(n_rounds - 1):
            told = [advice(found, AuditOptions())["n_more_cells"] for found in audited(self.samples(cells, FUSED))]
            need = {c: float(n or 0) ** 0.5 for c, n in zip(self.vocabulary.ids, told, strict=True)}
            more = draw(lambda: [self.labels], self.images, self.vocabulary, options, asked=cells, need=need)
            cells = pd.concat([cells, self.answered(more)], ignore_index=True)
        return cells


# ---- the alternatives --------------------------------------------------------------------------------------


def scaled(sample: Sample) -> np.ndarray:
    """The weighted table, scaled to Kish's effective number of cells."""
    table = np.asarray(weighted_table(sample))
    return table * table.sum() / (sample.weight**2).sum()


def fleiss(sample: Sample, pooled: np.ndarray, rng: np.random.Generator, n_added: float = 0) -> Interval:
    return kappa_interval(*(scaled(sample) + n_added * pooled))


def fleiss_added(sample: Sample, pooled: np.ndarray, rng: np.random.Generator) -> Interval:
    return fleiss(sample, pooled, rng, n_added=2)


def linearised(sample: Sample, pooled: np.ndarray, rng: np.random.Generator) -> Interval:
    """Taylor's linearisation with the stratified variance, and Student's t with the design's degrees of freedom."""
    table = np.asarray(weighted_table(sample)) / sample.weight.sum()
    kappa, step = kappa_of(table), 1e-5
    gradient = np.array([(kappa_of(table + step * np.eye(4)[j]) - kappa) / step for j in range(4)])
    part = sample.weight * gradient[kinds_of(sample)] / sample.weight.sum()
    variance, freedom = 0.0, 0
    for stratum in np.unique(sample.stratum):
        values = part[sample.stratum == stratum]
        n = len(values)
        variance += n * values.var(ddof=1) if n > 1 else values[0] ** 2
        freedom += n - 1
    reach = student.ppf(0.975, max(freedom, 1)) * np.sqrt(variance)
    return Interval(kappa, max(kappa - reach, -1), min(kappa + reach, 1))


def bootstrap(sample: Sample, pooled: np.ndarray, rng: np.random.Generator) -> Interval:
    """Percentiles over resampling within strata."""
    times = np.zeros((N_BOOTSTRAP, len(sample.said)))
    for stratum in np.unique(sample.stratum):
        here = np.flatnonzero(sample.stratum == stratum)
        times[:, here] = rng.multinomial(len(here), np.full(len(here), 1 / len(here)), N_BOOTSTRAP)
    weight = times * sample.weight
    kinds = kinds_of(sample)
    return percentiles(np.stack([weight[:, kinds == kind].sum(1) for kind in range(4)]))


def dirichlet(sample: Sample, pooled: np.ndarray, rng: np.random.Generator) -> Interval:
    """Dirichlet posterior of the whole table with Kish's number of cells and two cells of pooled prior."""
    return percentiles(rng.dirichlet(scaled(sample) + 2 * pooled + 1e-3, 1000).T)


def dirichlet_strata(sample: Sample, pooled: np.ndarray, rng: np.random.Generator) -> Interval:
    """A Dirichlet posterior in every stratum, one cell of prior each."""
    total = np.zeros((1000, 4))
    for stratum in np.unique(sample.stratum):
        here = Sample(*(values[sample.stratum == stratum] for values in sample))
        total += here.weight.sum() * rng.dirichlet(scaled(here) + pooled + 1e-3, 1000)
    return percentiles(total.T)


ALTERNATIVES: dict[str, Callable[[Sample, np.ndarray, np.random.Generator], Interval]] = {
    "Fleiss-Cohen-Everitt, Kish's n (before)": fleiss,
    "the same, two pooled cells added": fleiss_added,
    "linearised, stratified, Student's t": linearised,
    "stratified bootstrap, percentiles": bootstrap,
    "Dirichlet of the table, Kish's n, pooled prior": dirichlet,
    "Dirichlet per stratum, pooled prior": dirichlet_strata,
}


def kinds_of(sample: Sample) -> np.ndarray:
    """0 both present, 1 only the witness, 2 only the expert, 3 none."""
    return np.where(sample.said > 0.5, np.where(sample.true > 0.5, 0, 1), np.where(sample.true > 0.5, 2, 3))


def kappa_of(table: np.ndarray) -> float:
    return float(table_numbers(*table)["kappa"])


def percentiles(tables: np.ndarray) -> Interval:
    kappa = table_numbers(*tables)["kappa"]
    kappa = kappa[np.isfinite(kappa)]
    low, high = np.quantile(kappa, (0.025, 0.975)) if len(kappa) else (np.nan, np.nan)
    return Interval(float("nan"), float(low), float(high))


# ---- the measurement ---------------------------------------------------------------------------------------


def measured(worlds: Sequence[World], n_cells: int, n_audits: int, n_rounds: int) -> pd.DataFrame:
    """One row per witness, measure and method and concept of every audit: the interval and the true value."""
    rows = []
    for number in range(n_audits):
        world = worlds[number % len(worlds)]
        cells = world.audit(n_cells, number, n_rounds)
        rng = np.random.default_rng(number)
        for witness in world.sources:
            samples = world.samples(cells, witness)
            found = audited(samples)
            tables = [np.asarray(weighted_table(s)) / s.weight.sum() for s in samples if len(s.said)]
            pooled = np.mean(tables, axis=0)
            for k, sample in enumerate(samples):
                true = world.kappa[witness][k]
                rows.append((witness, "kappa", CHOSEN, true, found[k].kappa))
                rows.append((witness, "auroc", "log-odds of Hanley-McNeil", world.auroc[witness][k], found[k].auroc))
                if len(sample.said):
                    rows += [(witness, "kappa", n, true, f(sample, pooled, rng)) for n, f in ALTERNATIVES.items()]
    return pd.DataFrame(
        [(w, m, name, t, i.low, i.high) for w, m, name, t, i in rows],
        columns=["witness", "measure", "method", "true", "low", "high"],
    )


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """Coverage and width by method; an interval that is undefined is not counted, but its share is shown."""
    known = found[found["low"].notna()]
    known = known.assign(
        held=(known["low"] <= known["true"]) & (known["true"] <= known["high"]), width=known["high"] - known["low"]
    )
    keys = ["measure", "method"]
    both = known.groupby(keys, sort=False).agg(coverage=("held", "mean"), width=("width", "mean"))
    each = known.pivot_table(index=keys, columns="witness", values="held", aggfunc="mean", sort=False)
    undefined = found.groupby(keys, sort=False)["low"].agg(lambda low: low.isna().mean()).rename("undefined")
    return pd.concat([both, each, undefined], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("MEDMICN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--data", type=Path, default=Path(default))
    parser.add_argument("--audits", type=int, default=200)
    parser.add_argument("--cells", type=int, nargs="+", default=[200, 400, 620, 1550])
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    sheet = Sheet(options.data / "wbcatt")
    worlds = [World(sheet, seed) for seed in range(N_WORLDS)]
    n_cells = int((~sheet.is_test).sum()) * len(sheet.names)
    for asked in options.cells:
        start = time.perf_counter()
        table = summary(measured(worlds, asked, options.audits, options.rounds))
        print(
            f"\n{asked} of {n_cells} cells ({asked / n_cells:.1%}), {len(sheet.names)} concepts, "
            f"{options.audits} audits, rounds: {options.rounds}, {time.perf_counter() - start:.0f} s"
        )
        print(table.to_string(float_format="{:.3f}".format), flush=True)


if __name__ == "__main__":
    main()
