"""What the classifier would say if a person corrected its concepts: one image, before and after.

A correction replaces the network's own truth value ĉ of a concept; the class, the rule and every other number follow
from it by the trained weights. Naming one value of a mutually exclusive attribute corrects its other values too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data_contracts.concepts import Vocabulary
from data_contracts.errors import InputRefused
from data_contracts.ports import Pixels
from model.concept_encoder import Intervention
from model.network import Head, NetworkOutput
from model.predict import Classifier, Prediction


@dataclass(frozen=True)
class Intervened:
    """One image's prediction with the network's own concepts, and with a person's corrections in their place."""

    before: Prediction
    after: Prediction
    corrections: dict[str, bool]
    """Every concept that was set, by id: those asked for, and those that an exclusive attribute implies."""

    @property
    def changes_class(self) -> bool:
        """Whether the corrections change the decision."""
        return self.before.class_name != self.after.class_name


def intervene(classifier: Classifier, pixels: Pixels, corrections: Mapping[str, bool]) -> Intervened:
    """What the classifier says of one image (H, W, 3) before and after concepts are set present or absent, by id.

    Raises `ContractViolation` for an unknown concept, and `InputRefused` for a system without concepts or for two
    values of one exclusive attribute.
    """
    wanted = with_implied(corrections, classifier.vocabulary)
    if not classifier.has_concepts:
        raise InputRefused(
            f"correction: expected a system that predicts concepts, got one of the family {classifier.config.family!r}"
            ", which has none to correct; nothing was predicted."
        )
    (before,) = classifier.predict([pixels])
    corrected = replace(classifier, network=CorrectedHead(classifier.network, wanted, classifier.vocabulary))
    (after,) = corrected.predict([pixels])
    return Intervened(before, after, wanted)


def with_implied(corrections: Mapping[str, bool], vocabulary: Vocabulary) -> dict[str, bool]:
    """The corrections, and absent for every other value of an exclusive attribute of which one is set present.

    Raises `ContractViolation` for an unknown concept, `InputRefused` for two present values of one attribute.
    """
    for concept_id in corrections:
        vocabulary.position(concept_id)
    implied: dict[str, bool] = {}
    for group, members in vocabulary.groups.items():
        present = [c for c in members if corrections.get(c)]
        if len(present) > 1:
            raise InputRefused(
                f"correction of {group!r}: expected one value, since exactly one holds, got "
                f"{' and '.join(vocabulary[c].name for c in present)}; nothing was predicted."
            )
        if present:
            implied |= dict.fromkeys(members, False)
    return {**implied, **{concept_id: bool(value) for concept_id, value in corrections.items()}}


class CorrectedHead(Head):
    """A head to which the same corrections are made for every image."""

    values: Tensor
    where: Tensor

    def __init__(self, head: Head, corrections: Mapping[str, bool], vocabulary: Vocabulary) -> None:
        """Wrap a trained head; its weights are shared, not copied."""
        super().__init__()
        self.head = head
        values = [float(corrections.get(c, False)) for c in vocabulary.ids]
        self.register_buffer("values", torch.tensor(values), persistent=False)
        self.register_buffer("where", torch.tensor([c in corrections for c in vocabulary.ids]), persistent=False)

    def forward(self, f: Tensor, intervention: Intervention | None = None) -> NetworkOutput:
        """(B, F) → what follows from the corrected concepts; a further intervention goes before them."""
        values, where = self.values.expand(len(f), -1), self.where.expand(len(f), -1)
        if intervention is not None:
            values = torch.where(intervention.where, intervention.values, values)
            where = where | intervention.where
        return self.head(f, Intervention(values, where))
