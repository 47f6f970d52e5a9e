"""What flows hand to the review page, over the finished run: prices of changes, predictions, interventions."""

from __future__ import annotations

import pytest

from data_contracts.tables import ConceptStatus, DropReason
from flows.chain import Context
from flows.console import Console
from flows.review_ports import review_ports
from flows.settings import Settings
from flows.steps import image_reader
from pipeline.review.ports import Ports
from pipeline.review.vocabulary_edits import Edit, apply
from tests.flows.conftest import Finished


@pytest.fixture(scope="module")
def context(finished: Finished) -> Context:
    settings = Settings.model_validate(finished.run.read_manifest().config)
    return Context(finished.run, settings, Console(quiet=True))


@pytest.fixture(scope="module")
def ports(context: Context) -> Ports:
    return review_ports(context, image_reader(context))


def test_what_stands_costs_nothing_and_a_new_concept_costs_a_question_an_image(
    ports: Ports, finished: Finished
) -> None:
    assert ports.cost is not None
    concepts = finished.run.read_concepts()
    n_images = int(finished.run.read_images()["rejected"].isna().sum())
    now = ports.cost(concepts)
    assert (now.n_questions, now.n_requests) == (0, 0)
    after = ports.cost(apply(concepts, Edit("add", name="a new concept"), "Dr A").concepts)
    assert after.n_requests >= n_images
    assert after.reasons["never asked"] == n_images
    assert "nothing" in after.price


def test_a_price_is_asked_without_changing_the_run(ports: Ports, finished: Finished) -> None:
    assert ports.cost is not None
    concepts = finished.run.read_concepts()
    kept = concepts.loc[concepts["status"] == ConceptStatus.KEPT, "concept_id"]
    dropped = apply(concepts, Edit("drop", kept.iloc[0]), "Dr A").concepts
    ports.cost(dropped)
    assert (dropped["reason"] == DropReason.BY_USER).sum() == 1
    assert finished.run.read_concepts().equals(concepts)


def test_the_trained_model_predicts_and_is_intervened_on(ports: Ports, finished: Finished) -> None:
    assert ports.predict is not None
    assert ports.intervene is not None
    images = finished.run.read_images()
    image_id = images.loc[images["rejected"].isna(), "image_id"].iloc[0]
    said = ports.predict(image_id)
    assert said.class_map is not None
    assert sum(said.class_probabilities.values()) == pytest.approx(1, abs=1e-4)
    concept_id, probability = next(iter(said.concept_probabilities.items()))
    before, after = ports.intervene(image_id, {concept_id: probability < 0.5, "not-a-concept": True})
    assert before.concept_probabilities == pytest.approx(said.concept_probabilities, abs=1e-5)
    assert (after.concept_probabilities[concept_id] > 0.5) == (probability < 0.5)
    assert after.class_probabilities != before.class_probabilities
