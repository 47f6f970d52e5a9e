"""The drift watch over a real run: a baseline, an alarm that asks a person, and what the answer does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from data_contracts.errors import ConfigurationError, ContractViolation
from data_contracts.manifest import RunManifest
from data_contracts.store import RunFolder
from flows import approval, artifacts, promotion
from flows.candidate import CandidateFolder
from flows.chain import Context, execute
from flows.console import Console
from flows.scheduling.conditions import Situation, decide
from flows.scheduling.rounds import roll_back, scheduled
from flows.settings import ScheduleSettings, restored
from pipeline.phantoms import make_phantoms
from tests.flows.conftest import Ended, Finished

Medmicn = Callable[..., Ended]

TESTS = pd.DataFrame(
    {
        "kind": ["image"],
        "quantity": ["brightness_fraction"],
        "test": ["Kolmogorov-Smirnov"],
        "n_baseline": [100],
        "n_new": [40],
        "baseline": [0.5],
        "new": [float("nan")],
        "effect": [0.9],
        "p_holm": [1e-9],
        "sentence": ["brightness: median 0.5 before, 0.2 in the new images"],
    }
)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def ask(run: RunFolder, *ids: str) -> None:
    approval.raise_question(run, f"{len(ids)} new images differ.", TESTS, list(ids))


def test_a_question_is_there_until_it_is_answered(run: RunFolder) -> None:
    assert approval.waiting(run) is None
    ask(run, "a", "b")
    question = approval.waiting(run)
    assert question is not None
    assert (question.n_images, question.tests) == (2, ("brightness: median 0.5 before, 0.2 in the new images",))
    stored = json.loads((run.drift_dir / "pending.json").read_text())
    assert set(stored) == {"raised_at", "sentence", "tests", "n_images"}
    assert stored["tests"][0]["new"] is None, "NaN is no JSON"
    assert approval.take_answer(run) is None
    ask(run, "c")
    assert approval.waiting(run) == question, "an open question stays as it is"


@pytest.mark.parametrize(("approve", "left"), [(True, set()), (False, {"a", "b"})])
def test_an_answer_decides_on_its_images(run: RunFolder, approve: bool, left: set[str]) -> None:
    ask(run, "a", "b")
    assert approval.left_out(run) == {"a", "b"}, "nothing is trained on before the answer"
    approval.answer(run, approve=approve, by="Dr. Ada")
    assert approval.left_out(run) == {"a", "b"}, "nor before it is taken"
    taken = approval.take_answer(run)
    assert taken == approval.Answer(approve, "Dr. Ada", 2)
    assert approval.left_out(run) == left
    assert set(approval.decided(run)["image_id"]) == {"a", "b"}
    assert not (run.drift_dir / "pending.json").exists()
    assert not (run.drift_dir / "decision.json").exists()
    history = json.loads(next((run.drift_dir / "history").iterdir()).read_text())
    assert (history["by"], history["decision"]) == ("Dr. Ada", "approve" if approve else "reject")


def test_the_review_page_answers_through_the_same_file(run: RunFolder) -> None:
    from pipeline.review.drift import decide as decide_on_the_page

    ask(run, "a")
    question = approval.waiting(run)
    assert question is not None
    decide_on_the_page(run, "reject", "Dr. Bea", question.raised_at)
    taken = approval.take_answer(run)
    assert taken is not None
    assert (taken.approved, taken.by) == (False, "Dr. Bea")


def test_a_refusal_can_be_taken_back(run: RunFolder) -> None:
    ask(run, "a", "b")
    approval.answer(run, approve=False, by="me")
    approval.take_answer(run)
    assert approval.take_back(run) == 2
    assert approval.left_out(run) == frozenset()
    assert approval.take_back(run) == 0


@pytest.mark.parametrize("survivors", [{"pending.json", "pending.parquet", "decision.json"}, {"decision.json"}])
def test_a_kill_while_an_answer_is_taken_changes_nothing(run: RunFolder, survivors: set[str]) -> None:
    ask(run, "a")
    approval.answer(run, approve=False, by="me")
    saved = {name: (run.drift_dir / name).read_bytes() for name in survivors}
    approval.take_answer(run)
    for name, content in saved.items():
        (run.drift_dir / name).write_bytes(content)
    approval.take_answer(run)
    assert approval.left_out(run) == {"a"}
    if survivors == {"decision.json"}:
        # The answer that was left behind must not answer the next question.
        ask(run, "b")
        assert approval.waiting(run) is not None
        assert approval.take_answer(run) is None


def test_an_answer_that_is_neither_yes_nor_no_is_refused(run: RunFolder) -> None:
    ask(run, "a")
    (run.drift_dir / "decision.json").write_text('{"decision": "perhaps"}')
    with pytest.raises(ContractViolation, match="approve or reject, got 'perhaps'"):
        approval.take_answer(run)
    assert approval.left_out(run) == {"a"}


def test_without_a_question_there_is_nothing_to_answer(run: RunFolder) -> None:
    with pytest.raises(ConfigurationError, match="expected an open question"):
        approval.answer(run, approve=True, by="me")


def test_a_person_decides_on_the_command_line(run: RunFolder, medmicn: Medmicn) -> None:
    run.write_manifest(RunManifest.new("run", "photos"))
    ask(run, "a", "b")
    decided = medmicn("reject", "--run", run.path, "--by", "Dr. Ada")
    assert decided.exit_code == 0, decided.messages
    assert decided.outcome["decision"] == {"approve": False, "n_images": 2}
    assert "medmicn run photos" in decided.messages
    assert json.loads((run.drift_dir / "decision.json").read_text())["by"] == "Dr. Ada"
    again = medmicn("approve", "--run", run.path)
    assert again.exit_code == 2
    assert "open question" in again.outcome["error"]


def test_what_was_refused_is_not_seen_by_training(run: RunFolder) -> None:
    from tests.flows.test_promotion import images_of

    run.write_images(images_of("a", "b", "c"))
    ask(run, "b")
    assert CandidateFolder(run.path).read_images()["image_id"].tolist() == ["a", "c"]
    assert len(run.read_images()) == 3, "labels and review still have it"


# ---- conditions of training ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (Situation(has_model=False), "there is no model yet"),
        (Situation(unfinished=True), "the last training was not finished"),
        (Situation(classes_changed=True), "the classes changed"),
        (Situation(vocabulary_changed=True), "the concepts changed"),
        (Situation(settings_changed=True), "the settings of training changed"),
        (Situation(n_new_images=100), "100 new images"),
        (Situation(n_corrections=20), "20 new corrections"),
        (Situation(n_approved=1, n_new_images=1), "1 drifted images were approved"),
    ],
)
def test_each_condition_trains_and_says_so(found: Situation, expected: str) -> None:
    decision = decide(found, ScheduleSettings())
    assert decision.train
    assert expected in decision.sentence


def test_without_a_condition_the_sentence_says_how_far_each_one_is() -> None:
    decision = decide(Situation(n_new_images=12, n_corrections=3), ScheduleSettings())
    assert not decision.train
    assert decision.sentence == "no training: 12 of 100 new images with a class, 3 of 20 new corrections"
    never = ScheduleSettings(retrain_after_new_images=None, retrain_on_drift=False)
    decision = decide(Situation(n_new_images=10**6, n_approved=50), never)
    assert not decision.train
    assert "which are no reason" in decision.sentence
    assert not decide(Situation(has_classes=False, has_model=False), ScheduleSettings()).train


# ---- a real run ----------------------------------------------------------------------------------------------


def darker(path: Path) -> None:
    image = Image.open(path).convert("RGB")
    image.point(lambda value: value // 2).save(path)


def repeated(copy: Finished, source: Path) -> Context:
    """The finished run, with a source of its own and settings for quick rounds."""
    shutil.copytree(copy.source, source)
    manifest = copy.run.read_manifest()
    manifest.source = str(source)
    copy.run.write_manifest(manifest)
    settings = restored(
        {
            **manifest.config,
            "schedule": {"settle_s": 0.01, "retrain_after_new_images": 20, "max_loss": 1.0},
            "explain": {"n_maps_per_class": 0, "n_map_evidence_images": 0},
            "train": {**manifest.config["train"], "seeds": [0], "epochs": 3},
        }
    )
    return Context(copy.run, settings, Console(quiet=True))


def test_drifted_images_are_labelled_and_not_trained_on_before_a_yes(copy: Finished, tmp_path: Path) -> None:
    source = tmp_path / "source"
    context = repeated(copy, source)
    # Training settings changed, so the first round trains; then there is a baseline, and nothing new.
    first = scheduled(context, execute)
    assert first.state == "done"
    assert any("the settings of training changed" in sentence for sentence in first.sentences)
    before = promotion.current(copy.run)
    assert before is not None
    assert before.number == 2, "the model of `medmicn run` was number 1, and is kept"
    assert [version.number for _, version in promotion.kept(copy.run)] == [1]

    make_phantoms(tmp_path / "more", n_images=45, seed=9)
    for path in sorted((tmp_path / "more" / "images").rglob("*.png")):
        darker(path)
        path.rename(source / path.parent.name / f"dark-{path.name}")
    second = scheduled(context, execute)
    assert second.state == "deferred"
    assert "before a person decides" in second.sentences[-1]
    labelled = set(copy.run.read_labels()["image_id"])
    question = approval.waiting(copy.run)
    assert question is not None
    assert question.n_images == 45
    assert any("brightness" in sentence for sentence in question.tests)
    assert approval.left_out(copy.run) <= labelled, "they have labels all the same"
    assert promotion.current(copy.run) == before
    assert scheduled(context, execute).state == "deferred", "it stays so, and asks once"

    sent: list[dict[str, object]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifacts, "emit_event", lambda event, **more: sent.append({"event": event, **more}))
        artifacts.announce_drift(copy.run)
    assert sent[0]["event"] == "medmicn.drift"
    assert sent[0]["payload"]["n_images"] == 45  # type: ignore[index]
    assert artifacts.drift_table(copy.run)[0]["fires"]

    approval.answer(copy.run, approve=True, by="Dr. Ada")
    third = scheduled(context, execute)
    assert third.state == "done"
    assert "Dr. Ada decided: 45 drifted images may be trained on." in third.sentences
    after = promotion.current(copy.run)
    assert after is not None
    assert after.number == 3
    assert after.n_train > before.n_train
    models = {row["model"]: row["in_use"] for row in promotion.model_table(copy.run)}
    assert models == {3: True, 2: False, 1: False}

    back = roll_back(context, None)
    assert promotion.current(copy.run) == before
    assert {report.name for report in back.reports} == {"baseline", "explain", "report"}
    last = scheduled(context, execute)
    assert last.sentences[-1].startswith("no training"), "what was taken back is not trained again"
    assert promotion.current(copy.run) == before
