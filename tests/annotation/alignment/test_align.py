"""Alignment of a small run, end to end."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import roc_auc_score

from annotation.alignment.align import align
from annotation.alignment.heads import concept_texts, concept_wordings, reference_texts
from annotation.alignment.inputs import AlignmentInputs
from annotation.alignment.options import AlignOptions
from annotation.alignment.towers import load_aligner
from data_contracts.concepts import Concept, Vocabulary
from data_contracts.errors import ConfigurationError, ImageRejected, RejectReason
from data_contracts.ports import Pixels
from tests.annotation.alignment.tiny_clip import tiny_clip

VOCABULARY = Vocabulary.of([Concept("red", "red"), Concept("dark", "dark")])
N_IMAGES = 40
IDS = [hashlib.sha256(bytes([i])).hexdigest() for i in range(N_IMAGES)]
RED = np.random.default_rng(0).integers(0, 2, N_IMAGES)


def read(image_id: str) -> Pixels:
    number = IDS.index(image_id)
    pixels = np.random.default_rng(number).integers(60, 160, (50, 70, 3), dtype=np.uint8)
    pixels[..., 0] += np.uint8(80 * RED[number])
    return pixels


def judgements(wrong_fraction: float = 0.2) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    said = np.stack([RED ^ (rng.random(N_IMAGES) < wrong_fraction), rng.integers(0, 2, N_IMAGES)], 1)
    return pd.DataFrame(
        {
            "image_id": np.repeat(IDS, 2),
            "concept_id": np.tile(VOCABULARY.ids, N_IMAGES),
            "witness": "vlm",
            "witness_model": "noisy",
            "state": np.where(said.ravel() > 0, "present", "absent"),
            "probability": np.nan,
        }
    )


def run(tmp_path: Path, read_image: Any = read, **options: Any) -> pa.Table:
    chosen = AlignOptions(shard_size=16, batch_size=8, **options)
    return pa.concat_tables(align(AlignmentInputs(IDS, read_image, VOCABULARY, judgements(), chosen, tmp_path)))


def without_judgements(image_ids: list[str], options: AlignOptions, cache: Path, read_image: Any = read) -> pa.Table:
    inputs = AlignmentInputs(image_ids, read_image, VOCABULARY, judgements().iloc[:0], options, cache)
    return pa.concat_tables(align(inputs))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def aligned(cache: Path) -> pa.Table:
    return run(cache)


def test_every_image_and_concept_has_a_row_in_order(aligned: pa.Table) -> None:
    assert aligned.column("image_id").to_pylist() == list(np.repeat(IDS, 2))
    assert aligned.column("concept_id").to_pylist() == ["red", "dark"] * N_IMAGES


def test_similarity_is_the_mean_of_the_heatmap(aligned: pa.Table) -> None:
    maps = aligned.column("heatmap").combine_chunks()
    means = np.asarray(maps.flatten(), np.float32).reshape(-1, 49).mean(1)
    np.testing.assert_allclose(means, aligned.column("similarity").to_numpy(), atol=2e-4)
    assert set(aligned.column("grid_h").to_pylist()) == set(aligned.column("grid_w").to_pylist()) == {7}


def test_cross_fitted_scores_beat_the_votes_they_learned_from(aligned: pa.Table) -> None:
    frame = aligned.drop(["heatmap"]).to_pandas()
    red = frame[frame["concept_id"] == "red"]
    votes = judgements().query("concept_id == 'red'")["state"] == "present"
    assert roc_auc_score(RED, votes) < 0.9
    assert roc_auc_score(RED, red["similarity"]) > 0.95
    assert roc_auc_score(RED, red["probability"]) > 0.95


def test_a_second_run_reads_no_image_and_gives_the_same(aligned: pa.Table, cache: Path) -> None:
    def refuse(image_id: str) -> Pixels:
        raise AssertionError(f"read {image_id}")

    again = run(cache, refuse)
    np.testing.assert_allclose(
        again.column("similarity").to_numpy(), aligned.column("similarity").to_numpy(), atol=1e-6
    )


def test_results_do_not_depend_on_the_cache_or_the_batch(aligned: pa.Table, tmp_path: Path) -> None:
    bare = run(tmp_path, max_cache_gb=0.0)
    assert not list(tmp_path.rglob("*.npy"))
    np.testing.assert_allclose(bare.column("similarity").to_numpy(), aligned.column("similarity").to_numpy(), atol=1e-5)


def test_unreadable_images_are_told_and_counted_and_nothing_stops(tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []
    done: list[int] = []

    def broken(image_id: str) -> Pixels:
        if image_id == IDS[3]:
            raise ImageRejected(RejectReason.TRUNCATED, "cut off")
        return read(image_id)

    tables = align(
        AlignmentInputs(IDS, broken, VOCABULARY, judgements(), AlignOptions(shard_size=16), tmp_path),
        advance=done.append,
        on_rejected=lambda image_id, error: told.append((image_id, str(error.reason))),
    )
    table = pa.concat_tables(tables)
    assert told == [(IDS[3], "truncated")]
    assert sum(done) == N_IMAGES
    assert table.num_rows == 2 * (N_IMAGES - 1)


def test_one_patient_is_never_on_both_sides_of_a_fit(aligned: pa.Table, cache: Path) -> None:
    groups = dict.fromkeys(IDS, "one patient")
    options = AlignOptions(shard_size=16)
    tables = align(AlignmentInputs(IDS, read, VOCABULARY, judgements(), options, cache, groups))
    # Whoever sees all images sees the test patient: the only fold with data has a head that knows nothing.
    assert pa.concat_tables(tables).column("probability").null_count == 2 * N_IMAGES


def test_the_embedded_model_asks_for_judgements(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="medmicn judge"):
        without_judgements(IDS, AlignOptions(), tmp_path)


def test_a_pretrained_model_needs_no_judgement_and_claims_no_probability(tmp_path: Path) -> None:
    spec = tiny_clip(tmp_path)
    options = AlignOptions(model=spec, batch_size=8)
    table = without_judgements(IDS[:9], options, tmp_path / "cache")
    assert table.column("probability").null_count == 18
    assert table.column("heatmap").combine_chunks().value_lengths().unique().to_pylist() == [4]
    aligner = load_aligner(spec)
    cells = aligner.dense(aligner.preprocess(read(IDS[0]))[None]).cells.flatten(1, 2)
    unit = torch.nn.functional.normalize(cells, dim=-1)
    cosines = unit @ torch.from_numpy(aligner.embed_text(["red", "dark"])).T
    np.testing.assert_allclose(table.column("similarity").to_numpy()[:2], cosines.mean(1)[0].numpy(), atol=1e-3)
    texts, applies = reference_texts(VOCABULARY)
    references = (unit @ torch.from_numpy(aligner.embed_text(texts)).T).mean(1)[0]
    logits = aligner.text_scale * torch.cat([cosines.mean(1)[0, :1], references[torch.from_numpy(applies[0])]])
    expected = torch.softmax(logits, 0)[0].item()
    assert table.column("contrast")[0].as_py() == pytest.approx(expected, rel=0.02)


def test_large_images_get_more_cells_and_small_ones_the_same(tmp_path: Path) -> None:
    def mixed(image_id: str) -> Pixels:
        small = read(image_id)
        return np.tile(small, (2, 2, 1)) if IDS.index(image_id) % 2 else small[:40, :40]

    options = AlignOptions(model=tiny_clip(tmp_path), batch_size=4, tile_above=2.0, tile_overlap=0.5)
    bare = options.model_copy(update={"tile_above": None})
    tiled, whole = (without_judgements(IDS[:6], o, tmp_path / "cache", mixed) for o in (options, bare))
    assert tiled.column("image_id").to_pylist() == list(np.repeat(IDS[:6], 2))
    # 100 × 140 px in tiles of 32 px (2 × 2 cells) that overlap by half: four a side, as many as may be.
    assert tiled.column("grid_h").to_pylist() == [2, 2, 5, 5] * 3
    lengths = tiled.column("heatmap").combine_chunks().value_lengths().to_pylist()
    assert lengths == [4, 4, 25, 25] * 3
    similarity = [t.column("similarity").to_numpy().reshape(6, 2) for t in (tiled, whole)]
    np.testing.assert_allclose(similarity[0][::2], similarity[1][::2], atol=1e-6)
    assert np.abs(similarity[0][1::2] - similarity[1][1::2]).max() > 1e-4
    again = without_judgements(IDS[:6], options, tmp_path / "cache", mixed)
    np.testing.assert_allclose(again.column("similarity").to_numpy(), similarity[0].ravel(), atol=1e-6)


def test_fitted_heads_give_a_probability_and_no_contrast(aligned: pa.Table) -> None:
    assert aligned.column("contrast").null_count == aligned.num_rows
    assert aligned.column("probability").null_count == 0


def test_wordings_are_name_and_synonyms_and_references_deny_and_confuse() -> None:
    vocabulary = Vocabulary.of(
        [Concept("scale", "scale", synonyms=("flakes", " ")), Concept("fold", "fold", contrast="a scar")]
    )
    assert concept_wordings(vocabulary) == [("scale", "flakes"), ("fold",)]
    texts, applies = reference_texts(vocabulary)
    own = [{t for t, a in zip(texts, row, strict=True) if a} for row in applies]
    assert own[0] - own[1] == {"no scale"}
    assert own[1] - own[0] == {"no fold", "a scar"}
    assert "an image" in own[0] & own[1]


def test_nothing_to_align_is_no_table(tmp_path: Path) -> None:
    assert list(align(AlignmentInputs(IDS, read, Vocabulary(), judgements(), AlignOptions(), tmp_path))) == []


def test_concepts_of_one_name_are_told_apart_by_their_group() -> None:
    vocabulary = Vocabulary.of(
        [Concept("a", "Big", group="cell size"), Concept("b", "big", group="nucleus size"), Concept("c", "round")]
    )
    assert concept_texts(vocabulary) == ["Big, cell size", "big, nucleus size", "round"]
