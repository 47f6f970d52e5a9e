from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from data_contracts.concepts import Concept, Vocabulary
from model.concept_encoder import ConceptCode
from model.config import Family, TrainConfig
from model.explain.bootstrap import Resampling
from model.explain.concept_use import concept_use
from model.explain.concept_use_page import concept_use_page
from model.explain.curves import corrections, intervention_curves, units_of, utilities
from model.explain.knock_out import decisions, knock_out
from model.explain.paths import HeadPaths, Seen, Subject, mean_code, with_some
from model.explain.probes import LINEAR, PROBABILITIES, Codes, Probe, completeness, leakage, probes
from model.network import Head, MedMICN, Sizes
from model.outputs import Side
from model.systems.joint_cbm import JointCBM
from model.systems.registry import FAMILIES, build_network

N_FEATURES, K = 6, 4
WORDS = Vocabulary.of(
    [Concept("a", "a"), Concept("b", "b"), Concept("red", "red", group="g"), Concept("blue", "blue", group="g")]
)
CONFIG = TrainConfig(family="joint-cbm")


def seen(n: int, seed: int, noise: float = 0.0) -> Seen:
    """Class 1 is concept a; features show the concepts, with so much noise."""
    rng = np.random.default_rng(seed)
    concepts = (rng.random((n, K)) < 0.5).astype(np.float32)
    concepts[:, 3] = 1 - concepts[:, 2]
    features = np.concatenate([2 * concepts - 1, rng.standard_normal((n, N_FEATURES - K))], axis=1)
    features = (features + noise * rng.standard_normal(features.shape)).astype(np.float32)
    y = concepts[:, 0].astype(np.int64)
    return Seen(torch.from_numpy(features), y, concepts, np.ones((n, K), bool))


def reading_head() -> JointCBM:
    """Reads each concept from its feature, and the class from concept a; b alone speaks for class 0, a little."""
    head = JointCBM(Sizes(N_FEATURES, K, 2), CONFIG)
    with torch.no_grad():
        head.concepts.weight.zero_()
        head.concepts.weight[range(K), range(K)] = 4.0
        head.concepts.bias.zero_()
        head.classes.weight.zero_()
        head.classes.weight[1, 0], head.classes.weight[0, 0] = 5.0, -5.0
        head.classes.weight[0, 1] = 0.5
        head.classes.bias.copy_(torch.tensor([4.75, 0.0]))
    return head.eval()


def subject_of(head: Head, config: TrainConfig = CONFIG, noise: float = 0.0, n: int = 200) -> Subject:
    return Subject(
        head, config, WORDS, ("no", "yes"), seen(300, 1, noise), seen(100, 2, noise), seen(n, 3, noise), "test"
    )


def med_micn(seed: int = 0) -> MedMICN:
    torch.manual_seed(seed)
    return MedMICN(Sizes(N_FEATURES, K, 2), TrainConfig()).eval()


# ---- paths ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "black-box"])
def test_giving_a_head_its_own_concepts_changes_nothing_and_its_mean_hides_the_image(family: Family) -> None:
    torch.manual_seed(0)
    head = build_network(Sizes(N_FEATURES, K, 3), TrainConfig(family=family)).eval()
    features = torch.randn(50, N_FEATURES)
    paths = HeadPaths(head)
    code = paths.code(features)
    torch.testing.assert_close(paths.logits(features, code), paths.logits(features), rtol=1e-3, atol=1e-4)
    hidden = paths.logits(features, mean_code(code, 50))
    if family == "med-micn":
        assert hidden.std(0).max() > 1e-3  # the features still speak
    else:
        assert hidden.std(0).max() < 1e-4  # there is no other way
    assert all(not module._forward_hooks for module in head.modules())


def test_what_is_set_by_hand_is_what_the_class_layer_reads() -> None:
    head, features = med_micn(), torch.randn(20, N_FEATURES)
    paths = HeadPaths(head)
    code = paths.code(features)
    other = ConceptCode(*(part.flip(0) for part in code))
    some = with_some(code, other, np.array([2]))
    assert torch.equal(some.probabilities[:, 2], other.probabilities[:, 2])
    assert torch.equal(some.embeddings[:, [0, 1, 3]], code.embeddings[:, [0, 1, 3]])
    f = head.standardise(features)
    by_hand = head.fusion(f, some.embeddings.flatten(1)).logits
    torch.testing.assert_close(paths.logits(features, some), by_hand)


def test_a_head_that_ignores_its_concepts_is_found_out() -> None:
    head = med_micn()
    with torch.no_grad():
        head.fusion.weight[:, N_FEATURES:] = 0
        head.fusion.weight[1, 0], head.fusion.weight[0, 0] = 3.0, -3.0
    use = concept_use(subject_of(head, TrainConfig()))
    assert use.of("accuracy").interval.value > 0.95
    assert use.of("share_through_concepts").interval.value == pytest.approx(0, abs=1e-6)
    for name in ("lost_without_concepts", "lost_with_shuffled_concepts", "lost_with_truth_values_hidden"):
        assert use.of(name).interval == (0, 0, 0)
    assert use.of("lost_without_concepts").control > 0.3  # hiding the features instead costs it everything
    assert all(curve.area == (0, 0, 0) for curve in use.curves)
    page = concept_use_page(use, TrainConfig(), "test")
    assert "Hardly: the decision goes past the concepts" in page
    assert "does not listen to them" in page


def test_a_head_that_decides_by_its_concepts_is_found_too() -> None:
    use = concept_use(subject_of(reading_head(), noise=1.0))
    assert use.of("share_through_concepts").interval.value == 1
    lost = use.of("lost_without_concepts").interval
    assert lost.low > 0.2
    assert use.of("accuracy_of_concepts_alone").interval.value == use.of("accuracy").interval.value
    assert use.knock_out.loc[0, "concept_id"] == "a"
    row = use.knock_out.set_index("concept_id").loc["red"]
    assert (row["drop"], row["changed"], row["p"]) == (0, 0, 1)
    page = concept_use_page(use, CONFIG, "test")
    assert "Yes: the decision goes through the concepts" in page
    assert "follows corrections both ways" in page


def test_embeddings_that_decide_whatever_their_concepts_say_are_named_as_such() -> None:
    """A class that is written into both contexts of a concept: its truth value chooses between two equal embeddings."""
    config = TrainConfig(fusion="bottleneck")
    torch.manual_seed(0)
    head = MedMICN(Sizes(N_FEATURES, K, 2), config).eval()
    with torch.no_grad():
        m = config.embedding_size
        head.concepts.contexts.weight.zero_()
        head.concepts.contexts.bias.zero_()
        head.concepts.contexts.weight[[0, m], 0] = 1.0  # e⁺ and e⁻ of the first concept, both the first feature
        head.fusion.weight.zero_()
        head.fusion.weight[1, 0], head.fusion.weight[0, 0] = 5.0, -5.0
        head.fusion.bias.zero_()
    use = concept_use(subject_of(head, config))
    assert use.of("lost_without_concepts").interval.low > 0.2
    assert use.of("lost_with_truth_values_hidden").interval == (0, 0, 0)
    page = concept_use_page(use, config, "test")
    assert "Yes: the decision goes through the concepts. Little of that depends on whether" in page
    assert "does not listen to them" in page


def test_the_share_of_the_logits_is_the_covariance_share() -> None:
    subject = subject_of(med_micn(3), TrainConfig())
    paths = HeadPaths(subject.head)
    features = subject.held_out.features
    total, side = paths.logits(features).numpy(), paths.side_logits(features).numpy()
    share = concept_use(subject).of("share_through_concepts").interval.value
    assert share == pytest.approx(1 - Side(total, side).share, abs=1e-6)
    d = (total[:, 1] - total[:, 0], (total - side)[:, 1] - (total - side)[:, 0])  # with two classes: one contrast
    assert share == pytest.approx(np.cov(*d)[0, 1] / np.var(d[0], ddof=1), abs=1e-6)


def test_knock_out_is_the_accuracy_with_the_mean_code_by_hand() -> None:
    subject = subject_of(reading_head(), noise=1.0)
    paths = HeadPaths(subject.head)
    code, train = paths.code(subject.held_out.features), paths.code(subject.train.features)
    mean = ConceptCode(*(part.mean(0, keepdim=True) for part in train))
    table = knock_out(subject, paths, code, mean, Resampling(len(subject.held_out))).set_index("concept_id")
    c = code.probabilities.clone()
    whole = (subject.head.classes(c).argmax(1).numpy() == subject.held_out.y).mean()
    c[:, 0] = mean.probabilities[0, 0]
    without = (subject.head.classes(c).argmax(1).numpy() == subject.held_out.y).mean()
    assert table.at["a", "drop"] == pytest.approx(whole - without)
    assert table.at["a", "low"] <= table.at["a", "drop"] <= table.at["a", "high"]
    assert table.at["g (all values)", "kind"] == "attribute"
    everything = decisions(subject, paths, code, mean)
    assert (everything.concepts_alone == everything.whole).all()  # truth values are all there is
    assert (everything.truths_hidden == everything.without_concepts).all()


# ---- curves --------------------------------------------------------------------------------------------------


def test_right_corrections_reach_the_labels_and_wrong_ones_their_opposite() -> None:
    curves = {(c.order, c.corrections): c for c in intervention_curves(subject_of(reading_head(), noise=2.0))}
    assert set(curves) == {(o, k) for o in ("random", "uncertainty", "utility") for k in ("right", "wrong")}
    start = curves["random", "right"].table.iloc[0]["accuracy"]
    assert 0.6 < start < 0.9
    for order in ("random", "uncertainty", "utility"):
        right, wrong = curves[order, "right"].table, curves[order, "wrong"].table
        assert right.iloc[-1]["accuracy"] == 1
        assert wrong.iloc[-1]["accuracy"] == 0
        assert right["n_concepts"].iloc[-1] == K
        assert right["accuracy"].is_monotonic_increasing
        assert curves[order, "right"].area.low > 0 > curves[order, "wrong"].area.high
    # Only a decides: correcting the most useful first is worth all at once.
    assert curves["utility", "right"].table.iloc[1]["accuracy"] == 1
    area = curves["utility", "right"]
    by_hand = np.trapezoid(area.table["accuracy"], area.table["fraction"]) - start
    assert area.area.value == pytest.approx(by_hand)
    assert curves["random", "right"].area.value < area.area.value


def test_utility_is_the_fall_of_the_loss_on_validation_images() -> None:
    subject = subject_of(reading_head(), noise=2.0)
    found = dict(
        zip([n for n, _ in units_of(WORDS)], utilities(HeadPaths(subject.head), subject.val, units_of(WORDS)),
            strict=True)
    )  # fmt: skip
    assert max(found, key=found.get) == "a"
    assert found["g (all values)"] == pytest.approx(0, abs=1e-6)


def test_a_wrong_answer_about_an_exclusive_attribute_is_another_of_its_values() -> None:
    words = Vocabulary.of([Concept(c, c, group="g") for c in "xyz"] + [Concept("s", "s")])
    targets = np.eye(4, dtype=np.float32)[[0, 1, 2, 0, 3]]
    mask = np.ones((5, 4), bool)
    some = Seen(torch.zeros(5, 1), np.zeros(5, np.int64), targets, mask)
    wrong = corrections(some, units_of(words), "wrong", np.random.default_rng(0))
    assert (wrong[:4, :3].sum(1) == 1).all()
    assert not (wrong[:4, :3] * targets[:4, :3]).any()
    assert wrong[:, 3].tolist() == [1, 1, 1, 1, 0]
    np.testing.assert_array_equal(corrections(some, units_of(words), "right", np.random.default_rng(0)), targets)


def test_cells_without_a_label_are_never_corrected() -> None:
    subject = subject_of(reading_head(), noise=2.0)
    mask = np.zeros_like(subject.held_out.mask)
    mask[:, 1] = True
    partly = replace(subject, held_out=replace(subject.held_out, mask=mask))
    for curve in intervention_curves(partly):
        assert curve.table["n_concepts"].max() == 1
    nothing = replace(subject, held_out=replace(subject.held_out, mask=np.zeros_like(mask)))
    assert intervention_curves(nothing) == []
    use = concept_use(nothing)
    assert "nothing could be corrected" in " ".join(use.remarks)
    assert "# Are the concepts used?" in concept_use_page(use, CONFIG, "test")


# ---- probes --------------------------------------------------------------------------------------------------


def test_a_leak_is_found_where_probabilities_tell_the_class_beside_their_concepts() -> None:
    """Labels are independent of the class; the honest network repeats them, the other hides the class in them."""
    rng = np.random.default_rng(0)

    def made(n: int) -> Seen:
        targets = (rng.random((n, K)) < 0.5).astype(np.float32)
        return Seen(torch.randn(n, N_FEATURES), rng.integers(0, 2, n), targets, np.ones((n, K), bool))

    splits = [made(400), made(200), made(300)]
    subject = Subject(reading_head(), CONFIG, WORDS, ("no", "yes"), *splits, "test")
    resampling = Resampling(300)
    gains = {}
    for name, hidden in (("honest", 0.0), ("leaking", 0.2)):
        codes = [torch.from_numpy(np.clip(s.targets * 0.6 + 0.2 + hidden * (s.y[:, None] - 0.5), 0, 1)) for s in splits]
        found = probes(subject, Codes(*(ConceptCode(c[..., None], c, c) for c in (c.float() for c in codes))))
        gains[name] = leakage(found, LINEAR, PROBABILITIES, resampling)
    assert gains["leaking"].gained.low > 0.3
    assert gains["honest"].gained.low <= 0.05
    assert abs(gains["leaking"].control.value) < 0.15
    assert isinstance(found[LINEAR, PROBABILITIES], Probe)


def test_completeness_is_yehs_formula() -> None:
    rng = np.random.default_rng(0)
    probe, network, chance = (rng.random(400) < p for p in (0.7, 0.9, 0.25))
    found = completeness(probe, network, chance, Resampling(400))
    assert found.value == pytest.approx((probe.mean() - chance.mean()) / (network.mean() - chance.mean()))
    assert found.low < found.value < found.high
    assert np.isnan(completeness(probe, chance, chance, Resampling(400)).value)


# ---- intervals -----------------------------------------------------------------------------------------------


def test_intervals_are_the_bootstraps() -> None:
    rng = np.random.default_rng(0)
    y, said = rng.integers(0, 3, 500), rng.integers(0, 3, 500)
    said[:300] = y[:300]
    resampling = Resampling(500)
    found = resampling.macro_f1(y, said, 3)
    assert found.value == pytest.approx(f1_score(y, said, average="macro"))
    draws = np.random.default_rng(1)
    slow = [f1_score(y[i], said[i], average="macro") for i in (draws.integers(0, 500, 500) for _ in range(400))]
    assert (found.low, found.high) == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.012)
    accuracy = resampling.mean(y == said)
    half = 1.96 * np.sqrt(accuracy.value * (1 - accuracy.value) / 500)
    assert (accuracy.low, accuracy.high) == pytest.approx((accuracy.value - half, accuracy.value + half), abs=0.008)


# ---- bad input -----------------------------------------------------------------------------------------------


def test_a_system_without_concepts_is_told_in_words() -> None:
    config = TrainConfig(family="black-box")
    use = concept_use(subject_of(build_network(Sizes(N_FEATURES, K, 2), config).eval(), config))
    assert not use.has_concepts
    assert [m.measure for m in use.measures] == ["accuracy"]
    page = concept_use_page(use, config, "test")
    assert "no concepts" in page
    assert "0 % of it goes through concepts" in page


@pytest.mark.parametrize("n", [0, 1, 5])
def test_a_small_split_gives_sentences_and_no_crash(n: int) -> None:
    use = concept_use(subject_of(reading_head(), n=n))
    page = concept_use_page(use, CONFIG, "test")
    assert ("no image" if n == 0 else f"{n} images only") in page


def test_one_class_in_the_split_and_constant_concepts_are_said() -> None:
    subject = subject_of(reading_head())
    rows = np.flatnonzero(subject.held_out.y == 1).astype(np.int64)
    use = concept_use(replace(subject, held_out=subject.held_out.take(rows)))
    page = concept_use_page(use, CONFIG, "test")
    assert "are of one class" in page
    assert "1 concepts are the same in every labelled held-out image: a" in page


def test_training_images_of_one_class_allow_no_probe() -> None:
    subject = subject_of(reading_head())
    rows = np.flatnonzero(subject.train.y == 1).astype(np.int64)
    use = concept_use(replace(subject, train=subject.train.take(rows)))
    assert "no probe could be fitted" in " ".join(use.remarks)
    assert use.of("probe_linear_labels") is None


def test_without_validation_images_there_is_no_order_by_utility() -> None:
    subject = subject_of(reading_head())
    use = concept_use(replace(subject, val=subject.val.take(np.zeros(0, np.int64))))
    assert {curve.order for curve in use.curves} == {"random", "uncertainty"}
    assert "no validation images" in " ".join(use.remarks)


def test_a_head_that_was_taught_nonsense_stands_beside() -> None:
    use = concept_use(subject_of(med_micn(1), TrainConfig()), med_micn(2))
    assert use.of("accuracy_with_random_concepts").control == use.of("accuracy").interval.value
    assert "shuffled between images" in concept_use_page(use, TrainConfig(), "test")
