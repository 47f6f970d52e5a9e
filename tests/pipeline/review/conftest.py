from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from starlette.testclient import TestClient

from data_contracts.store import RunFolder
from pipeline.review.app import create_app
from pipeline.review.index import Keeper
from tests.pipeline.review.samples import HOST, IDS, make_run, read


@pytest.fixture(scope="session")
def read_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run whose database is built: copies of it open at once."""
    run = make_run(tmp_path_factory.mktemp("review") / "my run")
    keeper = Keeper(run)
    keeper.current()
    keeper.stop()
    return run


@pytest.fixture
def run(read_run: RunFolder, tmp_path: Path) -> RunFolder:
    return RunFolder(shutil.copytree(read_run.path, tmp_path / "my run"))


@pytest.fixture
def stranger(run: RunFolder) -> Iterator[TestClient]:
    app = create_app(run, read, "the-token", reviewer="Dr A")
    with TestClient(app, base_url=HOST, follow_redirects=False) as client:
        yield client


@pytest.fixture
def client(stranger: TestClient) -> TestClient:
    assert stranger.get("/?token=the-token").status_code == 303
    return stranger


@pytest.fixture
def audit(run: RunFolder) -> pd.DataFrame:
    sheet = pd.DataFrame(
        {
            "image_id": [IDS[2], IDS[3], IDS[4]],
            "path": ["folder/2.png", "folder/3.png", "folder/4.png"],
            "concept_id": ["red", "red", "round"],
            "concept": ["red", "red", "round"],
            "answer": "",
            "stratum": ["s"] * 3,
        }
    )
    run.write_audit(sheet)
    return sheet
