from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from starlette.testclient import TestClient

from data_contracts.errors import InputRefused
from data_contracts.store import RunFolder
from data_contracts.tables import LABELS, State
from pipeline.review import index as index_module
from pipeline.review import queries
from pipeline.review.app import create_app
from pipeline.review.filters import Filters
from pipeline.review.index import Keeper
from pipeline.review.ledger import Cell, Corrections, Reviewer
from pipeline.review.wide import STATES, Cells, codes_of, dispute, doubt, state_of
from tests.pipeline.review.samples import HOST, IDS, judgements, make_run, read, state_now

DR_A = Reviewer("Dr A")


def test_a_stored_state_holds_the_machines_and_the_experts_word() -> None:
    for stored in range(20):
        state = state_of(stored)
        assert [s for s in STATES if stored in codes_of(s)] == [state]
    # An expert's word over any of the machine's: taken off, the machine's is what it was.
    assert {state_of(4 * (1 + STATES.index(State.ABSENT)) + machine) for machine in range(4)} == {State.ABSENT}


def test_aggregates_equal_what_the_database_says_of_each_concept(run: RunFolder) -> None:
    keeper = Keeper(run)
    index = keeper.current()
    Corrections(run).correct(index, [Cell(IDS[8], "red"), Cell(IDS[3], "round")], State.PRESENT, DR_A)
    mean = f"(({doubt(0)}) + ({doubt(1)})) // 2"
    worst = f"greatest({dispute(0)}, {dispute(1)})"
    sql = f"SELECT count(*) FROM images WHERE doubt <> {mean} OR worst <> {worst}"
    assert index.cursor().execute(sql).fetchall() == [(0,)]
    counted = index.cursor().execute("SELECT sum(n_expert), max(worst) FROM images").fetchall()
    assert counted == [(2, 225)]
    keeper.stop()


def test_cells_keep_unknown_apart_from_zero() -> None:
    cells = Cells.blank(1, 2)
    cells.probability[0, 0] = 0
    table = cells.table()
    assert table.column("p0").to_pylist() == [0]
    assert table.column("p1").to_pylist() == [None]
    np.testing.assert_array_equal(table.column("doubt").to_numpy(), [10_000])


def test_a_database_is_built_once_and_again_for_other_labels(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    real = index_module.build

    def build(*arguments: object) -> None:
        built.append("built")
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(index_module, "build", build)
    keeper = Keeper(run)
    keeper.current()
    assert built == []
    labels = run.read_labels()
    labels.loc[labels["image_id"] == IDS[0], "present"] = False
    run.write_labels(labels, pd.DataFrame())
    index = keeper.current()
    assert built == ["built"]
    assert queries.cells(index, [0])[0][0]["state"] == State.ABSENT
    assert len(list(run.cache_dir.glob("review-*.duckdb"))) == 1
    keeper.stop()


def test_two_servers_on_one_run_see_each_others_corrections(run: RunFolder) -> None:
    one, two = Keeper(run), Keeper(RunFolder(run.path))
    first = one.current()
    code = (
        "import sys; from data_contracts.store import RunFolder; from data_contracts.tables import State;"
        "from pipeline.review.index import Keeper; from pipeline.review.ledger import *;"
        "run = RunFolder(sys.argv[1]); keeper = Keeper(run);"
        "Corrections(run).correct(keeper.current(), [Cell(sys.argv[2], 'red')], State.ABSENT, Reviewer('Dr B'));"
        "keeper.stop()"
    )
    subprocess.run([sys.executable, "-c", code, str(run.path), IDS[0]], check=True, cwd=Path(__file__).parents[3])
    assert one.current() is first
    assert queries.cells(first, [0])[0][0]["state"] == State.ABSENT
    one.stop()
    two.stop()
    assert len(list(run.cache_dir.glob("review-*.duckdb"))) == 1


def test_a_damaged_database_is_built_again(run: RunFolder) -> None:
    for path in run.cache_dir.glob("review-*.duckdb"):
        path.write_bytes(b"no database")
    assert state_now(run)["state"] == State.PRESENT


def test_words_of_experts_that_left_the_folder_no_longer_count(run: RunFolder) -> None:
    keeper = Keeper(run)
    index = keeper.current()
    before = set(run.judgements_dir.iterdir())
    Corrections(run).correct(index, [Cell(IDS[0], "red")], State.ABSENT, DR_A)
    (added,) = set(run.judgements_dir.iterdir()) - before
    added.unlink()
    index = keeper.current()
    assert queries.cells(index, [0])[0][0] | {"probability": 0} == {
        "state": State.PRESENT,
        "by_expert": False,
        "probability": 0,
        "disagreement": 0.0,
    }
    keeper.stop()


def test_a_run_without_write_permission_can_be_looked_at(read_run: RunFolder, tmp_path: Path) -> None:
    run = RunFolder(shutil.copytree(read_run.path, tmp_path / "run"))
    shutil.rmtree(run.cache_dir)
    # A file where the folder should be: root may write everywhere, so permissions alone would not show it.
    run.cache_dir.write_text("")
    assert state_now(run)["state"] == State.PRESENT


def test_an_unknown_image_is_refused(run: RunFolder) -> None:
    keeper = Keeper(run)
    with pytest.raises(InputRefused, match="no accepted image"):
        keeper.current().position("f" * 64)
    keeper.stop()


def test_new_alignment_replaces_old_maps(run: RunFolder) -> None:
    assert state_now(run)["has_map"]
    run.write_alignment([])
    labels = run.read_labels()
    run.write_labels(labels, pd.DataFrame())
    assert not state_now(run)["has_map"]


def test_evidence_of_later_parts_is_found_after_a_new_start(run: RunFolder) -> None:
    run.append_judgements(judgements([(IDS[1], "red", "vlm", "other-vlm", "absent")], "Zebra stripes"))
    keeper = Keeper(run)
    found = queries.page(keeper.current(), run.vocabulary(), Filters(text="ZEBRA"))
    assert [image["image_id"] for image in found.images] == [IDS[1]]
    keeper.stop()


def test_many_pages_in_any_order_show_every_image_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    keeper = Keeper(run)
    index, vocabulary = keeper.current(), run.vocabulary()
    for sort in ("", "uncertain", "disputed"):
        for concept in ("", "red"):
            filters = Filters(sort=sort, concept=concept)
            first = queries.page(index, vocabulary, filters)
            rest = queries.page(
                index, vocabulary, Filters(sort=sort, concept=concept, after=str(first.images[-1]["position"]))
            )
            shown = [image["image_id"] for image in [*first.images, *rest.images]]
            assert sorted(shown) == sorted(IDS)
            assert (first.last, rest.first, rest.last) == (60, 60, 70)
            found = queries.neighbours(index, vocabulary, filters, first.images[7]["position"])
            assert (found.before, found.after, found.place) == (shown[6], shown[8], 8)
    keeper.stop()


def test_while_a_large_run_is_read_pages_say_how_far_it_is(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    real = index_module.build

    def slow(connection: Any, run: RunFolder, concept_ids: tuple[str, ...], tell: Any) -> None:
        tell("labels", 0.43)
        begun.set()
        go_on.wait(20)
        real(connection, run, concept_ids, tell)

    monkeypatch.setattr(index_module, "build", slow)
    monkeypatch.setattr(index_module, "PATIENCE_S", 0.05)
    shutil.rmtree(run.cache_dir)
    with TestClient(create_app(run, read, "t"), base_url=HOST) as client:
        client.get("/?token=t", follow_redirects=False)
        assert begun.wait(20)
        waiting = client.get("/")
        assert waiting.status_code == 503
        assert "Reading labels: 43 %" in waiting.text
        assert client.get("/progress").json() == {"what": "labels", "share": 0.43, "ready": False}
        assert client.get("/static/review.css").status_code == 200
        go_on.set()
        deadline = time.monotonic() + 20
        while not client.get("/progress").json()["ready"]:
            assert time.monotonic() < deadline
        assert "60 of 70 images" in client.get("/").text


def test_a_table_that_cannot_be_read_is_said_and_tried_again(run: RunFolder) -> None:
    whole = run.table_path(LABELS).read_bytes()
    run.table_path(LABELS).write_bytes(b"PAR1 no labels")
    with TestClient(create_app(run, read, "t"), base_url=HOST) as client:
        client.get("/?token=t", follow_redirects=False)
        refused = client.get("/")
        assert refused.status_code in {400, 500}
        assert "labels.parquet" in refused.text
        run.table_path(LABELS).write_bytes(whole)
        assert client.get("/").status_code == 200
