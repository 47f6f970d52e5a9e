"""One list of networks that can be trained, and one of systems that `compare` sets side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_contracts.errors import ConfigurationError
from model.config import Family, TrainConfig
from model.network import Head, MedMICN, Sizes
from model.systems.black_box import BlackBox
from model.systems.cem import ConceptEmbeddingModel
from model.systems.joint_cbm import JointCBM
from model.systems.label_free_cbm import LabelFreeCBM
from model.systems.rule_only import RuleOnly
from model.systems.sequential_cbm import SequentialCBM

FAMILIES: dict[Family, Callable[[Sizes, TrainConfig], Head]] = {
    "med-micn": MedMICN,
    "black-box": BlackBox,
    "label-free-cbm": LabelFreeCBM,
    "sequential-cbm": SequentialCBM,
    "joint-cbm": JointCBM,
    "cem": ConceptEmbeddingModel,
    "rule-only": RuleOnly,
}
"""How a family's network is built; every forward pass gives a `NetworkOutput`."""


@dataclass(frozen=True)
class System:
    """A named row of the comparison: the common configuration with these keys set."""

    name: str
    sentence: str
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def config(self, common: TrainConfig) -> TrainConfig:
        """The common configuration as this system needs it."""
        return TrainConfig.model_validate(common.model_dump() | dict(self.overrides))


def _med_micn(name: str, sentence: str, **overrides: str) -> System:
    return System(name, sentence, {"family": "med-micn", **overrides})


SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        System("black-box", "A linear layer on the features: no concepts.", {"family": "black-box"}),
        System("label-free-cbm", "Concepts, then a sparse linear layer on their scores.", {"family": "label-free-cbm"}),
        System("sequential-cbm", "Concepts, then a linear layer on their probabilities.", {"family": "sequential-cbm"}),
        System("joint-cbm", "Linear concepts and linear classes, trained together.", {"family": "joint-cbm"}),
        System(
            "cem",
            "Concept embeddings and a linear layer, trained with RandInt.",
            {"family": "cem", "randint_probability": 0.25},
        ),
        System("dcr", "Deep Concept Reasoner: the rule decides.", {"family": "rule-only", "logic": "dcr"}),
        _med_micn("med-micn-paper", "Med-MICN with the paper's rule, Gödel.", logic="paper", t_norm="godel"),
        _med_micn("med-micn-paper-product", "The same with the product t-norm.", logic="paper", t_norm="product"),
        _med_micn("med-micn-dcr", "Med-MICN with its public code's rule, Gödel.", logic="dcr", t_norm="godel"),
        _med_micn("med-micn-dcr-product", "The same with the product t-norm.", logic="dcr", t_norm="product"),
    )
}
"""The rows that `medmicn compare` has by default."""


def build_network(sizes: Sizes, config: TrainConfig) -> Head:
    """The untrained network of the configured family."""
    return FAMILIES[config.family](sizes, config)


def system(name: str) -> System:
    """The system of that name; raises `ConfigurationError` for others."""
    if name not in SYSTEMS:
        raise ConfigurationError(f"system: expected one of {', '.join(SYSTEMS)}, got {name!r}.")
    return SYSTEMS[name]
