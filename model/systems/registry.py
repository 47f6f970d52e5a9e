"""One list of networks that can be trained, and one of systems that `compare` sets side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_contracts.errors import ConfigurationError
from model.config import Family, TrainConfig
from model.network import Head, MedMICN, Sizes
from model.systems.baselines import BlackBox, ConceptBottleneck, RuleOnly

FAMILIES: dict[Family, Callable[[Sizes, TrainConfig], Head]] = {
    "med-micn": MedMICN,
    "black-box": BlackBox,
    "concept-bottleneck": ConceptBottleneck,
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


SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        System("black-box", "A linear layer on the features: no concepts.", {"family": "black-box"}),
        System("concept-bottleneck", "Linear concepts, then linear classes.", {"family": "concept-bottleneck"}),
        System("rule-only", "Deep Concept Reasoner: the rule decides.", {"family": "rule-only", "logic": "dcr"}),
        System("med-micn-paper", "Med-MICN with the paper's rule.", {"family": "med-micn", "logic": "paper"}),
        System("med-micn-dcr", "Med-MICN with the public code's rule.", {"family": "med-micn", "logic": "dcr"}),
    )
}


def build_network(sizes: Sizes, config: TrainConfig) -> Head:
    """The untrained network of the configured family."""
    return FAMILIES[config.family](sizes, config)


def system(name: str) -> System:
    """The system of that name; raises `ConfigurationError` for others."""
    if name not in SYSTEMS:
        raise ConfigurationError(f"system: expected one of {', '.join(SYSTEMS)}, got {name!r}.")
    return SYSTEMS[name]
