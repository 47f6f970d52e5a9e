"""Fuzzy rules over concepts: the t-norms, the paper's rule and the concept reasoner of its public code.

Truth values live in [0, 1]. A conjunction over many concepts is carried as its logarithm: with the product
t-norm the truth of two hundred half-true terms would be zero in single precision, and so would its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.concept_encoder import ConceptCode
from model.config import TNorm as TNormName
from model.config import TrainConfig

SMALLEST_TRUTH = 1e-6
"""Truth values are kept this far from 0 and 1 wherever a logarithm is taken."""


class Rule(NamedTuple):
    """What a logic layer says of B images, K concepts and C classes; every number but the first is in [0, 1]."""

    log_truth: Tensor  # (B, C)  log ŷ_neural
    polarity: Tensor  # (B, K, C)  I_o, or the sign in `dcr`: above ½ the concept is asked for, below its absence
    relevance: Tensor  # (B, K, C)  I_r, or the filter in `dcr`: above ½ the concept takes part in the rule
    terms: Tensor  # (B, K, C)  truth of each term of the conjunction

    @property
    def truth(self) -> Tensor:
        """(B, C) ŷ_neural, the truth of each class's rule."""
        return self.log_truth.exp()

    @property
    def logits(self) -> Tensor:
        """(B, C) log-odds of ŷ_neural: what losses and argmax may read."""
        log_truth = self.log_truth.clamp(max=-SMALLEST_TRUTH)
        return log_truth - torch.log(-torch.expm1(log_truth))


@dataclass(frozen=True)
class TNorm:
    """A fuzzy `and`, its dual `or`, and the log-truth of a conjunction over all concepts."""

    both: Callable[[Tensor, Tensor], Tensor]
    either: Callable[[Tensor, Tensor], Tensor]
    log_all: Callable[[Tensor], Tensor]
    """(B, K, C) terms → (B, C) logarithm of their conjunction over K."""

    def equivalent(self, a: Tensor, b: Tensor) -> Tensor:
        """A ⇔ b, as (¬a ∨ b) ∧ (a ∨ ¬b)."""
        return self.both(self.either(1 - a, b), self.either(a, 1 - b))


def _log(truth: Tensor) -> Tensor:
    return truth.clamp(min=SMALLEST_TRUTH).log()


T_NORMS: dict[TNormName, TNorm] = {
    "godel": TNorm(torch.minimum, torch.maximum, lambda terms: _log(terms.amin(dim=1))),
    "product": TNorm(torch.mul, lambda a, b: a + b - a * b, lambda terms: _log(terms).sum(dim=1)),
}


def _per_class(embedding_size: int, n_classes: int) -> nn.Sequential:
    """Φ or Ψ: a small network (m) → (C), the same one for every concept."""
    return nn.Sequential(
        nn.Linear(embedding_size, embedding_size), nn.LeakyReLU(), nn.Linear(embedding_size, n_classes)
    )


class PaperRule(nn.Module):
    """ŷ_j = ⋀_i (¬I_o[i,j] ∨ I_r[i,j]) with polarity I_o = Φ_j(e_i) and relevance I_r = Ψ_j(e_i).

    The concept's truth value ĉ_i takes no part other than through its embedding, so a rule read from it is a
    reading whose fidelity has to be measured.
    """

    def __init__(self, embedding_size: int, n_classes: int, t_norm: TNormName) -> None:
        """Make the layer with random weights."""
        super().__init__()
        self.t_norm = T_NORMS[t_norm]
        self.polarity = _per_class(embedding_size, n_classes)
        self.relevance = _per_class(embedding_size, n_classes)

    def forward(self, concepts: ConceptCode) -> Rule:
        """The rule of every class for every image."""
        polarity = self.polarity(concepts.embeddings).sigmoid()  # I_o (B, K, C)
        relevance = self.relevance(concepts.embeddings).sigmoid()  # I_r (B, K, C)
        terms = self.t_norm.either(1 - polarity, relevance)
        return Rule(self.t_norm.log_all(terms), polarity, relevance, terms)


class ReasonerRule(nn.Module):
    """ŷ_j = ⋀_i ((sign_ij ⇔ ĉ_i) ∨ ¬filter_ij): the Deep Concept Reasoner (Barbiero et al., ICML 2023).

    Here the concept's truth value takes part, so the rule is the prediction.
    """

    def __init__(self, embedding_size: int, n_classes: int, t_norm: TNormName, temperature: float) -> None:
        """Make the layer with random weights."""
        super().__init__()
        self.t_norm = T_NORMS[t_norm]
        self.temperature = temperature
        self.sign = _per_class(embedding_size, n_classes)
        self.filter = _per_class(embedding_size, n_classes)

    def forward(self, concepts: ConceptCode) -> Rule:
        """The rule of every class for every image."""
        sign = self.sign(concepts.embeddings).sigmoid()  # (B, K, C)
        chosen = soft_selection(self.filter(concepts.embeddings), self.temperature)  # (B, K, C)
        agrees = self.t_norm.equivalent(sign, concepts.probabilities.unsqueeze(-1))
        terms = self.t_norm.either(agrees, 1 - chosen)
        return Rule(self.t_norm.log_all(terms), sign, chosen, terms)


def soft_selection(scores: Tensor, temperature: float) -> Tensor:
    """(B, K, C) scores → how far each concept is chosen, in [0, 1]: σ(s − temperature · mean_i s), s = log-softmax_i.

    At temperature 1 the concepts above the average are chosen; as s is negative, a high one chooses nearly all.
    """
    log_share = torch.log_softmax(scores, dim=1)
    return torch.sigmoid(log_share - temperature * log_share.mean(dim=1, keepdim=True))


def reasoning_layer(n_classes: int, config: TrainConfig) -> PaperRule | ReasonerRule:
    """The configured logic layer."""
    if config.logic == "paper":
        return PaperRule(config.embedding_size, n_classes, config.t_norm)
    return ReasonerRule(config.embedding_size, n_classes, config.t_norm, config.temperature)
