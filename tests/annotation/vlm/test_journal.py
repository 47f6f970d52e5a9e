from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from annotation.vlm.journal import Journal, Record, utc_now
from data_contracts.errors import StorageError


def record(number: int, text: str = "answer") -> Record:
    return Record(f"{number:064x}", "p", "m", text, None, "stop", "r", 10, 2, utc_now())


def test_a_record_comes_back_as_it_went_in(tmp_path: Path) -> None:
    one = record(1, 'quotes " and\nlines and ü')
    with Journal(tmp_path / "j") as journal:
        journal.put(one)
        assert journal.get(one.key) == one
        assert journal.get(record(2).key) is None
    assert Journal(tmp_path / "j").get(one.key) == one


def test_a_new_journal_leaves_no_folder_behind(tmp_path: Path) -> None:
    Journal(tmp_path / "j").close()
    assert not (tmp_path / "j").exists()


def test_a_torn_last_line_is_passed_over_and_counted(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.put(record(1))
        journal.put(record(2))
    segment = next(tmp_path.glob("*.jsonl"))
    segment.write_bytes(segment.read_bytes()[:-25])
    again = Journal(tmp_path)
    assert len(again) == 1
    assert again.n_torn == 1
    with again:
        again.put(record(2))
    assert len(Journal(tmp_path)) == 2


@pytest.mark.parametrize("damage", [b"not json\n", b'{"key": "zz"}\n', b"[]\n", b"\n", b"\xff\xfe\n"])
def test_a_damaged_line_costs_only_itself(tmp_path: Path, damage: bytes) -> None:
    with Journal(tmp_path) as journal:
        journal.put(record(1))
    segment = next(tmp_path.glob("*.jsonl"))
    segment.write_bytes(damage + segment.read_bytes())
    again = Journal(tmp_path)
    assert again.get(record(1).key) is not None
    assert again.n_torn == 1


def test_two_writers_never_share_a_segment_and_merge(tmp_path: Path) -> None:
    with Journal(tmp_path) as one, Journal(tmp_path) as two:
        one.put(record(1))
        two.put(record(2))
        assert record(2).key not in one
        one.refresh()
        assert record(2).key in one
        two.put(record(3))
        one.refresh()
        assert {int(r.key, 16) for r in one} == {1, 2, 3}
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


def test_the_later_of_two_answers_to_one_question_stands(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.put(record(1, "first"))
        journal.put(record(1, "second"))
    found = Journal(tmp_path).get(record(1).key)
    assert found is not None
    assert found.text == "second"


_WRITER = """
import sys
from pathlib import Path
from annotation.vlm.journal import Journal, Record, utc_now
journal = Journal(Path(sys.argv[1]))
for n in range(10**9):
    journal.put(Record(f"{n:064x}", "p", "m", "x" * 5000, None, "stop", None, 1, 1, utc_now()))
"""


def test_what_was_put_survives_kill_9(tmp_path: Path, repository: Path) -> None:
    folder = tmp_path / "j"
    process = subprocess.Popen([sys.executable, "-c", _WRITER, str(folder)], cwd=repository)
    deadline_s = time.monotonic() + 30
    while sum(p.stat().st_size for p in folder.glob("*.jsonl")) < 200_000:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    journal = Journal(folder)
    assert len(journal) >= 39
    assert journal.n_torn <= 1
    assert sorted(int(r.key, 16) for r in journal) == list(range(len(journal)))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A disk that takes ten bytes of every line and then is full."""
    real = os.write
    taken: set[int] = set()

    def write(descriptor: int, data: bytes) -> int:
        if descriptor in taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken.add(descriptor)
        return real(descriptor, bytes(data)[:10])

    monkeypatch.setattr("annotation.vlm.journal.os.write", write)
    yield
    monkeypatch.undo()


def test_a_full_disk_is_said_and_leaves_the_segment_whole(tmp_path: Path, full_disk: None) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(StorageError, match="disk is full"):
        journal.put(record(1))
    assert next(tmp_path.glob("*.jsonl")).read_bytes() == b""
    assert record(1).key not in journal
    journal.close()


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError):
        Journal(tmp_path / "file" / "j").put(record(1))


def test_memory_holds_places_not_answers(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.put(replace(record(1), text="x" * 10_000))
        assert "x" * 100 not in repr(vars(journal))
