"""What experts said, laid over the labels at once: the ledger stays the truth, these tables follow it.

A row that undoes says which state stands again, so the last row of a reviewer about a cell is what stands.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from data_contracts.store import RunFolder
from data_contracts.tables import JUDGEMENTS, State, Witness
from pipeline.review.wide import AGGREGATES, CODE, Cells

UNDO = "undo:"
"""Prefix of `request_id` of a judgement that takes the reviewer's last one back."""

_STANDING = f"""
    SELECT position, concept, reviewer, state, at_us, seq FROM said {{where}}
    QUALIFY row_number() OVER (PARTITION BY position, concept, reviewer ORDER BY at_us DESC, seq DESC) = 1
       AND state <> '{State.NOT_ASSESSED}'
"""
"""Every reviewer's standing word of every cell."""

_TOGETHER = f"""
    CREATE OR REPLACE TEMP TABLE agreed AS
    WITH counted AS (
        SELECT t.position, t.concept, count(s.state) AS n, count(*) FILTER (s.state = '{State.PRESENT}') AS present,
               count(*) FILTER (s.state IN ('{State.PRESENT}', '{State.ABSENT}')) AS decided
        FROM touched t LEFT JOIN standing s USING (position, concept) GROUP BY t.position, t.concept
    )
    SELECT position, concept, CASE
        WHEN n = 0 THEN NULL
        WHEN decided = 0 THEN '{State.UNCERTAIN}'
        WHEN 2 * present > decided THEN '{State.PRESENT}'
        WHEN 2 * present < decided THEN '{State.ABSENT}'
        ELSE '{State.UNCERTAIN}' END AS state
    FROM counted
"""
"""What several reviewers' words come to, as fusion counts them: the majority of those who decided."""


def part_names(run: RunFolder) -> set[str]:
    """Names of the ledger's parts that are on the disk now; a part never changes once it is there."""
    return {path.name for path in run.judgements_dir.glob("part-*.parquet")}


def take_parts(connection: duckdb.DuckDBPyConnection, paths: Sequence[Path], numbers: Mapping[str, int]) -> None:
    """Read experts' rows of ledger parts and lay them over the cells; raises `ContractViolation` for other files."""
    for path in paths:
        JUDGEMENTS.check_tag(pq.read_schema(path), str(path))
    known = connection.execute("SELECT count(*) FROM said").fetchall()[0][0]
    connection.execute(
        """
        INSERT INTO said
        SELECT ? + row_number() OVER (ORDER BY j.created_at, j.filename, j.file_row_number), i.position, j.concept_id,
               j.witness_model, j.state, j.request_id, j.supersedes, j.evidence, epoch_us(j.created_at)
        FROM read_parquet(?, filename = true, file_row_number = true, hive_partitioning = false) j
        JOIN images i ON i.image_id = j.image_id WHERE j.witness = ?
        """,
        [known, [str(path) for path in paths], Witness.EXPERT.value],
    )
    connection.execute("INSERT INTO expert_parts SELECT unnest(?)", [[path.name for path in paths]])
    cells = connection.execute("SELECT DISTINCT position, concept FROM said WHERE seq > ?", [known]).fetchall()
    settle(connection, cells, numbers)


def forget(connection: duckdb.DuckDBPyConnection, numbers: Mapping[str, int]) -> None:
    """Take every expert's word off the cells, to read the ledger again from the beginning."""
    connection.execute("DELETE FROM said; DELETE FROM contested; DELETE FROM expert_parts")
    machine = [f"s{k} = s{k} % 4" for k in numbers.values()]
    if machine:
        connection.execute(f"UPDATE images SET {', '.join(machine)} WHERE n_expert > 0")
        _count_again(connection, "n_expert > 0", len(numbers))


def settle(connection: duckdb.DuckDBPyConnection, cells: Sequence[tuple[int, str]], numbers: Mapping[str, int]) -> None:
    """Make these cells show what stands now, as `medmicn fuse` will make it permanent."""
    if not cells:
        return
    connection.execute(
        "CREATE OR REPLACE TEMP TABLE touched AS SELECT unnest(?) AS position, unnest(?) AS concept",
        [[p for p, _ in cells], [c for _, c in cells]],
    )
    standing = _STANDING.format(where="SEMI JOIN touched USING (position, concept)")
    connection.execute(f"CREATE OR REPLACE TEMP TABLE standing AS {standing}")
    connection.execute(
        """
        DELETE FROM contested WHERE (position, concept) IN (SELECT (position, concept) FROM touched);
        INSERT INTO contested SELECT position, concept FROM standing GROUP BY ALL HAVING count(DISTINCT state) > 1;
        """
    )
    connection.execute(_TOGETHER)
    for concept in {concept for _, concept in cells} & numbers.keys():
        _lay_over(connection, concept, numbers[concept])
    _count_again(connection, "position IN (SELECT position FROM touched)", len(numbers))


def _count_again(connection: duckdb.DuckDBPyConnection, where: str, n_concepts: int) -> None:
    """Bring the aggregates of some images in step with their cells."""
    rows = connection.sql(f"SELECT * FROM images WHERE {where}").to_arrow_table()
    fresh = pa.table(Cells.of(rows, n_concepts).aggregates()).append_column("position", rows.column("position"))
    changes = ", ".join(f"{name} = fresh.{name}" for name in AGGREGATES)
    connection.register("fresh", fresh)
    connection.execute(f"UPDATE images SET {changes} FROM fresh WHERE images.position = fresh.position")
    connection.unregister("fresh")


def _lay_over(connection: duckdb.DuckDBPyConnection, concept: str, k: int) -> None:
    said = " ".join(f"WHEN '{state}' THEN {4 * (code + 1)}" for state, code in CODE.items())
    connection.execute(
        f"""
        UPDATE images SET s{k} = s{k} % 4 + (CASE agreed.state {said} ELSE 0 END)
        FROM agreed WHERE agreed.position = images.position AND agreed.concept = ?
        """,
        [concept],
    )


def events(connection: duckdb.DuckDBPyConnection, position: int, concept: str | None = None) -> list[dict[str, Any]]:
    """All that experts said of an image (or of one of its cells), undoing included, oldest first."""
    only = "" if concept is None else " AND concept = ?"
    found = connection.execute(
        "SELECT concept, reviewer, state, request_id, supersedes, evidence, at_us FROM said "
        f"WHERE position = ?{only} ORDER BY at_us, seq",
        [position] if concept is None else [position, concept],
    )
    return _rows(found)


def standing(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of one reviewer's rows about one cell, those that were not taken back, oldest first."""
    stack: list[Mapping[str, Any]] = []
    for row in rows:
        if str(row["request_id"]).startswith(UNDO):
            stack = stack[:-1]
        else:
            stack.append(row)
    return stack


def contested_cells(connection: duckdb.DuckDBPyConnection, limit: int, first: int = 0) -> list[dict[str, Any]]:
    """Cells on which reviewers differ, in the order of the folder, with every reviewer's standing word."""
    where = _STANDING.format(where="SEMI JOIN shown USING (position, concept)")
    found = connection.execute(
        f"""
        WITH shown AS (SELECT * FROM contested ORDER BY position, concept LIMIT ? OFFSET ?), standing AS ({where})
        SELECT s.position, i.image_id, s.concept,
               to_json(list({{'reviewer': s.reviewer, 'state': s.state, 'at_us': s.at_us}} ORDER BY s.at_us)) AS words
        FROM standing s JOIN images i USING (position)
        GROUP BY s.position, i.image_id, s.concept ORDER BY s.position, s.concept
        """,
        [limit, first],
    )
    return [row | {"words": json.loads(row["words"])} for row in _rows(found)]


def _rows(found: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
    names = [column[0] for column in found.description]
    return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def words_per_concept(connection: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """Concept id → cells × reviewers whose word stands."""
    sql = f"SELECT concept, count(*) FROM ({_STANDING.format(where='')}) GROUP BY concept"
    return dict(connection.execute(sql).fetchall())
