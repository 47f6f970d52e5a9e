"""Labels on their way to other programs, and edited concepts on their way back, by the real command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from data_contracts.spreadsheet import read_csv, write_csv
from data_contracts.store import RunFolder
from tests.flows.conftest import Ended, Finished

Medmicn = Callable[..., Ended]


def test_exports_hold_every_image_and_no_name(finished: Finished, medmicn: Medmicn, tmp_path: Path) -> None:
    ended = medmicn("export", "--run", finished.run.path, "--to", "label-studio", "--pixels", "--out", tmp_path / "ls")
    assert ended.exit_code == 0, ended.messages
    tasks = json.loads((tmp_path / "ls" / "tasks.json").read_text())
    assert len(tasks) == len(finished.run.read_images()) == ended.outcome["exported"]["images"]
    written = json.dumps(tasks)
    assert not any(Path(path).stem in written for path in finished.run.read_images()["path"])
    first = tmp_path / "ls" / tasks[0]["data"]["image"].partition("?d=")[2]
    with Image.open(first) as written_image:
        assert written_image.info == {}, "pixels only"
    assert "import-labels" in ended.messages, "the way back is said"


def test_an_unknown_program_is_refused(finished: Finished, medmicn: Medmicn) -> None:
    ended = medmicn("export", "--run", finished.run.path, "--to", "excel")
    assert ended.exit_code == 2
    assert "label-studio, fiftyone, coco" in ended.messages


def test_an_edited_concept_sheet_comes_back_with_its_price(copy: Finished, medmicn: Medmicn, tmp_path: Path) -> None:
    sheet = read_csv(copy.run.path / "concepts.csv", as_text=True)
    kept = sheet.index[sheet["status"] == "kept"]
    sheet.loc[kept[0], "name"] = "another name"
    sheet.loc[kept[1], "status"] = "dropped"
    write_csv(tmp_path / "edited.csv", sheet)
    before = len(copy.run.read_judgements())
    ended = medmicn("import-labels", tmp_path / "edited.csv", "--run", copy.run.path, "--yes")
    assert ended.exit_code == 0, ended.messages
    assert "1 concepts have a new question" in ended.messages
    run = RunFolder(copy.run.path)
    assert run.vocabulary()[sheet.loc[kept[0], "concept_id"]].name == "another name"
    assert sheet.loc[kept[1], "concept_id"] not in run.vocabulary()
    assert len(run.read_judgements()) == before, "what was said of a dropped concept stays"
