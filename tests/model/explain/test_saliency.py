from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from torch import nn

from data_contracts.errors import ContractViolation, InputRefused
from model.backbones import Backbone, Preprocessing
from model.concept_encoder import Intervention
from model.config import TrainConfig
from model.explain.maps import TABLE_COLUMNS, MapOptions, map_evidence
from model.explain.saliency import METHODS, class_map, concept_maps, cut, grids, leading_concepts
from model.fit import TrainedRun
from model.network import Head, MedMICN, NetworkOutput, Sizes, Standardise
from model.predict import Classifier
from model.systems.black_box import BlackBox
from tests.model.conftest import CLASSES, VOCABULARY


@pytest.fixture(scope="module")
def classifier(trained: dict[str, TrainedRun]) -> Classifier:
    return Classifier.of(trained["paper"])


def transformer(head: type[Head]) -> Classifier:
    torch.manual_seed(0)
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64).eval()
    preprocess = Preprocessing(64, (0.5,) * 3, (0.5,) * 3)
    config = TrainConfig()
    return Classifier(
        Backbone("vit", backbone, 192, preprocess, "", ""),
        head(Sizes(192, 4, 3), config).eval(),
        VOCABULARY,
        CLASSES,
        config,
        0,
        torch.device("cpu"),
    )


def batch_of(classifier: Classifier, images: list[np.ndarray]) -> torch.Tensor:
    return torch.stack([classifier.backbone.preprocess(one) for one in images])


@pytest.mark.parametrize("method", list(METHODS))
def test_a_batch_gives_each_image_the_map_it_has_alone(squares, classifier: Classifier, method: str) -> None:
    for one in (classifier, transformer(MedMICN)):
        images = [squares("striped-2"), squares("red-1"), squares("blue-0")]
        batch = batch_of(one, images)
        together = grids(one, batch, [[0, 3], [1], [2, 4, 5]], method)
        alone = [grids(one, batch[n : n + 1], [c], method)[0] for n, c in enumerate([[0, 3], [1], [2, 4, 5]])]
        assert [len(maps) for maps in together] == [2, 1, 3]
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-3)


class LinearHead(Head):
    """Class logits by one matrix: what hires-cam explains exactly."""

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.standardise = Standardise(n_features)
        self.classes = nn.Linear(n_features, 3)

    def forward(self, f: torch.Tensor, intervention: Intervention | None = None) -> NetworkOutput:
        return NetworkOutput(self.classes(f))


def test_the_default_method_shows_each_cells_own_contribution_to_a_linear_score(squares, classifier) -> None:
    torch.manual_seed(0)
    linear = replace(classifier, network=LinearHead(classifier.backbone.n_features).eval())
    batch = batch_of(linear, [squares("striped-2")])
    with torch.no_grad():
        cells = cut(linear.backbone.module, batch).cells[0]  # (D, h, w)
        contribution = torch.einsum("d,dhw->hw", linear.network.classes.weight[1], cells) / cells[0].numel()
        bias = linear.network.classes.bias[1]
        torch.testing.assert_close(contribution.sum() + bias, linear.image_network(batch).class_logits[0, 1])
    speaks_for = contribution.clamp(min=0).numpy()
    expected = (speaks_for - speaks_for.min()) / (speaks_for.max() - speaks_for.min())
    np.testing.assert_allclose(grids(linear, batch, [[1]])[0][0], expected, atol=1e-4)


def test_a_system_without_concepts_has_class_maps_only(squares) -> None:
    black_box = transformer(BlackBox)
    assert not black_box.has_concepts
    assert class_map(black_box, squares("red-1"), "red").shape == (40, 48)
    with pytest.raises(InputRefused, match="no map of any concept"):
        concept_maps(black_box, squares("red-1"), ["stripes"])
    (prediction,) = black_box.predict([squares("red-1")], maps=True)
    assert prediction.concept_maps == {}
    assert prediction.class_map is not None


def test_unknown_names_are_refused_with_the_known_ones(squares, classifier: Classifier) -> None:
    with pytest.raises(InputRefused, match="blue, red, striped"):
        class_map(classifier, squares("red-1"), "green")
    with pytest.raises(ContractViolation, match="'wings' is unknown"):
        concept_maps(classifier, squares("red-1"), ["wings"])
    assert concept_maps(classifier, squares("red-1"), []) == {}


def test_weights_that_are_not_finite_give_a_sentence_and_no_picture(squares) -> None:
    broken = transformer(MedMICN)
    with torch.no_grad():
        broken.network.fusion.weight[0, 0] = float("nan")
    with pytest.raises(InputRefused, match="not finite"):
        class_map(broken, squares("red-1"), "blue")
    with pytest.raises(InputRefused, match="gave NaN"):
        broken.predict([squares("red-1")])


def test_leading_concepts_are_those_the_rule_asks_for(squares, classifier: Classifier) -> None:
    (prediction,) = classifier.predict([squares("striped-2")])
    leading = leading_concepts(prediction, 2)
    present = {t.concept_id: t.truth for t in prediction.rule.terms if t.present}
    assert set(leading) <= set(present)
    assert len(leading) == min(2, len(present))
    without = replace(prediction, rule=None, concept_probabilities={"a": 0.4, "b": 0.9, "c": 0.6})
    assert leading_concepts(without, 3) == ["b", "c"]


def products_at_the_last_blocks_normalisation(one: Classifier, batch: torch.Tensor, concept: int) -> torch.Tensor:
    """(4, 4) gradient times activation of each patch token, summed over its numbers."""
    seen: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    backbone = one.backbone.module
    handle = backbone.blocks[-1].norm1.register_forward_hook(keep)
    one.network(backbone(batch.clone().requires_grad_())).concepts.logits[0, concept].backward()
    handle.remove()
    return (seen[0] * seen[0].grad)[0, 1:].sum(1).detach().reshape(4, 4)


def test_a_transformers_map_is_what_the_attention_of_the_last_block_reads(squares) -> None:
    one = transformer(MedMICN)
    batch = batch_of(one, [squares("striped-2")])
    for k, heat in enumerate(grids(one, batch, [[3, 4, 5, 6]])[0]):
        products = products_at_the_last_blocks_normalisation(one, batch, k)
        assert products.abs().max() > 1e-6  # at the block's input these would be rounding errors
        speaks_for = products.clamp(min=0)
        spread = (speaks_for.max() - speaks_for.min()).clamp(min=1e-7)
        np.testing.assert_allclose(heat, (speaks_for - speaks_for.min()) / spread, atol=2e-3)


# ---- evidence --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out(squares) -> list[str]:
    dataset = squares.dataset()
    return [dataset.image_ids[n] for n in dataset.rows("test")][:9]


def aligned_with_the_network(classifier: Classifier, squares, ids: list[str]) -> dict[tuple[str, str], np.ndarray]:
    """An aligner that sees exactly what the network sees."""
    found = {}
    for image_id in ids:
        columns = [range(3, 7)]
        maps = grids(classifier, batch_of(classifier, [squares(image_id)]), columns)[0]
        found |= {(image_id, c): heat for c, heat in zip(VOCABULARY.ids, maps, strict=True)}
    return found


def test_evidence_has_a_row_for_each_map_and_a_control_for_each_number(squares, classifier, held_out) -> None:
    clip = aligned_with_the_network(classifier, squares, held_out)
    n_seen: list[int] = []
    found = map_evidence(
        classifier, held_out, squares, MapOptions(("hires-cam", "layer-cam"), 2), clip_maps=clip, advance=n_seen.append
    )
    table = found.table
    assert list(table.columns) == list(TABLE_COLUMNS)
    assert sum(n_seen) == 2 * len(held_out)
    of_class = table[table["target"] == "class"]
    assert len(of_class) == 2 * len(held_out)
    assert of_class[["deletion", "insertion", "deletion_random", "insertion_random"]].stack().between(0, 1).all()
    own = table[(table["target"] != "class") & (table["method"] == "hires-cam")].dropna(subset=["alignment"])
    assert len(own)
    assert own["alignment"].gt(0.999).all()
    assert (own["shuffled"].dropna() < 0.99).all()
    summary = found.summary.set_index(["measure", "method", "control_is"])
    row = summary.loc[
        "concept map with the aligner's map", "hires-cam", "the aligner's maps of other concepts in the image"
    ]
    assert row["value"] == pytest.approx(1, abs=1e-3)
    assert row["verdict"] == "better than its control"
    assert found.warnings == []
    again = map_evidence(classifier, held_out, squares, MapOptions(("hires-cam",), 2), clip_maps=clip)
    first = table[table["method"] == "hires-cam"].reset_index(drop=True)
    assert first.equals(again.table)


def test_maps_that_have_nothing_to_do_with_the_aligner_are_not_told_from_their_control(
    squares, classifier, held_out
) -> None:
    rng = np.random.default_rng(5)
    random = {(i, c): rng.random((7, 7)) for i in held_out for c in VOCABULARY.ids}
    summary = map_evidence(classifier, held_out, squares, MapOptions(("hires-cam",)), clip_maps=random).summary
    rows = summary[summary["measure"] == "concept map with the aligner's map"]
    assert "better than its control" not in set(rows["verdict"])
    assert rows["difference"].abs().max() < 0.25


def test_without_concepts_there_is_faithfulness_of_the_class_and_nothing_else(squares, held_out) -> None:
    found = map_evidence(transformer(BlackBox), held_out[:3], squares, MapOptions(("hires-cam",)))
    assert found.table["target"].eq("class").all()
    assert found.table["alignment"].isna().all()
    assert set(found.summary["measure"]) == {"deletion of the class map", "insertion of the class map"}


def test_images_without_a_finite_map_are_said(squares, held_out) -> None:
    broken = transformer(MedMICN)
    with torch.no_grad():
        broken.network.fusion.weight[0, 0] = float("nan")
    found = map_evidence(broken, held_out[:3], squares, MapOptions(("hires-cam",)))
    assert found.table.empty
    assert found.summary.empty
    assert "3 images have no map" in found.warnings[0]
