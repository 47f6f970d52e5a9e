"""Configuration: one TOML file, one model, and the only code that reads the environment.

Precedence, strongest first: flags, the file given with `--config` (else `medmicn.toml` where the command is
started), what the run folder was made with, defaults. Secrets come from the environment only; the
configuration holds the *name* of the variable.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from annotation.vlm.settings import VlmSettings
from data_contracts.errors import ConfigurationError
from model.config import TrainConfig

CONFIG_FILE = "medmicn.toml"

_OF_ONE_ENDPOINT = {
    *("model", "api_key_env", "azure_api_version", "output_limit_field"),
    *("input_usd_per_million_tokens", "output_usd_per_million_tokens"),
}
_OF_ONE_COMMAND = {"max_cost_usd", "max_requests"}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceSettings(_Section):
    """Where images come from and how they are split."""

    modality: str = "medical image"
    """What the images are, in words such as `blood smear microscopy`; goes into prompts."""
    max_pixels: int = Field(100_000_000, ge=1)
    """Images with more pixels are rejected: a limit against decompression bombs."""
    train_fraction: float = Field(0.7, gt=0, lt=1)
    """Part of the images for training, where SOURCE gives no split."""
    val_fraction: float = Field(0.1, gt=0, lt=1)
    """Part of the images on which epochs and thresholds are chosen; the rest is the test split."""
    seed: int = 0
    """Seed of the split."""
    allow_patient_overlap: bool = False
    """Accept a given split that has one patient on two sides; without it such a SOURCE is refused."""

    @model_validator(mode="after")
    def _leaves_a_test_split(self) -> Self:
        if self.train_fraction + self.val_fraction >= 1:
            raise ValueError("expected train_fraction + val_fraction below 1, so that a test split remains")
        return self


Scale = Literal["linear", "quadratic"]
"""How the disagreement of two values of a scale grows with the steps between them."""


def scale_of(name: str) -> tuple[str, Scale]:
    """(group, scale) of `GROUP`, `GROUP=linear` or `GROUP=quadratic`; raises `ValueError` for another scale."""
    group, _, scale = name.partition("=")
    if not group or scale not in ("", "linear", "quadratic"):
        raise ValueError(f"expected GROUP, GROUP=linear or GROUP=quadratic, got {name!r}")
    return group, "linear" if scale == "linear" else "quadratic"


class ConceptSettings(_Section):
    """Where concepts come from and which are kept."""

    file: Path | None = None
    """CSV with `name[,definition,group]` or text with one name a line; none: concepts are proposed."""
    samples_per_class: int = Field(10, ge=1)
    """Training images of each class that are shown when concepts are proposed."""
    max_name_characters: int = Field(30, ge=1)
    """Longer names are dropped."""
    like_class_cosine: float = Field(0.85, ge=-1, le=1)
    """A name closer than this to a class name is dropped."""
    like_each_other_cosine: float = Field(0.90, ge=-1, le=1)
    """Of two names closer than this, one is dropped."""
    projection_min_similarity: float | None = None
    """A concept below this similarity on every image is dropped; depends on the aligner, none: no such filter."""
    proposed_per_class: int = Field(8, ge=1)
    """Concepts that are asked for per class."""
    rounds: int = Field(1, ge=1)
    """Times each class is asked about, every time with other sampled images."""
    contrast_pairs: int | None = Field(None, ge=0)
    """Most pairs of classes that are asked what tells one from the other; none: all pairs of up to six classes, of more
    classes so many that each is in at least two; 0: no such question."""
    proposed_per_pair: int = Field(4, ge=1)
    """Concepts that are asked for per pair of classes."""
    max_images_per_request: int = Field(60, ge=2)
    """Most images in one question for concepts."""
    merge_cosine: float = Field(0.90, ge=-1, le=1)
    """Names closer than this become one concept with its wordings as synonyms, unless they hold opposite words."""
    ordinal_groups: tuple[str, ...] = ()
    """Exclusive groups whose values form a scale, in the order of the concepts table, such as `nucleus size`: experts
    are compared on them by weighted kappa, quadratic, or linear with `nucleus size=linear`."""
    seed: int = 0
    """Seed of the sampled images."""

    @field_validator("ordinal_groups")
    @classmethod
    def _scales_are_known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            scale_of(name)
        return names

    @property
    def ordinal_scales(self) -> dict[str, Scale]:
        """Group → how far apart two of its values are."""
        return dict(scale_of(name) for name in self.ordinal_groups)


class EndpointSettings(VlmSettings):
    """`VlmSettings` and the name of the variable that holds the key."""

    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself is never stored."""


class VisionSettings(EndpointSettings):
    """The model that proposes and judges, and further ones that judge beside it."""

    also: tuple[EndpointSettings, ...] = ()
    """Further models that judge every image as witnesses of their own: one [[vlm.also]] table each, keys as above."""

    @model_validator(mode="after")
    def _witnesses_differ(self) -> Self:
        models = [endpoint.model for endpoint in self.endpoints]
        if len(set(models)) < len(models):
            raise ValueError(f"expected every model once, since answers are kept under its name; got {models}")
        if any(e.max_cost_usd is not None or e.max_requests is not None for e in self.also):
            raise ValueError("caps stand under [vlm] and hold for all models together, not under [[vlm.also]]")
        return self

    @property
    def endpoints(self) -> tuple[EndpointSettings, ...]:
        """All models that judge, the proposing one first."""
        return (self, *self.also)


class PrivacySettings(_Section):
    """What may leave this machine."""

    offline: bool = False
    """Refuse every connection to another machine, whoever asks for it."""


class AlignSettings(_Section):
    """Which CLIP-like model checks the labels against the pixels."""

    model: str = "embedded"
    """`embedded`, `hf-hub:…`, `local-dir:…`, or an open_clip name such as `ViT-B-32/laion2b_s34b_b79k`."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, or `cuda:N`."""
    batch_size: int = Field(32, ge=1)
    """Images in one forward pass."""
    n_folds: int = Field(5, ge=2)
    """Folds of the cross-fitted projections of the embedded aligner."""
    templates: tuple[str, ...] = ("{}", "an image showing {}")
    """Sentences with one {} that concepts are put into, averaged; the embedded model reads the bare concept."""
    value_features: bool = False
    """Read the values of a ViT's last attention (MaskCLIP), for sharper maps; other towers are refused."""
    tile_above: float | None = Field(None, gt=1)
    """Cut images whose longer side exceeds so many times the model's input into tiles; none: never."""
    tile_overlap: float = Field(0.25, ge=0, le=0.5)
    """Share of a tile that its neighbour sees too."""
    max_tiles_per_side: int = Field(4, ge=2)
    """Larger images are scaled down to so many tiles a side; each tile costs one pass of the model."""
    honesty_tests: bool = True
    """Test every concept against nulls and class leaks; witnesses that fail may not label it."""
    honesty_margin: float = Field(0.02, ge=0, le=0.5)
    """AUROC by which a concept's score must beat its nulls."""
    leak_max_explained_fraction: float = Field(0.9, gt=0, le=1)
    """Share of a concept's answers that the class may explain before their witness must show that it saw more."""
    regions: Path | None = None
    """Where concepts are to be seen, as people marked it, against which heatmaps are tested: a CSV with
    `path,concept,x0,y0,x1,y1` (pixels; x1 and y1 just outside), or a folder of masks `CONCEPT_ID/IMAGE.png`."""
    seed: int = 0
    """Seed of the folds."""


class LabelSettings(_Section):
    """How witnesses become labels."""

    threshold: Literal["none", "fixed", "otsu", "agreement", "audited"] = "none"
    """How an alignment score becomes a vote: a fixed value, Otsu's per concept, one fitted to the other witnesses as
    reliable as they are found, or that corrected by audited cells; none: the label model weighs the score itself, which
    is better unless the paper's rule is wanted."""
    fixed_threshold: float | None = None
    """The value for `threshold = "fixed"`; depends on the aligner."""
    fixed_threshold_model: str | None = None
    """`align.model` that the fixed value belongs to; with another one it is refused. None: the first one it is used
    with in a run folder."""
    thresholds_file: Path | None = None
    """`thresholds.csv` of another run, used instead of fitting where model, prompts and words are still the same."""
    min_precision: float | None = Field(None, gt=0.5, lt=1)
    """Precision that calls of presence shall have, per concept: less sure labels abstain. Held against audited cells
    where there are any. None: `abstain_high` alone; thresholds of alignment then ask for 0.9."""
    min_npv: float | None = Field(None, gt=0.5, lt=1)
    """Share of calls of absence that shall be right, per concept. None: `abstain_low` alone, likewise."""
    abstain_low: float = Field(0.35, ge=0, le=0.5)
    """Above this probability a concept is no longer called absent."""
    abstain_high: float = Field(0.65, ge=0.5, le=1)
    """From this probability on a concept is called present; between the two the label abstains."""


MapMethod = Literal["hires-cam", "grad-cam", "grad-cam++", "layer-cam", "xgrad-cam"]


class ExplainSettings(_Section):
    """What is explained and drawn after training."""

    split: Literal["val", "test"] = "test"
    """Split on which rules, maps and the use of concepts are measured; rules are read on training images."""
    max_rules_per_class: int = Field(5, ge=1)
    """Most rules that are given for a class; fewer where further ones add nothing."""
    n_evidence_images: int = Field(2000, ge=0)
    """Held-out images, drawn at random where there are more, on which is measured whether the concepts are used: each
    hidden, shuffled, corrected rightly and wrongly. 0: not measured."""
    random_concept_control: bool = True
    """Train the system once more on shuffled concept labels and measure that too: as long as training one seed; only
    with a frozen backbone."""
    n_maps_per_class: int = Field(2, ge=0)
    """Images of each class for which saliency maps are drawn."""
    map_methods: tuple[MapMethod, ...] = Field(("hires-cam",), min_length=1)
    """Saliency methods: the first one draws, all are tested against their controls."""
    n_map_evidence_images: int = Field(24, ge=0)
    """Held-out images on which maps are tested: agreement with concepts, deletion, insertion; each costs about forty
    passes of the network. 0: none."""
    robustness_images: int = Field(0, ge=0)
    """Held-out images for the sensitivity analysis: FGSM, PGD, noise, corruptions. Each costs about two hundred passes,
    on a CPU 10 s an image, so 0, none, is the default; 100 is a good number on a GPU."""
    subgroups: Path | None = None
    """CSV with `path` or `image_id` and any columns (skin tone, site, sex): metrics of each value, with intervals."""
    reject_coverage: float | None = Field(None, gt=0, le=1)
    """Give a class only to this fraction of images, the surest; the threshold is taken from validation images."""
    reject_max_risk: float | None = Field(None, gt=0, lt=1)
    """Give a class only where, with 95 % probability, at most this fraction is wrong, judged by validation images."""


class FlowSettings(_Section):
    """How work is cut and scheduled."""

    shard_size: int = Field(256, ge=1)
    """Images of one shard; one Prefect task works on one shard."""
    retries: int = Field(2, ge=0)
    """Times a failed shard is tried again."""
    task_runner: Literal["threads", "dask", "ray"] = "threads"
    """What runs shards; dask and ray need their packages and a running Prefect server."""


class ScheduleSettings(_Section):
    """When a repeated run trains again, what it takes for drift, and when a new model replaces the old one."""

    settle_s: float = Field(10.0, ge=0)
    """A file counts as wholly copied when its size and time stay the same for so long; others wait for the next run."""
    retrain_after_new_images: int | None = Field(100, ge=1)
    """Train again when so many images with a class came since the last training; none: never for this reason."""
    retrain_after_corrections: int | None = Field(20, ge=1)
    """Train again when experts gave so many answers since the last training; none: never for this reason."""
    retrain_on_drift: bool = True
    """Train again once a person has approved images that drifted; false: wait for another reason."""
    watch_drift: bool = True
    """Compare new images with those of the last training, and ask a person before drifted ones are trained on."""
    drift_alpha: float = Field(0.01, gt=0, lt=1)
    """Probability of a false alarm over all tests together (Holm)."""
    drift_min_images: int = Field(30, ge=10)
    """New images, or patients where these are known, below which nothing is tested."""
    drift_min_prevalence_change: float = Field(0.10, ge=0, le=1)
    """Smaller differences of a concept's share of images raise no alarm, however certain."""
    drift_min_distance: float = Field(0.20, ge=0, le=1)
    """Smaller Kolmogorov-Smirnov distances of scores and image statistics raise no alarm."""
    drift_min_association: float = Field(0.20, ge=0, le=1)
    """Smaller values of Cramér's V for file formats and classes raise no alarm."""
    max_loss: float = Field(0.03, ge=0, le=1)
    """A new model replaces the old one if its macro-F1 is not lower by so much, with 95 % confidence, on test images
    that both know."""
    keep_models: int = Field(5, ge=1)
    """Models that are kept besides the one in use, for `medmicn rollback`."""


class Settings(_Section):
    """Everything that can be configured."""

    source: SourceSettings = Field(default_factory=SourceSettings)
    concepts: ConceptSettings = Field(default_factory=ConceptSettings)
    vlm: VisionSettings = Field(default_factory=VisionSettings)
    align: AlignSettings = Field(default_factory=AlignSettings)
    labels: LabelSettings = Field(default_factory=LabelSettings)
    train: TrainConfig = Field(default_factory=TrainConfig)
    explain: ExplainSettings = Field(default_factory=ExplainSettings)
    flow: FlowSettings = Field(default_factory=FlowSettings)
    schedule: ScheduleSettings = Field(default_factory=ScheduleSettings)
    privacy: PrivacySettings = Field(default_factory=PrivacySettings)

    @model_validator(mode="after")
    def _offline_means_here(self) -> Self:
        for endpoint in self.vlm.endpoints if self.privacy.offline else ():
            if not endpoint.is_loopback:
                raise ValueError(
                    f"privacy.offline allows no other machine, and vlm.base_url is {endpoint.base_url!r}; "
                    "use a server on this machine, 'transformers' or 'embedded'"
                )
        return self

    @model_validator(mode="after")
    def _caps_can_be_kept(self) -> Self:
        capped = self.vlm.max_cost_usd is not None or self.vlm.max_requests is not None
        if capped and self.flow.task_runner != "threads":
            raise ValueError(
                "caps hold within one process: use flow.task_runner = 'threads' with vlm.max_cost_usd or max_requests"
            )
        return self


def resolve(
    file: Path | None, flags: Mapping[str, Any] | None = None, stored: Mapping[str, Any] | None = None
) -> Settings:
    """Settings from what a run was made with (`stored`), the TOML file, and flags as `section.key` → value.

    Raises:
        ConfigurationError: the file is missing or no TOML, or a key or value is not accepted.
    """
    given = _read_toml(file)
    for dotted, value in (flags or {}).items():
        section, _, key = dotted.partition(".")
        given = _merged(given, {section: {key: value}})
    content = _merged(_still_meant(dict(stored or {}), given), given)
    return _validated(content)


def restored(config: Mapping[str, Any] | None) -> Settings:
    """Settings exactly as they were resolved elsewhere (`model_dump`): no file of this folder is read over them.

    Raises:
        ConfigurationError: a key or value is not accepted.
    """
    return _validated(config or {})


def remembered(settings: Settings) -> dict[str, Any]:
    """What a run folder keeps of its settings: all but the caps, which hold for one command."""
    content = settings.model_dump(mode="json")
    return {**content, "vlm": {key: value for key, value in content["vlm"].items() if key not in _OF_ONE_COMMAND}}


def parse_assignment(text: str) -> tuple[str, Any]:
    """A `--set section.key=value` flag; the value is read as TOML, else taken as text."""
    name, equals, value = text.partition("=")
    if not equals or "." not in name:
        raise ConfigurationError(f"--set: expected section.key=value, got {text!r}.")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value


def api_key(endpoint: EndpointSettings) -> SecretStr | None:
    """An endpoint's key from the environment; None in this process or where none is set."""
    if not endpoint.is_remote:
        return None
    value = os.environ.get(endpoint.api_key_env)
    return SecretStr(value) if value else None


def proxy_for(endpoint: EndpointSettings) -> str | None:
    """The proxy that the environment names for an endpoint, if any."""
    from urllib.request import getproxies, proxy_bypass

    if not endpoint.is_remote or endpoint.is_loopback or proxy_bypass(endpoint.host):
        return None
    proxies = getproxies()
    return proxies.get(endpoint.base_url.partition("://")[0]) or proxies.get("all")


def prefect_api_url() -> str | None:
    """Address of a running Prefect server, if one is configured."""
    from prefect.settings import PREFECT_API_URL

    return PREFECT_API_URL.value()


def documentation() -> list[tuple[str, str, str]]:
    """Every key as (`section.key`, default, meaning), in order: what `medmicn config` prints."""
    rows = []
    for section, info in Settings.model_fields.items():
        model = info.annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        meanings = _meanings(model)
        for key, key_info in model.model_fields.items():
            default = key_info.get_default(call_default_factory=True)
            rows.append((f"{section}.{key}", _as_toml(default), meanings.get(key, "")))
    return rows


def _as_toml(value: object) -> str:
    """A default as it would stand in a TOML file, which has no word for nothing: that is `none` here."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_as_toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return "none" if value is None else str(value).lower()


def _meanings(model: type[BaseModel]) -> dict[str, str]:
    """Sentences under the fields, read from the source, so that no key is described twice."""
    import ast
    import inspect
    import textwrap

    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if not (isinstance(base, type) and issubclass(base, BaseModel)) or base is BaseModel:
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
                assert isinstance(text, ast.Expr)
                assert isinstance(text.value, ast.Constant)
                found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def _validated(content: Mapping[str, Any]) -> Settings:
    try:
        return Settings.model_validate(content)
    except ValidationError as error:
        raise ConfigurationError(
            "; ".join(_fault(e["loc"], e["msg"], e.get("input")) for e in error.errors()),
            remedy="`medmicn config` lists every key with its meaning.",
        ) from error


def _still_meant(stored: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What a run was made with, without the model and the price of an endpoint that is no longer meant."""
    vlm, new_url = stored.get("vlm", {}), given.get("vlm", {}).get("base_url")
    if new_url is None or new_url == vlm.get("base_url", new_url):
        return stored
    return {**stored, "vlm": {key: value for key, value in vlm.items() if key not in _OF_ONE_ENDPOINT}}


def _read_toml(file: Path | None) -> dict[str, Any]:
    path = file or Path(CONFIG_FILE)
    if not path.is_file():
        if file is None:
            return {}
        raise ConfigurationError(f"--config: expected a file, found none at {path}.")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: expected TOML, got: {error}") from error


def _merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        result[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return result


def _fault(where: tuple[int | str, ...], message: str, value: object) -> str:
    name = ".".join(map(str, where)) or "configuration"
    # A nested table can hold anything; only plain values are worth repeating.
    shown = f", got {value!r}" if isinstance(value, str | int | float | bool) and "got " not in message else ""
    said = message.removeprefix("Value error, ")
    return f"{name}: {said[0].lower() + said[1:]}{shown}."
