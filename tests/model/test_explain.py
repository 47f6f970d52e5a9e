from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch

from data_contracts.concepts import Concept, Vocabulary
from data_contracts.errors import ConfigurationError, InputRefused
from model.config import TrainConfig
from model.evaluate import outputs_of
from model.explain import rules as r
from model.explain.class_rules import read_class_rules
from model.explain.rule_evidence import class_rules
from model.explain.saliency import METHODS, Rest, class_map, concept_maps, cut, overlay
from model.fit import TrainedRun
from model.network import MedMICN, Sizes
from model.outputs import Outputs
from model.predict import Classifier

WORDS = Vocabulary.of([Concept("a", "a"), Concept("b", "b", group="g"), Concept("c", "c", group="g")])


def outputs_from(concepts: np.ndarray, predicted: np.ndarray, polarity: np.ndarray, relevance: np.ndarray) -> Outputs:
    n, n_classes = len(predicted), polarity.shape[1]
    spread = (n, *polarity.shape)
    return Outputs(
        np.eye(n_classes, dtype=np.float32)[predicted],
        concepts.astype(np.float32),
        np.broadcast_to(polarity, spread).astype(np.float32),
        np.broadcast_to(relevance, spread).astype(np.float32),
        np.full((n, n_classes), 0.7, np.float32),
    )


@pytest.fixture
def known() -> Outputs:
    """Class 0 is said exactly when a ∧ ¬b; c is noise that its rules also ask for, wrongly."""
    rng = np.random.default_rng(0)
    concepts = rng.random((400, 3))
    predicted = np.where((concepts[:, 0] >= 0.5) & (concepts[:, 1] < 0.5), 0, 1)
    polarity = np.array([[0.9, 0.1], [0.1, 0.9], [0.9, 0.9]])
    relevance = np.array([[0.9, 0.9], [0.9, 0.9], [0.9, 0.1]])
    return outputs_from(concepts, predicted, polarity, relevance)


def test_a_class_rule_is_read_simplified_and_measured(known: Outputs) -> None:
    found = read_class_rules(known, WORDS, ("yes", "no"))
    assert found[0].text(WORDS) in {"yes ← a ∧ ¬ b", "yes ← ¬ b ∧ a"}
    truth = known.predicted.copy()
    truth[:40] = 1 - truth[:40]
    table = class_rules(found, known, truth, WORDS, ("yes", "no")).set_index("class")
    holds = known.predicted == 0
    yes = table.loc["yes"]
    assert yes["fidelity"] == 1
    assert yes["network_recall"] == 1
    assert yes["support"] == holds.sum()
    assert yes["coverage"] == pytest.approx(holds.mean())
    assert yes["precision"] == pytest.approx((truth[holds] == 0).mean())
    assert yes["recall"] == pytest.approx(holds[truth == 0].mean())
    assert yes["length"] == 2


def test_a_class_never_said_has_no_rule(known: Outputs) -> None:
    only = Outputs(np.tile([[1.0, 0.0]], (400, 1)).astype(np.float32), *known[1:])
    assert [rule.class_name for rule in read_class_rules(only, WORDS, ("yes", "no"))] == ["yes"]


def test_an_image_rule_lists_its_terms_weakest_first_without_what_a_group_implies() -> None:
    polarity = np.array([[0.2], [0.9], [0.1]])
    outputs = outputs_from(np.array([[0.4, 0.8, 0.1]]), np.array([0]), polarity, np.full((3, 1), 0.9))
    row = r.image_rules(outputs, ["x"], WORDS, ("yes",)).iloc[0]
    assert row["rule"] == "yes ← ¬ a ∧ b"  # ¬ c follows from b, its group's one value
    assert [(t["concept_id"], t["present"], t["truth"]) for t in json.loads(row["terms"])] == [
        ("a", False, 0.6),
        ("b", True, 0.8),
    ]
    assert row["holds"]


def test_a_rule_without_literals_says_always_and_holds() -> None:
    outputs = outputs_from(np.zeros((1, 3)), np.array([0]), np.full((3, 1), 0.9), np.full((3, 1), 0.1))
    row = r.image_rules(outputs, ["x"], WORDS, ("yes",)).iloc[0]
    assert row["rule"] == "yes ← (always)"
    assert row["holds"]


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_in_dcr_the_boolean_rule_is_the_fuzzy_one_for_every_class(temperature: float) -> None:
    torch.manual_seed(0)
    config = TrainConfig(logic="dcr", temperature=temperature)
    network = MedMICN(Sizes(6, 3, 4), config).eval()
    with torch.no_grad():
        output = network(8 * torch.randn(4000, 6))
    rule = output.rule
    arrays = Outputs(
        *(
            part.numpy()
            for part in (output.class_logits, output.concepts.probabilities, rule.polarity, rule.relevance, rule.truth)
        )
    )
    some_hold = False
    for j in range(4):
        holds = r.image_rule_holds(arrays, np.full(4000, j))
        clear = np.abs(arrays.rule_truth[:, j] - 0.5) > 1e-5  # at exactly ½ the fuzzy rule does not decide
        np.testing.assert_array_equal(holds[clear], arrays.rule_truth[clear, j] > 0.5)
        some_hold |= bool(holds.any() and not holds.all())
    assert some_hold


def test_rules_of_a_trained_run_tell_the_classes_on_held_out_images(trained: dict[str, TrainedRun]) -> None:
    for logic, run in trained.items():
        dataset = run.prepared.dataset
        rules = read_class_rules(outputs_of(run, run.best, dataset.rows("train")), run.vocabulary, run.class_names)
        rows = dataset.rows("test")
        table = class_rules(
            rules, outputs_of(run, run.best, rows), dataset.class_index()[rows], run.vocabulary, run.class_names
        )
        assert table["n_images"].eq(len(rows)).all()
        # The paper's truth value leaves the concept itself out, so its reading may be far from the network.
        assert table["fidelity"].between(0, 1).all()
        assert table["fidelity"].mean() > 0.6 or logic == "paper"


def test_rules_of_a_system_without_any_are_refused(known: Outputs) -> None:
    none = known._replace(rule_truth=np.zeros((400, 0), np.float32))
    with pytest.raises(InputRefused, match="no rule"):
        read_class_rules(none, WORDS, ("yes", "no"))


def test_prediction_names_class_concepts_and_rule(squares, trained: dict[str, TrainedRun]) -> None:
    classifier = Classifier.of(trained["dcr"])
    images = [squares("striped-2"), squares("red-1")[:30, :20]]
    first, second = classifier.predict(images)
    assert sum(first.class_probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert first.class_name == max(first.class_probabilities, key=first.class_probabilities.get)
    assert tuple(first.concept_probabilities) == classifier.vocabulary.ids
    assert first.rule.text.startswith(first.class_name + " ← ")
    assert first.rule.holds == (first.rule.truth > 0.5)
    assert first.class_map is None
    assert classifier.predict([images[1]])[0].class_probabilities == pytest.approx(second.class_probabilities, abs=1e-5)
    assert classifier.predict([]) == []


def test_maps_come_at_the_images_size_for_a_frozen_backbone(squares, trained: dict[str, TrainedRun]) -> None:
    classifier = Classifier.of(trained["paper"])
    pixels = squares("striped-2")
    (prediction,) = classifier.predict([pixels], maps=True)
    assert prediction.class_map.shape == pixels.shape[:2]
    assert 0 <= prediction.class_map.min() <= prediction.class_map.max() <= 1
    maps = concept_maps(classifier, pixels, ["stripes", "bluish"])
    assert list(maps) == ["stripes", "bluish"]
    assert maps["stripes"].shape == pixels.shape[:2]
    assert not np.allclose(maps["stripes"], maps["bluish"])


def _has_positive_evidence(rest: Rest, cells: torch.Tensor, column: int) -> bool:
    (gradient,) = torch.autograd.grad(rest(cells)[0, column], cells)
    return bool(((gradient.mean((2, 3), keepdim=True) * cells).sum(1) > 0).any())


def test_the_map_finds_what_the_class_score_depends_on(trained: dict[str, TrainedRun]) -> None:
    classifier = Classifier.of(trained["paper"])
    network = classifier.image_network
    generator = np.random.default_rng(0)
    pixels = np.full((64, 64, 3), 128, np.uint8)
    pixels[:32, :32] = generator.integers(0, 255, (32, 32, 3))
    image = classifier.backbone.preprocess(pixels)[None]
    at_cut = cut(network.backbone, image).cells.detach().requires_grad_()
    rest = Rest(network.backbone, network.head, None).eval()
    speaks_for = next(j for j in range(3) if _has_positive_evidence(rest, at_cut, j))
    rest(at_cut)[0, speaks_for].backward()
    weights = at_cut.grad.mean((2, 3), keepdim=True)
    by_hand = (weights * at_cut).sum(1)[0].clamp(min=0).detach().numpy()
    by_hand = (by_hand - by_hand.min()) / max(by_hand.max() - by_hand.min(), 1e-7)
    found = class_map(classifier, pixels, classifier.class_names[speaks_for])
    h, w = by_hand.shape
    sampled = found.reshape(h, 64 // h, w, 64 // w).mean((1, 3))
    assert np.corrcoef(sampled.ravel(), by_hand.ravel())[0, 1] > 0.9


@pytest.mark.parametrize(
    "name", ["resnet10t", "vgg11", "densenet121", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]
)
def test_cut_and_rest_compose_to_the_whole_network(name: str) -> None:
    torch.manual_seed(0)
    fixed = {"img_size": 64} if name.startswith(("vit", "swin")) else {}
    backbone = timm.create_model(
        name, num_classes=0, **({"window_size": 2} | fixed if "swin" in name else fixed)
    ).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = backbone(images)
        at_cut = cut(backbone, images[:1])
        rest = Rest(backbone, MedMICN(Sizes(features.shape[1], 2, 2), TrainConfig()).eval(), at_cut.prefix)
        torch.testing.assert_close(rest.pooled(at_cut.cells), features[:1], rtol=1e-3, atol=1e-4)
    assert at_cut.cells.shape[2] == at_cut.cells.shape[3]


def test_a_backbone_without_cells_is_refused() -> None:
    backbone = timm.create_model("mixer_s32_224", num_classes=0)
    with pytest.raises(ConfigurationError, match="grid of cells"):
        cut(backbone, torch.zeros(1, 3, 224, 224))


def test_an_unknown_method_is_refused_with_the_known_ones(squares, trained: dict[str, TrainedRun]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(METHODS))):
        class_map(Classifier.of(trained["paper"]), squares("red-1"), "red", method="magic")


def test_overlay_leaves_the_image_where_the_map_is_zero() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    saliency = np.zeros((8, 8), np.float32)
    saliency[4:] = 1
    drawn = overlay(pixels, saliency)
    np.testing.assert_array_equal(drawn[:4], pixels[:4])
    assert (drawn[4:] != pixels[4:]).any()
