from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch_explain.nn.concepts import ConceptEmbedding

from model.concept_encoder import Intervention
from model.config import TrainConfig
from model.losses import LossWeights, Targets, losses
from model.network import Sizes
from model.systems.cem import ConceptEmbeddingModel
from model.systems.finish import finished, set_class_layer
from model.systems.registry import FAMILIES, SYSTEMS, build_network

SIZES = Sizes(n_features=6, n_concepts=4, n_classes=3)
WITH_CONCEPTS = [name for name in SYSTEMS if name != "black-box"]
FUSIONS = ["concat", "residual", "bottleneck"]


def head_of(name: str, sizes: Sizes = SIZES, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    return build_network(sizes, SYSTEMS[name].config(TrainConfig(dropout=0.0, **changes)))


def total_loss(head: nn.Module, f: torch.Tensor) -> torch.Tensor:
    n, k = len(f), SIZES.n_concepts
    targets = Targets(torch.arange(n) % 3, torch.rand(n, k).round(), torch.ones(n, k, dtype=torch.bool))
    return losses(head(f), targets, LossWeights(1.0, 0.1, torch.ones(3))).total


def test_every_family_is_a_row_of_the_comparison() -> None:
    assert {one.config(TrainConfig()).family for one in SYSTEMS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", list(SYSTEMS))
@settings(max_examples=15, deadline=None)
@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 1000))
def test_losses_and_gradients_are_finite_for_any_features(name: str, scale: float, seed: int) -> None:
    head = head_of(name)
    torch.manual_seed(seed)
    f = (scale * torch.randn(5, 6)).requires_grad_()
    loss = total_loss(head, f)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(f.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", WITH_CONCEPTS)
def test_permuting_concepts_permutes_what_is_said_of_them_and_nothing_else(name: str) -> None:
    order = torch.tensor([2, 0, 3, 1])
    head, permuted = head_of(name).eval(), head_of(name).eval()
    permuted.load_state_dict({key: permute(key, value, order) for key, value in head.state_dict().items()})
    f = torch.randn(5, 6)
    with torch.no_grad():
        one, other = head(f), permuted(f)
    torch.testing.assert_close(other.class_logits, one.class_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.concepts.probabilities, one.concepts.probabilities[:, order])
    torch.testing.assert_close(other.concepts.embeddings, one.concepts.embeddings[:, order])


def permute(key: str, value: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """A head's tensor with the concepts in another order."""
    k = SIZES.n_concepts
    if key.startswith(("concepts.contexts", "concepts.weight", "concepts.bias", "score_")):
        return value.unflatten(0, (k, -1))[order].flatten(0, 1)
    if key == "classes.weight":
        return value.unflatten(1, (k, -1))[:, order].flatten(1)
    if key == "fusion.weight":
        n = SIZES.n_features
        return torch.cat([value[:, :n], value[:, n:].unflatten(1, (k, -1))[:, order].flatten(1)], dim=1)
    return value


@pytest.mark.parametrize("name", WITH_CONCEPTS)
def test_a_correction_changes_the_decision_and_the_concept_it_names_only(name: str) -> None:
    head = head_of(name).eval()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    f = torch.randn(5, 6)
    where = torch.zeros(5, 4, dtype=torch.bool)
    where[:, 1] = True
    with torch.no_grad():
        before = head(f)
        after = head(f, Intervention((before.concepts.probabilities < 0.5).float(), where))
    assert not torch.allclose(after.class_logits, before.class_logits, atol=1e-4)
    others = [0, 2, 3]
    torch.testing.assert_close(after.concepts.probabilities[:, others], before.concepts.probabilities[:, others])
    torch.testing.assert_close(after.concepts.logits, before.concepts.logits)


@pytest.mark.parametrize("name", ["label-free-cbm", "sequential-cbm"])
def test_classes_never_shape_the_concepts_of_sequential_systems(name: str) -> None:
    head = head_of(name)
    head(torch.randn(5, 6)).class_logits.square().sum().backward()
    assert head.concepts.weight.grad is None
    assert head.classes.weight.grad.abs().sum() > 0
    joint = head_of("joint-cbm")
    joint(torch.randn(5, 6)).class_logits.square().sum().backward()
    assert joint.concepts.weight.grad.abs().sum() > 0


def test_concept_embeddings_are_those_of_torch_explain() -> None:
    theirs = ConceptEmbedding(6, 4, 8, training_intervention_prob=0.0)
    ours = head_of("cem").concepts
    with torch.no_grad():
        ours.contexts.weight.copy_(torch.cat([layer[0].weight for layer in theirs.concept_context_generators]))
        ours.contexts.bias.copy_(torch.cat([layer[0].bias for layer in theirs.concept_context_generators]))
        ours.score.load_state_dict(theirs.concept_prob_predictor[0].state_dict())
        f, labels = torch.randn(7, 6), torch.randint(0, 2, (7, 4)).float()
        plain, corrected = theirs(f), theirs(f, intervention_idxs=[1, 2], c=labels)
        where = torch.tensor([False, True, True, False]).expand(7, 4)
        code, told = ours(f), ours(f, Intervention(labels, where))
    torch.testing.assert_close(code.embeddings, plain[0])
    torch.testing.assert_close(code.probabilities, plain[1])
    torch.testing.assert_close(told.embeddings, corrected[0])
    # Theirs returns the network's own probabilities beside corrected embeddings: our logits; our ĉ is corrected too.
    torch.testing.assert_close(told.logits.sigmoid(), corrected[1])
    torch.testing.assert_close(told.probabilities, torch.where(where, labels, corrected[1]))


def test_cem_is_trained_with_randint_and_reads_embeddings_alone() -> None:
    config = SYSTEMS["cem"].config(TrainConfig())
    assert config.randint_probability == 0.25
    assert build_network(SIZES, config).classes.in_features == 4 * config.embedding_size
    assert isinstance(build_network(SIZES, config), ConceptEmbeddingModel)


# ---- fusion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", FUSIONS)
def test_what_passes_the_concepts_by_is_what_remains_without_them(fusion: str) -> None:
    head = head_of("med-micn-paper", fusion=fusion).eval()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    f = torch.randn(5, 6)
    with torch.no_grad():
        output = head(f)
        layer = head.fusion if fusion != "residual" else head.fusion.classes
        n = layer.weight.shape[1] - 4 * TrainConfig().embedding_size
        by_concepts = output.concepts.embeddings.flatten(1) @ layer.weight[:, n:].T + layer.bias
    side = torch.zeros_like(by_concepts) if output.side_logits is None else output.side_logits
    torch.testing.assert_close(output.class_logits, by_concepts + side)
    assert (output.side_logits is None) == (fusion == "bottleneck")


def test_concatenation_is_the_papers_one_linear_layer() -> None:
    head = head_of("med-micn-paper").eval()
    f = torch.randn(5, 6)
    with torch.no_grad():
        output = head(f)
        both = torch.cat([head.standardise(f), output.concepts.embeddings.flatten(1)], dim=1)
        torch.testing.assert_close(output.class_logits, head.fusion(both[:, :6], both[:, 6:]).logits)
        torch.testing.assert_close(output.class_logits, both @ head.fusion.weight.T + head.fusion.bias)


def test_in_a_residual_fusion_the_side_channel_learns_only_where_it_is_shown_and_the_concepts_where_not() -> None:
    torch.manual_seed(0)
    fusion = head_of("med-micn-paper", fusion="residual").fusion.train()
    nn.init.normal_(fusion.side.weight)
    f, e = torch.randn(200, 6, requires_grad=True), torch.randn(200, 32, requires_grad=True)
    fused = fusion(f, e)
    fused.logits.sum().backward()
    hidden = (fused.side_logits == 0).all(1)
    assert 0.3 < hidden.float().mean() < 0.7
    assert (e.grad[hidden] != 0).all()
    assert (e.grad[~hidden] == 0).all()
    assert f.grad is None
    shown = f.detach()[~hidden].sum(0).expand(3, -1)
    torch.testing.assert_close(fusion.side.weight.grad, shown, rtol=1e-4, atol=1e-4)


# ---- class layers that are fitted afterwards ---------------------------------------------------------------------


def test_a_fitted_class_layer_gives_the_logits_it_was_fitted_for() -> None:
    from model.systems.elastic_net import LinearClasses

    head = head_of("label-free-cbm").eval()
    f = torch.randn(40, 6)
    with torch.no_grad():
        head.set_score_scale(head(f).concepts.embeddings[..., 0])
        layer = LinearClasses(np.arange(12.0).reshape(3, 4), np.ones(3), 0.1)
        set_class_layer(head, layer)
        output = head(f)
        scores = (output.concepts.embeddings[..., 0] - head.score_mean) / head.score_deviation
    torch.testing.assert_close(scores.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.std(0, correction=0), torch.ones(4))
    np.testing.assert_allclose(output.class_logits.numpy(), layer.logits(scores.double().numpy()), rtol=1e-4, atol=1e-4)


def test_other_systems_are_left_as_they_were_trained(trained) -> None:
    run = trained["paper"]
    assert finished(run.best, run.prepared, run.config) is run.best
