from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import model.compare
import model.resampling
import model.tabulate
from data_contracts.concepts import Vocabulary
from data_contracts.dataset import AlignedDataset
from data_contracts.errors import ConfigurationError, InputRefused
from model.compare import CompareWatch, Design, compare, compare_prepared
from model.config import TrainConfig
from model.evaluate import evaluate
from model.fit import train
from model.presets import PRESETS, filter_rows, preset_named
from model.resampling import Metric, values_of
from model.systems.registry import SYSTEMS, System
from model.tabulate import N_RANKED_RESAMPLES, N_RESAMPLES, Comparison

SHORT = TrainConfig(epochs=3, seeds=(0, 1), image_size_px=64)
PAIR_NAMES = ["black-box", "med-micn-dcr"]
PAIR = Design(PAIR_NAMES)


@pytest.fixture(scope="module")
def comparison(squares, cache_dir: Path) -> Comparison:
    return compare(squares.dataset(), squares, SHORT, Design(protocols=("clean", "paper")), cache_dir=cache_dir)


def test_every_system_is_measured_under_every_protocol(comparison: Comparison) -> None:
    table = comparison.table
    assert table["system"].tolist() == [*SYSTEMS, *SYSTEMS]
    assert table["protocol"].tolist() == ["clean"] * len(SYSTEMS) + ["paper"] * len(SYSTEMS)
    clean = table[table["protocol"] == "clean"].set_index("system")
    assert np.isnan(clean.at["black-box", "concept_auroc"])
    assert np.isnan(clean.at["joint-cbm", "rule_macro_f1"])
    assert clean.at["dcr", "rule_agreement"] == 1
    assert 0 < clean.at["label-free-cbm", "concepts_per_class"] <= 4
    assert clean["optimism_accuracy"].isna().all()
    assert table[table["protocol"] == "paper"]["optimism_accuracy"].notna().all()


def test_numbers_are_those_of_the_same_training_alone(squares, cache_dir: Path, comparison: Comparison) -> None:
    alone = train(squares.dataset(), squares, SYSTEMS["med-micn-dcr"].config(SHORT), cache_dir=cache_dir)
    metrics = pd.DataFrame([one.metrics for one in evaluate(alone).evaluations])
    row = comparison.table[comparison.table["protocol"] == "clean"].set_index("system").loc["med-micn-dcr"]
    for name in ("accuracy", "macro_f1", "auroc", "concept_auroc", "concept_macro_f1", "rule_macro_f1", "ece"):
        assert row[name] == pytest.approx(metrics[name].mean())
        assert row[f"{name}_sd"] == pytest.approx(metrics[name].std())
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    assert row["side_share"] == pytest.approx(metrics["side_share"].mean())


def test_ranked_metrics_have_as_many_resamples_as_is_said(
    squares, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, int]] = []

    def counted(metric: Metric, weights: np.ndarray) -> np.ndarray:
        seen.append((metric.is_ranked, len(weights)))
        return values_of(metric, weights)

    monkeypatch.setattr(model.tabulate, "values_of", counted)
    monkeypatch.setattr(model.resampling, "_CELLS_AT_ONCE", 30 * 150)  # blocks of 150 resamples of 30 images
    compare(squares.dataset(), squares, SHORT, Design(["black-box"]), cache_dir=cache_dir)
    n_metrics = {True: 1, False: 4}  # AUROC; accuracy, macro-F1, calibration error and Brier score
    for is_ranked, expected in ((True, N_RANKED_RESAMPLES), (False, N_RESAMPLES)):
        assert sum(n for kind, n in seen if kind == is_ranked) == expected * n_metrics[is_ranked] * len(SHORT.seeds)


def test_differences_are_paired_with_the_reference_and_corrected(comparison: Comparison) -> None:
    pairs, table = comparison.pairs, comparison.table.set_index(["system", "protocol"])
    assert set(pairs["reference"]) == {"black-box"}
    assert set(pairs["system"]) == set(SYSTEMS) - {"black-box"}
    for pair in pairs.to_dict("records"):
        one, other = (table.loc[(name, pair["protocol"]), pair["metric"]] for name in (pair["system"], "black-box"))
        assert pair["difference"] == pytest.approx(one - other)
        assert pair["low"] <= pair["difference"] <= pair["high"]
        assert pair["p"] <= pair["p_holm"] <= 1


def test_a_killed_comparison_goes_on_with_what_is_missing(
    squares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[str, int, bool]] = []

    def stop_after_three(name: str, seed: int, reused: bool) -> None:
        heard.append((name, seed, reused))
        if len(heard) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(
            squares.dataset(), squares, SHORT, PAIR, cache_dir=tmp_path,
            watch=CompareWatch(on_trial=stop_after_three),
        )  # fmt: skip
    heard.clear()
    again = compare(
        squares.dataset(), squares, SHORT, PAIR, cache_dir=tmp_path,
        watch=CompareWatch(on_trial=lambda *one: heard.append(one)),
    )  # fmt: skip
    assert [reused for _, _, reused in heard] == [True, True, True, False]
    monkeypatch.setattr(model.compare, "_trained", lambda *_: pytest.fail("it was trained again"))
    reread = compare(squares.dataset(), squares, SHORT, PAIR, cache_dir=tmp_path)
    pd.testing.assert_frame_equal(again.table, reread.table)


def test_another_data_set_or_setting_is_another_result_and_a_torn_file_none(squares, tmp_path: Path) -> None:
    def n_reused(dataset: AlignedDataset, config: TrainConfig) -> int:
        heard: list[bool] = []
        compare(
            dataset, squares, config, Design(["black-box"]), cache_dir=tmp_path,
            watch=CompareWatch(on_trial=lambda _name, _seed, reused: heard.append(reused)),
        )  # fmt: skip
        return sum(heard)

    dataset = squares.dataset()
    assert n_reused(dataset, SHORT) == 0
    assert n_reused(dataset, SHORT) == 2
    assert n_reused(dataset, SHORT.model_copy(update={"dropout": 0.2})) == 0
    flipped = replace(dataset, concepts=1 - dataset.concepts)
    assert n_reused(flipped, SHORT) == 0
    for path in (tmp_path / "comparison").glob("*.npz"):
        path.write_bytes(path.read_bytes()[:-40])
    assert n_reused(dataset, SHORT) == 0


def test_unknown_systems_and_references_are_refused_before_training(squares, cache_dir: Path) -> None:
    with pytest.raises(ConfigurationError, match="black-box"):
        compare(squares.dataset(), squares, SHORT, Design(["gpt"]), cache_dir=cache_dir)
    with pytest.raises(ConfigurationError, match="reference: expected one of"):
        compare(squares.dataset(), squares, SHORT, Design(PAIR_NAMES, reference="cem"), cache_dir=cache_dir)
    with pytest.raises(ConfigurationError, match="the test split"):
        compare(squares.dataset(), squares, SHORT, Design(PAIR_NAMES, ("paper",), split="val"), cache_dir=cache_dir)
    with pytest.raises(ConfigurationError, match="preset"):
        preset_named("everything")


def test_a_leaking_patient_is_refused_by_the_clean_protocol_alone(squares, cache_dir: Path) -> None:
    dataset = squares.dataset()
    leaking = replace(dataset, frame=dataset.frame.assign(group_id=[f"p{n % 5}" for n in range(len(dataset))]))
    with pytest.raises(InputRefused, match="5 of 5 patients"):
        compare(leaking, squares, SHORT, Design(["black-box"]), cache_dir=cache_dir)
    found = compare(leaking, squares, SHORT, Design(["black-box"], ("paper",)), cache_dir=cache_dir)
    assert found.n_clusters == 5


def test_every_row_of_every_preset_is_a_valid_configuration_as_published() -> None:
    for preset in PRESETS.values():
        assert len({one.name for one in preset.systems}) == len(preset.systems)
        for one in preset.systems:
            one.config(TrainConfig())
    losses = {one.name: one.config(TrainConfig()) for one in PRESETS["loss-ablation"].systems}
    weights = {name: (its.lambda_concept, its.lambda_neural) for name, its in losses.items()}
    assert set(weights.values()) == {(0, 0), (0.1, 0), (0, 0.1), (0.1, 0.1)}
    table = [one.config(TrainConfig()) for one in PRESETS["paper-table"].systems]
    assert {(its.backbone, its.backbone_learning_rate) for its in table} == {
        ("resnet50", 5e-5),
        ("vgg19", 5e-6),
        ("densenet169", 1e-4),
    }
    assert all(its.epochs == 100 and not its.freeze_backbone for its in table)


def few_concepts(dataset: AlignedDataset, n: int) -> AlignedDataset:
    vocabulary = Vocabulary(dataset.vocabulary.concepts[:n])
    return AlignedDataset(dataset.frame, dataset.concepts[:, :n], dataset.mask[:, :n], vocabulary, dataset.class_names)


def test_the_filter_ablation_sets_kept_concepts_beside_all(squares, cache_dir: Path) -> None:
    everything = squares.dataset()
    shuffled = everything.take(np.random.default_rng(0).permutation(len(everything)))
    systems: list[System] = [SYSTEMS["black-box"], SYSTEMS["joint-cbm"]]
    kept, design = few_concepts(everything, 2), Design(systems)
    rows = filter_rows(kept, shuffled, squares, SHORT, design, cache_dir=cache_dir)
    found = compare_prepared(rows, SHORT.seeds, design, cache_dir=cache_dir)
    assert found.table["system"].tolist() == ["black-box", "joint-cbm (kept 2)", "joint-cbm (all 4)"]
    alone = compare(everything, squares, SHORT, Design(["joint-cbm"]), cache_dir=cache_dir)
    assert found.table["macro_f1"].iloc[2] == alone.table["macro_f1"].iloc[0]
    with pytest.raises(InputRefused, match="same images"):
        filter_rows(kept, everything.take(np.arange(30)), squares, SHORT, design, cache_dir=cache_dir)
