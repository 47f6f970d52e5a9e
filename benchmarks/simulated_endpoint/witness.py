"""What the simulated model sees and says: pure functions of image, concept and seed."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from .names import NONE_OF_THEM, PROBE_PREFIX, UNCERTAIN, JsonObject


@dataclass(frozen=True)
class Noise:
    """How often a simulated witness is right."""

    sensitivity: float = 0.9
    specificity: float = 0.9


@dataclass(frozen=True)
class Witness:
    """How the simulated model sees: what is true, and how it errs."""

    seed: int = 0
    noise: Noise = Noise()
    noise_of: Mapping[str, Noise] = field(default_factory=dict)
    """Concept id → its own noise, where it differs."""
    truth: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    """sha256 of the image → concept id → whether it is there."""
    prevalence: float = 0.4
    """Share of concepts that are there, where no truth is given."""
    uncertain_share: float = 0.0
    wavering_share: float = 0.0
    """Share of answers that depend on the request's seed."""
    is_blind: bool = False

    def is_there(self, image_sha256: str, concept_id: str) -> bool:
        """Whether the concept is truly there."""
        told = self.truth.get(image_sha256, {}).get(concept_id)
        return _pseudo_truth(image_sha256, concept_id) < self.prevalence if told is None else told

    def true_choice(self, image_sha256: str, members: Sequence[str]) -> str:
        """The member that truly holds, or `none`; a pseudo-truth always has one."""
        told = self.truth.get(image_sha256, {})
        if any(member in told for member in members):
            return next((member for member in members if told.get(member)), NONE_OF_THEM)
        return min(members, key=lambda member: _pseudo_truth(image_sha256, member), default=NONE_OF_THEM)


@dataclass(frozen=True)
class Sight:
    """The image in question, as it was sent."""

    sha256: str = ""
    data: bytes = field(default=b"", repr=False)

    @classmethod
    def of(cls, data: bytes) -> Self:
        """The sight of these image bytes."""
        return cls(hashlib.sha256(data).hexdigest(), data)


class Said(NamedTuple):
    """One answer: a state or a choice, how probable it is called, and why."""

    word: str
    probability: float
    evidence: str


def chance(*parts: object) -> float:
    """A number in [0, 1) that depends on nothing but `parts`."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def answer(schema: Mapping[str, Any], sight: Sight, witness: Witness, salt: str = "") -> JsonObject:
    """What the witness says to every property of the schema; `salt` tells apart samples of a wavering answer."""
    look = _Look(witness, Sight() if witness.is_blind else sight, salt)
    fields = _resolved(schema, schema).get("properties", {})
    return {name: _value(name, _resolved(spec, schema), schema, look) for name, spec in fields.items()}


def said_of_concept(concept_id: str, sight: Sight, witness: Witness, salt: str = "") -> Said:
    """Whether the witness sees one concept; the probability is that of its presence."""
    return _Look(witness, Sight() if witness.is_blind else sight, salt).state(concept_id)


@dataclass(frozen=True)
class _Look:
    witness: Witness
    sight: Sight
    salt: str

    def state(self, concept_id: str) -> Said:
        """Present, absent or uncertain."""
        if concept_id.startswith(PROBE_PREFIX) and not self.witness.is_blind:
            return self._probed_state(concept_id)
        draw = self._draws(concept_id)
        if next(draw) < self.witness.uncertain_share:
            return Said(UNCERTAIN, round(0.4 + 0.2 * next(draw), 3), "the image does not allow to tell")
        is_there = self.witness.is_there(self.sight.sha256, concept_id)
        noise = self.witness.noise_of.get(concept_id, self.witness.noise)
        is_right = next(draw) < (noise.sensitivity if is_there else noise.specificity)
        certainty = _certainty(is_right, next(draw))
        if is_there == is_right:
            return Said("present", round(certainty, 3), "clearly seen in the centre of the image")
        return Said("absent", round(1 - certainty, 3), "nothing of the kind in view")

    def choice(self, question_id: str, choices: Sequence[str]) -> Said:
        """One of the choices."""
        members = [c for c in choices if c not in {NONE_OF_THEM, UNCERTAIN}]
        if question_id.startswith(PROBE_PREFIX) and not self.witness.is_blind:
            return self._probed_choice(members)
        draw = self._draws(question_id)
        if next(draw) < self.witness.uncertain_share and UNCERTAIN in choices:
            return Said(UNCERTAIN, round(0.4 + 0.2 * next(draw), 3), "the image does not allow to tell")
        true = self.witness.true_choice(self.sight.sha256, members)
        noise = self.witness.noise_of.get(true, self.witness.noise)
        others = [c for c in choices if c not in {true, UNCERTAIN}]
        chance_of_right = noise.specificity if true == NONE_OF_THEM else noise.sensitivity
        is_right = next(draw) < chance_of_right or not others
        word = true if is_right else others[int(next(draw) * len(others))]
        return Said(word, round(_certainty(is_right, next(draw)), 3), "this fits best what is seen")

    def _draws(self, question_id: str) -> Iterator[float]:
        """Random numbers of this question; only a wavering answer depends on the salt."""
        key = (self.witness.seed, self.sight.sha256, question_id)
        salt = self.salt if self.salt and chance("wavers", *key) < self.witness.wavering_share else ""
        return (chance(n, *key, salt) for n in itertools.count())

    def _probed_state(self, concept_id: str) -> Said:
        colour, n_discs = discs(self.sight.data)
        if colour is None:
            return Said(UNCERTAIN, 0.5, "no disc in view")
        asks_number = "several" in concept_id
        is_there = n_discs > 1 if asks_number else colour in concept_id
        seen = f"{n_discs} discs" if asks_number else f"the disc is {colour}"
        return Said("present", 0.97, seen) if is_there else Said("absent", 0.03, seen)

    def _probed_choice(self, members: Sequence[str]) -> Said:
        colour, _ = discs(self.sight.data)
        if colour is None:
            return Said(UNCERTAIN, 0.5, "no disc in view")
        word = next((m for m in members if colour in m), NONE_OF_THEM)
        return Said(word, 0.97, f"the disc is {colour}")


def discs(data: bytes) -> tuple[str | None, int]:
    """Colour name and number of the plain discs in a drawn picture; (None, 0) when there is nothing coloured."""
    from PIL import Image  # noqa: PLC0415 - only probes need it, and starting must be quick

    try:
        picture = Image.open(io.BytesIO(data)).convert("RGB").resize((48, 48), Image.Resampling.BOX)
    except (OSError, ValueError, SyntaxError):
        return None, 0
    hues = {}
    for place, pixel in enumerate(struct.iter_unpack("3B", picture.tobytes())):
        if max(pixel) - min(pixel) > 60:
            hues[place] = _colour_name(*pixel)
    if not hues:
        return None, 0
    colour = Counter(hues.values()).most_common(1)[0][0]
    return colour, _n_blobs({place for place, name in hues.items() if name == colour}, picture.width)


def _colour_name(red: int, green: int, blue: int) -> str:
    top = max(red, green, blue)
    strong = (red > 0.6 * top, green > 0.6 * top, blue > 0.6 * top)
    names = {(True, False, False): "red", (False, True, False): "green", (False, False, True): "blue"}
    return names.get(strong) or {(True, True, False): "yellow", (True, False, True): "magenta"}.get(strong, "cyan")


def _n_blobs(places: set[int], width: int) -> int:
    """Connected groups of places that are no specks."""
    left, n_blobs = set(places), 0
    while left:
        group = [left.pop()]
        for place in group:
            near = {place - width, place + width, place - 1, place + 1} & left
            left -= near
            group += near
        n_blobs += len(group) >= 8
    return n_blobs


def _pseudo_truth(image_sha256: str, concept_id: str) -> float:
    return chance("truth", image_sha256, concept_id)


def _certainty(is_right: bool, draw: float) -> float:
    """How sure an answer is stated: wrong ones tend to be less sure, and some are as sure as any."""
    return 0.6 + 0.39 * (math.sqrt(draw) if is_right else draw**2)


def _resolved(spec: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema without references and alternatives: the first alternative that is not null."""
    while True:
        if "$ref" in spec:
            path = str(spec["$ref"]).removeprefix("#/").split("/")
            spec = root
            for step in path:
                spec = spec[step]
        elif options := spec.get("anyOf") or spec.get("oneOf"):
            spec = next((o for o in options if o.get("type") != "null"), options[0])
        else:
            return spec


def _value(name: str, spec: Mapping[str, Any], root: Mapping[str, Any], look: _Look) -> Any:
    if "enum" in spec:
        return _one_of(spec["enum"], look.choice(name, [str(c) for c in spec["enum"]]).word)
    if "const" in spec:
        return spec["const"]
    if "properties" in spec:
        return _object(name, {k: _resolved(v, root) for k, v in spec["properties"].items()}, root, look)
    kinds = spec.get("type", "string")
    kind = next((k for k in kinds if k != "null"), "null") if isinstance(kinds, list) else kinds
    if kind == "array":
        return _proposals(spec, root) if name == "concepts" else []
    said = look.state(name)
    plain = {"boolean": said.word == "present", "number": said.probability, "integer": 1, "null": None}
    return plain.get(kind, said.evidence)


def _object(name: str, fields: Mapping[str, Mapping[str, Any]], root: Mapping[str, Any], look: _Look) -> JsonObject:
    """A verdict, a choice, or an object of other things."""
    if "state" in fields:
        said, word_field = look.state(name), "state"
    elif "choice" in fields:
        said, word_field = look.choice(name, [str(c) for c in fields["choice"].get("enum", [])]), "choice"
    else:
        return {key: _value(key, spec, root, look) for key, spec in fields.items()}
    known: JsonObject = {
        word_field: _one_of(fields[word_field].get("enum", [said.word]), said.word),
        "probability": said.probability,
        "evidence": said.evidence,
    }
    return {key: known[key] if key in known else _value(key, spec, root, look) for key, spec in fields.items()}


def _one_of(allowed: Sequence[Any], word: str) -> Any:
    return word if word in allowed or not allowed else UNCERTAIN if UNCERTAIN in allowed else allowed[-1]


_PROPOSED = (
    ("round outline", "The outline of the main object is close to a circle.", "outline"),
    ("lobed outline", "The outline of the main object has two or more lobes.", "outline"),
    ("irregular outline", "The outline of the main object is jagged or uneven.", "outline"),
    ("purple colour", "Purple covers more than half of the main object.", "colour"),
    ("pink colour", "Pink covers more than half of the main object.", "colour"),
    ("granular texture", "Fine grains are spread over the main object.", None),
    ("bright centre", "The centre of the main object is brighter than its rim.", None),
    ("touches the border", "The main object is cut by the border of the image.", None),
)


def _proposals(spec: Mapping[str, Any], root: Mapping[str, Any]) -> list[JsonObject]:
    """A fixed list of concepts, with the fields that the schema names."""
    fields = _resolved(spec.get("items", {}), root).get("properties", {"name": {}, "definition": {}, "group": {}})
    rows = []
    for name, definition, group in _PROPOSED:
        known: JsonObject = {"name": name, "definition": definition, "group": group, "contrast": None}
        rows.append(
            {f: known.get(f, [] if _resolved(s, root).get("type") == "array" else "") for f, s in fields.items()}
        )
    return rows
