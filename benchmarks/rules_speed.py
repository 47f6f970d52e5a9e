"""How long it takes to read, simplify and measure rules over many images.

    python benchmarks/rules_speed.py [--images 100000] [--concepts 40] [--classes 5]

Outputs of a network are simulated: each class has a few true reasons, most images of it share one of some hundred
image rules with additional terms, and one in five has a rule of its own. Beside it, on 2,000 images and scaled up: a
walk over the images in Python, as the public explainer of the Deep Concept Reasoner takes it, which only formats rules
and counts equal ones.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

import numpy as np

from data_contracts.concepts import Concept, Vocabulary
from model.explain.bootstrap import Resampling
from model.explain.class_rules import read_class_rules
from model.explain.rule_evidence import Measured, class_rules, class_summary
from model.explain.rules import image_rules, literals_of
from model.outputs import Outputs


def simulated(n_images: int, n_concepts: int, n_classes: int, seed: int = 0) -> Outputs:
    """Outputs of a network with reasons to be found."""
    rng = np.random.default_rng(seed)
    concepts = rng.random((n_images, n_concepts)).astype(np.float32)
    present = concepts >= 0.5
    predicted = rng.integers(0, n_classes, n_images)
    for j in range(n_classes):
        reason = present[:, 2 * j] & ~present[:, 2 * j + 1] & present[:, 2 * n_classes]
        predicted[reason] = j
    common = rng.random((300, n_concepts)) < 0.4
    own = rng.random((n_images, n_concepts)) < 0.4
    used = np.where((rng.random(n_images) < 0.2)[:, None], own, common[rng.integers(0, 300, n_images)])
    for j in range(n_classes):
        used[np.ix_(predicted == j, [2 * j, 2 * j + 1, 2 * n_classes])] = True
    relevance = np.full((n_images, n_concepts, n_classes), 0.1, np.float32)
    polarity = np.repeat(np.where(present, 0.9, 0.1).astype(np.float32)[:, :, None], n_classes, axis=2)
    rows = np.arange(n_images)
    relevance[rows, :, predicted] = np.where(used, 0.9, 0.1)
    truth = rng.random((n_images, n_classes)).astype(np.float32)
    return Outputs(np.eye(n_classes, dtype=np.float32)[predicted], concepts, polarity, relevance, truth)


def walked(outputs: Outputs, names: tuple[str, ...]) -> Counter[str]:
    """Equal rules counted by a walk over the images."""
    literals = literals_of(outputs, outputs.predicted)
    found: Counter[str] = Counter()
    for n in range(len(literals.used)):
        terms = []
        for k, name in enumerate(names):
            if literals.used[n, k]:
                terms.append(name if literals.present[n, k] else f"~{name}")
        found[f"{outputs.predicted[n]} <- {' & '.join(terms)}"] += 1
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--concepts", type=int, default=40)
    parser.add_argument("--classes", type=int, default=5)
    options = parser.parse_args()
    outputs = simulated(options.images, options.concepts, options.classes)
    vocabulary = Vocabulary.of([Concept(f"c{k}", f"concept {k}") for k in range(options.concepts)])
    names = tuple(f"class {j}" for j in range(options.classes))
    y = outputs.predicted
    clock = [time.perf_counter()]
    rules = read_class_rules(outputs, vocabulary, names)
    clock.append(time.perf_counter())
    table = class_rules(rules, outputs, y, vocabulary, names)
    class_summary(rules, Measured(outputs, y, vocabulary, names, Resampling(len(y))))
    clock.append(time.perf_counter())
    images = image_rules(outputs, [str(n) for n in range(len(y))], vocabulary, names)
    clock.append(time.perf_counter())
    few = Outputs(*(part[:2000] for part in outputs))
    walked(few, vocabulary.names)
    clock.append(time.perf_counter())
    seconds = np.diff(clock)
    print(f"{options.images} images, {options.concepts} concepts, {options.classes} classes")
    for name, value in zip(
        ("class rules: read, simplified", "class rules: measured", "rule of every image, with truths"), seconds[:3],
        strict=True,
    ):  # fmt: skip
        print(f"  {name:36} {value:7.2f} s")
    print(f"  {'all':36} {seconds[:3].sum():7.2f} s   {len(table)} class rules, {len(images)} image rules")
    print(f"  {'walk in Python: formatting, counting':36} {seconds[3] * len(y) / 2000:7.2f} s (2,000 images, scaled)")


if __name__ == "__main__":
    main()
