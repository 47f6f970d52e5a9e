from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_explain.nn.concepts import ConceptReasoningLayer
from torch_explain.nn.semantics import GodelTNorm, ProductTNorm

from model.concept_encoder import ConceptCode, ConceptEncoder
from model.config import TrainConfig
from model.logic import T_NORMS, reasoning_layer, soft_selection


def a_code(n_images: int = 5, n_concepts: int = 4, size: int = 8, seed: int = 0) -> ConceptCode:
    torch.manual_seed(seed)
    return ConceptEncoder(6, n_concepts, size)(torch.randn(n_images, 6))


@torch.no_grad()
def by_hand(code: ConceptCode, layer: torch.nn.Module, logic: str, t_norm: str, temperature: float) -> torch.Tensor:
    """METHOD, section 3, image by image, class by class, concept by concept."""

    def either(a: float, b: float) -> float:
        return max(a, b) if t_norm == "godel" else a + b - a * b

    def both(a: float, b: float) -> float:
        return min(a, b) if t_norm == "godel" else a * b

    phi, psi = (layer.polarity, layer.relevance) if logic == "paper" else (layer.sign, layer.filter)
    n_images, n_concepts, _ = code.embeddings.shape
    n_classes = phi[-1].out_features
    truth = torch.zeros(n_images, n_classes)
    for n, j in itertools.product(range(n_images), range(n_classes)):
        scores = torch.stack([psi(code.embeddings[n, i])[j] for i in range(n_concepts)])
        share = (scores.exp() / scores.exp().sum()).log()
        so_far = 1.0
        for i in range(n_concepts):
            polarity = float(torch.sigmoid(phi(code.embeddings[n, i])[j]))
            if logic == "paper":
                term = either(1 - polarity, float(torch.sigmoid(scores[i])))
            else:
                c = float(code.probabilities[n, i])
                chosen = float(torch.sigmoid(share[i] - temperature * share.mean()))
                term = either(both(either(1 - polarity, c), either(polarity, 1 - c)), 1 - chosen)
            so_far = both(so_far, term)
        truth[n, j] = so_far
    return truth


@pytest.mark.parametrize("logic", ["paper", "dcr"])
@pytest.mark.parametrize("t_norm", ["godel", "product"])
@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_the_rule_is_the_formula(logic: str, t_norm: str, temperature: float) -> None:
    code = a_code()
    layer = reasoning_layer(3, TrainConfig(logic=logic, t_norm=t_norm, temperature=temperature))
    expected = by_hand(code, layer, logic, t_norm, temperature)
    torch.testing.assert_close(layer(code).truth, expected, rtol=1e-4, atol=2e-6)


def test_hand_worked_paper_rule() -> None:
    polarity = torch.tensor([0.9, 0.2, 0.6])
    relevance = torch.tensor([0.7, 0.1, 0.3])
    godel, product = T_NORMS["godel"], T_NORMS["product"]
    terms = godel.either(1 - polarity, relevance).view(1, 3, 1)
    assert godel.log_all(terms).exp().item() == pytest.approx(0.4)  # the third: max(0.4, 0.3)
    terms = product.either(1 - polarity, relevance).view(1, 3, 1)
    assert product.log_all(terms).exp().item() == pytest.approx(0.73 * 0.82 * 0.58, rel=1e-5)


@given(st.sampled_from(["godel", "product"]), st.booleans(), st.booleans())
def test_t_norms_are_boolean_logic_at_the_corners(name: str, a: bool, b: bool) -> None:
    norm = T_NORMS[name]
    x, y = torch.tensor(float(a)), torch.tensor(float(b))
    assert norm.both(x, y).item() == float(a and b)
    assert norm.either(x, y).item() == float(a or b)
    assert norm.equivalent(x, y).item() == float(a == b)


def test_selection_at_one_takes_the_better_half_and_at_a_hundred_all() -> None:
    scores = torch.tensor([3.0, 0.0, -1.0, 2.5]).view(1, 4, 1)
    assert (soft_selection(scores, 1.0) > 0.5).flatten().tolist() == [True, False, False, True]
    assert (soft_selection(scores, 100.0) > 0.5).all()


@pytest.mark.parametrize("logic", ["paper", "dcr"])
@pytest.mark.parametrize("t_norm", ["godel", "product"])
def test_permuting_concepts_permutes_the_rule_and_leaves_its_truth(logic: str, t_norm: str) -> None:
    code, order = a_code(), torch.tensor([2, 0, 3, 1])
    layer = reasoning_layer(3, TrainConfig(logic=logic, t_norm=t_norm, temperature=1.0))
    rule, permuted = layer(code), layer(ConceptCode(*(part[:, order] for part in code)))
    torch.testing.assert_close(permuted.truth, rule.truth)
    torch.testing.assert_close(permuted.polarity, rule.polarity[:, order])
    torch.testing.assert_close(permuted.relevance, rule.relevance[:, order])


@pytest.mark.parametrize("logic", ["paper", "dcr"])
@pytest.mark.parametrize("t_norm", ["godel", "product"])
def test_gradients_stay_finite_for_hundreds_of_concepts_and_extreme_embeddings(logic: str, t_norm: str) -> None:
    torch.manual_seed(0)
    embeddings = (1e3 * torch.randn(3, 300, 8)).requires_grad_()
    logits = (50 * torch.randn(3, 300)).requires_grad_()
    rule = reasoning_layer(4, TrainConfig(logic=logic, t_norm=t_norm))(
        ConceptCode(embeddings, logits, logits.sigmoid())
    )
    torch.nn.functional.cross_entropy(rule.logits, torch.tensor([0, 1, 2])).backward()
    assert torch.isfinite(rule.logits).all()
    assert torch.isfinite(embeddings.grad).all()
    assert torch.isfinite(rule.truth).all()
    assert ((rule.truth >= 0) & (rule.truth <= 1)).all()


def test_log_odds_are_those_of_the_truth() -> None:
    rule = reasoning_layer(3, TrainConfig())(a_code())
    torch.testing.assert_close(rule.logits, torch.logit(rule.truth), rtol=1e-4, atol=1e-4)


def test_the_encoder_is_its_formula_for_each_concept() -> None:
    torch.manual_seed(1)
    encoder = ConceptEncoder(6, 3, 2)
    f = torch.randn(4, 6)
    code = encoder(f)
    for i in range(3):
        rows = slice(4 * i, 4 * (i + 1))
        pair = torch.nn.functional.leaky_relu(f @ encoder.contexts.weight[rows].T + encoder.contexts.bias[rows])
        c = torch.sigmoid(pair @ encoder.score.weight[0] + encoder.score.bias)
        torch.testing.assert_close(code.probabilities[:, i], c)
        torch.testing.assert_close(code.embeddings[:, i], c[:, None] * pair[:, :2] + (1 - c[:, None]) * pair[:, 2:])


@pytest.mark.parametrize("t_norm", ["godel", "product"])
@pytest.mark.parametrize("temperature", [1.0, 10.0, 100.0])
def test_the_reasoner_is_that_of_torch_explain(t_norm: str, temperature: float) -> None:
    theirs = ConceptReasoningLayer(8, 3, {"godel": GodelTNorm(), "product": ProductTNorm()}[t_norm], temperature)
    ours = reasoning_layer(3, TrainConfig(logic="dcr", t_norm=t_norm, temperature=temperature))
    ours.sign.load_state_dict(theirs.sign_nn.state_dict())
    ours.filter.load_state_dict(theirs.filter_nn.state_dict())
    code = a_code(n_images=50)
    with torch.no_grad():
        truth, sign, chosen = theirs(code.embeddings, code.probabilities, return_attn=True)
        rule = ours(code)
    torch.testing.assert_close(rule.polarity, sign)
    torch.testing.assert_close(rule.relevance, chosen)
    # Their truth may be 0, where the logarithm that a loss takes has no gradient; ours stays above SMALLEST_TRUTH.
    torch.testing.assert_close(rule.truth, truth.clamp(min=1e-6), rtol=1e-4, atol=2e-6)


def test_the_papers_rule_is_not_the_one_that_torch_explain_and_the_public_code_have() -> None:
    """METHOD, section 3: in the paper a concept's truth value takes part through its embedding alone."""
    code = a_code()
    absent = ConceptCode(code.embeddings, code.logits, torch.zeros_like(code.probabilities))
    paper, dcr = (reasoning_layer(3, TrainConfig(logic=logic, temperature=1.0)) for logic in ("paper", "dcr"))
    torch.testing.assert_close(paper(absent).truth, paper(code).truth)
    assert not torch.allclose(dcr(absent).terms, dcr(code).terms)


@pytest.mark.parametrize("logic", ["paper", "dcr"])
@pytest.mark.parametrize("t_norm", ["godel", "product"])
@settings(max_examples=25, deadline=None)
@given(
    scale=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4, 1e15]),
    logit=st.floats(-1e4, 1e4, width=32),
    n_concepts=st.integers(1, 60),
    temperature=st.floats(0.01, 1000),
)
def test_truth_and_gradients_are_finite_for_any_input(
    logic: str, t_norm: str, scale: float, logit: float, n_concepts: int, temperature: float
) -> None:
    torch.manual_seed(n_concepts)
    embeddings = (scale * torch.randn(2, n_concepts, 8)).requires_grad_()
    logits = torch.full((2, n_concepts), logit, requires_grad=True)
    layer = reasoning_layer(3, TrainConfig(logic=logic, t_norm=t_norm, temperature=temperature))
    rule = layer(ConceptCode(embeddings, logits, logits.sigmoid()))
    torch.nn.functional.cross_entropy(rule.logits, torch.tensor([0, 2])).backward()
    assert torch.isfinite(rule.logits).all()
    assert torch.isfinite(rule.log_truth).all()
    assert torch.isfinite(embeddings.grad).all()
    assert logits.grad is None or torch.isfinite(logits.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None)
