from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_contracts.spreadsheet import harmless, read_csv, unshielded, write_csv

FORMULAS = ['=HYPERLINK("http://x")', "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"]


@given(st.text(alphabet="'=+-@a\t ", max_size=6) | st.text())
def test_shielding_can_always_be_undone(text: str) -> None:
    assert unshielded(harmless(text)) == text
    assert not harmless(text).startswith(("=", "+", "-", "@", "\t", "\r"))


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_harmless_in_the_file_and_itself_again_when_read(tmp_path: Path, text: str) -> None:
    path = tmp_path / "sheet.csv"
    write_csv(path, pd.DataFrame({"path": [text, "b.png", None], "value": [-1.5, 2.0, 3.0]}))
    assert pd.read_csv(path, keep_default_na=False).loc[0, "path"].startswith("'")
    back = read_csv(path)
    assert back.loc[:1, "path"].tolist() == [text, "b.png"]
    assert back["value"].tolist() == [-1.5, 2.0, 3.0]


def test_umlauts_survive_a_spreadsheet(tmp_path: Path) -> None:
    path = tmp_path / "sheet.csv"
    write_csv(path, pd.DataFrame({"name": ["gr\u00f6\u00dfe"]}))
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert read_csv(path, as_text=True)["name"].tolist() == ["gr\u00f6\u00dfe"]
