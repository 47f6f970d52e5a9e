"""Whether a repeated run trains again: one decision, with its reason, whichever way it goes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from flows import promotion
from flows.approval import decided
from flows.candidate import CandidateFolder, unfinished
from flows.chain import Context
from flows.settings import ScheduleSettings
from flows.steps import has_classes
from pipeline.assemble import trainable


@dataclass(frozen=True)
class Situation:
    """What has changed since the model in use was trained."""

    has_classes: bool = True
    has_model: bool = True
    unfinished: bool = False
    """A new model was being trained, or is trained and not compared yet."""
    vocabulary_changed: bool = False
    classes_changed: bool = False
    settings_changed: bool = False
    n_new_images: int = 0
    n_corrections: int = 0
    n_approved: int = 0
    """Images that drifted, were approved, and have not been trained on."""


@dataclass(frozen=True)
class Decision:
    """Train or not, and why."""

    train: bool
    sentence: str


def decide(found: Situation, settings: ScheduleSettings) -> Decision:
    """The first condition that holds decides; without any, the sentence says how far each one is away."""
    if not found.has_classes:
        return Decision(False, "no training: the images have no classes")
    reasons = [
        (not found.has_model, "there is no model yet"),
        (found.unfinished, "the last training was not finished"),
        (found.classes_changed, "the classes changed"),
        (found.vocabulary_changed, "the concepts changed"),
        (found.settings_changed, "the settings of training changed"),
        (bool(found.n_approved) and settings.retrain_on_drift, f"{found.n_approved} drifted images were approved"),
        (_reached(found.n_new_images, settings.retrain_after_new_images), f"{found.n_new_images} new images"),
        (_reached(found.n_corrections, settings.retrain_after_corrections), f"{found.n_corrections} new corrections"),
    ]
    held = [reason for holds, reason in reasons if holds]
    if held:
        return Decision(True, "training: " + "; ".join(held))
    missing = [
        _distance(found.n_new_images, settings.retrain_after_new_images, "new images with a class"),
        _distance(found.n_corrections, settings.retrain_after_corrections, "new corrections"),
    ]
    return Decision(False, "no training: " + ", ".join(missing))


def situation(context: Context) -> Situation:
    """What has changed since a model was last trained, whether or not that one came into use."""
    run = context.run
    if not has_classes(run):
        return Situation(has_classes=False)
    is_unfinished = unfinished(run) is not None
    last = promotion.newest(run)
    if last is None:
        return Situation(has_model=False, unfinished=is_unfinished)
    folder, version = last
    allowed = trainable(CandidateFolder(run.path).read_images())
    seen = set(promotion.trained_on(run, folder)["image_id"])
    fresh = set(allowed["image_id"]) - seen
    answers = decided(run)
    class_names, vocabulary_sha256 = _known(folder)
    return Situation(
        unfinished=is_unfinished,
        vocabulary_changed=run.vocabulary().sha256 != vocabulary_sha256,
        classes_changed=sorted(allowed["label"].unique()) != class_names,
        settings_changed=promotion.settings_sha256(context) != version.settings_sha256,
        n_new_images=len(fresh),
        n_corrections=max(promotion.n_expert_answers(run) - version.n_expert_answers, 0),
        n_approved=len(fresh & set(answers.loc[answers["decision"] == "approve", "image_id"])),
    )


def _known(folder: Path) -> tuple[list[str], str]:
    """The classes of the model in `folder`, and the hash of its concepts."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return sorted(config["class_names"]), str(config["vocabulary_sha256"])


def _reached(n_found: int, n_needed: int | None) -> bool:
    return n_needed is not None and n_found >= n_needed


def _distance(n_found: int, n_needed: int | None, what: str) -> str:
    return f"{n_found} {what}, which are no reason" if n_needed is None else f"{n_found} of {n_needed} {what}"
