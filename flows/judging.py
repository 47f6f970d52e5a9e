"""What is still to be judged: every cell whose standing answer is not the answer to the present question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from annotation.prompts import Example, Framing, asked_sha256, judging_request, yes_no_request
from annotation.vlm.estimate import Estimate, Work, estimate
from annotation.vlm.questions import Question, in_chunks, questions_of
from annotation.vlm.settings import JPEG_QUALITY, VlmSettings
from data_contracts.concepts import Vocabulary
from data_contracts.errors import ImageRejected
from data_contracts.pixels import encode
from data_contracts.ports import PixelReader
from data_contracts.store import RunFolder
from data_contracts.tables import Split, State, Witness
from flows.settings import EndpointSettings

if TYPE_CHECKING:
    from annotation.vlm.client import VlmClient

_COLUMNS = ("image_id", "concept_id", "witness", "witness_model", "prompt_sha256", "state", "created_at")

NEVER, OTHER_QUESTION, UNUSABLE, ANSWERED = range(4)
"""What stands in the ledger for a cell: nothing, the answer to another wording or setting, none usable, the answer."""

REASONS = {
    NEVER: "never asked",
    OTHER_QUESTION: "asked before in other words or with other settings",
    UNUSABLE: "asked before without a usable answer",
}

Standing = npt.NDArray[np.int8]


@dataclass(frozen=True)
class WitnessPlan:
    """One model's share of the judging: its questions, and how they are put."""

    settings: EndpointSettings
    vocabulary: Vocabulary
    modality: str
    examples: tuple[Example, ...] = ()
    example_ids: frozenset[str] = frozenset()
    """Images that are shown as examples. They are judged without any: nobody is asked what was just told."""

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """Everything that is asked of an image."""
        return questions_of(self.vocabulary)

    def framing(self, *, plain: bool) -> Framing:
        """What stands around the questions; `plain`: without examples."""
        return Framing(self.modality, () if plain else self.examples)

    def asked(self, *, plain: bool) -> dict[str, str]:
        """Concept id → hash of all that is asked about it."""
        framing = self.framing(plain=plain)
        by_question = {q: asked_sha256(q, framing, self.settings.judging_parameters) for q in self.questions}
        return {concept_id: sha for q, sha in by_question.items() for concept_id in q.concept_ids}

    @cached_property
    def fingerprint(self) -> str:
        """Changes whenever any question does."""
        hashes = (self.asked(plain=plain)[c] for plain in (False, True) for c in self.vocabulary.ids)
        return "-".join(dict.fromkeys(h[:12] for h in hashes))


@dataclass
class OpenWork:
    """What one model is still to be asked."""

    plan: WitnessPlan
    image_ids: list[str]
    standing: Standing
    """(N, K) `NEVER`, `OTHER_QUESTION`, `UNUSABLE` or `ANSWERED` for every image and concept."""
    is_example: npt.NDArray[np.bool_] = field(repr=False)
    """(N,) whether an image is one of the examples."""

    @cached_property
    def open_questions(self) -> npt.NDArray[np.bool_]:
        """(N, Q) whether any concept of a question has no standing answer: a question is asked as a whole."""
        position = {c: k for k, c in enumerate(self.plan.vocabulary.ids)}
        columns = [[position[c] for c in q.concept_ids] for q in self.plan.questions]
        is_open = self.standing != ANSWERED
        stacked = [is_open[:, column].any(1) for column in columns]
        return np.stack(stacked, 1) if stacked else np.zeros((len(self.image_ids), 0), bool)

    @property
    def n_images(self) -> int:
        """Images with an open question."""
        return int(self.open_questions.any(1).sum())

    @property
    def n_cells(self) -> int:
        """Open cells."""
        return int((self.standing != ANSWERED).sum())

    def reasons(self) -> dict[str, int]:
        """Why cells are open → how many."""
        counts = {text: int((self.standing == code).sum()) for code, text in REASONS.items()}
        return {text: n for text, n in counts.items() if n}

    def patterns(self) -> Iterator[tuple[tuple[Question, ...], bool, list[str]]]:
        """The open questions, whether they are put without examples, and the images with just these open."""
        keys = np.column_stack([self.open_questions, self.is_example])
        rows = np.flatnonzero(self.open_questions.any(1))
        patterns, which = np.unique(keys[rows], axis=0, return_inverse=True)
        for n, pattern in enumerate(patterns):
            questions = tuple(q for q, is_open in zip(self.plan.questions, pattern[:-1], strict=True) if is_open)
            yield questions, bool(pattern[-1]), [self.image_ids[r] for r in rows[which.reshape(-1) == n]]

    def shards(self, witness: int, size: int) -> Iterator[dict[str, Any]]:
        """The open work in shards of at most `size` images with the same open questions, as plain values."""
        for questions, plain, image_ids in self.patterns():
            shared = {"witness": witness, "plain": plain, "questions": [q.question_id for q in questions]}
            for i in range(0, len(image_ids), size):
                yield shared | {"image_ids": image_ids[i : i + size]}

    def estimate(self, client: VlmClient) -> Estimate:
        """What this takes, as far as the client knows its endpoint."""
        return estimate(self.works(), self.plan.settings, client.price, tokens_per_image=client.image_tokens)

    def works(self) -> Iterator[Work]:
        """The requests this takes, by kind, for an estimate."""
        settings = self.plan.settings
        for questions, plain, image_ids in self.patterns():
            framing, n = self.plan.framing(plain=plain), len(image_ids)
            if settings.probability == "logprobs":
                for concept in (c for q in questions for c in q.concepts):
                    yield Work(yes_no_request(b"", concept, framing), n)
            else:
                for chunk in in_chunks(questions, settings.concepts_per_request):
                    yield Work(judging_request(b"", chunk, framing, settings.max_output_tokens), n * settings.samples)


def open_work(plan: WitnessPlan, image_ids: Sequence[str], parts: Iterator[pa.Table]) -> OpenWork:
    """What the ledger (its `parts`, see `ledger_parts`) leaves open of these images; the last answer stands."""
    shape = (len(image_ids), len(plan.vocabulary))
    standing = np.full(shape, NEVER, np.int8)
    said_at = np.full(shape, np.iinfo(np.int64).min)
    is_example = np.array([i in plan.example_ids for i in image_ids], bool)
    images, concepts = pd.Index(image_ids), pd.Index(plan.vocabulary.ids)
    asked = [plan.asked(plain=plain) for plain in (False, True)]
    expected = np.array([[a[c] for c in plan.vocabulary.ids] for a in asked], dtype=object).reshape(2, -1)
    for part in parts:
        rows = part.to_pandas()
        rows = rows[(rows["witness"] == Witness.VLM) & (rows["witness_model"] == plan.settings.model)]
        image, concept = images.get_indexer(rows["image_id"]), concepts.get_indexer(rows["concept_id"])
        known = (image >= 0) & (concept >= 0)
        rows, image, concept = rows[known], image[known], concept[known]
        when = rows["created_at"].astype("int64").to_numpy()
        is_same = rows["prompt_sha256"].to_numpy(object) == expected[is_example[image].astype(int), concept]
        is_unusable = (rows["state"] == State.NOT_ASSESSED).to_numpy(bool)
        code = np.where(~is_same, OTHER_QUESTION, np.where(is_unusable, UNUSABLE, ANSWERED)).astype(np.int8)
        # In the order of time, so that the last answer of a cell is the one that is written last.
        order = np.argsort(when, kind="stable")
        order = order[when[order] >= said_at[image[order], concept[order]]]
        standing[image[order], concept[order]] = code[order]
        said_at[image[order], concept[order]] = when[order]
    return OpenWork(plan, list(image_ids), standing, is_example)


def ledger_parts(run: RunFolder) -> Iterator[pa.Table]:
    """What `open_work` reads of the ledger."""
    return run.iterate_judgements(_COLUMNS)


def choose_examples(
    judgements: pd.DataFrame, images: pd.DataFrame, read: PixelReader, settings: VlmSettings
) -> dict[str, Example]:
    """Image id → example, from experts' answers on training images only: those with the most answers first."""
    if not settings.examples:
        return {}
    train = set(images.loc[images["split"] == Split.TRAIN, "image_id"])
    by_experts = judgements[(judgements["witness"] == Witness.EXPERT) & judgements["image_id"].isin(train)]
    # The last word counts: what an expert has taken back is no example.
    last = by_experts.drop_duplicates(["image_id", "concept_id"], keep="last")
    told = last[last["state"].isin([State.PRESENT, State.ABSENT])]
    by_image = {str(i): dict(zip(g["concept_id"], g["state"], strict=True)) for i, g in told.groupby("image_id")}
    found: dict[str, Example] = {}
    for image_id in sorted(by_image, key=lambda i: (-len(by_image[i]), i)):
        if len(found) == settings.examples:
            break
        try:
            image = encode(read(image_id), settings.side_px, settings.encoding, jpeg_quality=JPEG_QUALITY)
        except ImageRejected:
            continue
        found[image_id] = Example(image, {c: State(s) for c, s in by_image[image_id].items()})
    return found
