from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from annotation.vlm.journal import MIN_FREE_BYTES, Damage, Journal, Record, utc_now
from data_contracts.errors import StorageError


def cell(name: object) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


def record(number: int, text: str | None = "answer", cells: tuple[str, ...] = ()) -> Record:
    return Record(f"{number:032x}{0:032x}", cells, "p", "m", text, None, "stop", "r", 10, 2, utc_now())


def numbers(journal: Journal) -> list[int]:
    return [int(r.key[:32], 16) for r in journal]


def filled(folder: Path, n: int) -> Path:
    """A closed segment of so many records, each with a cell of its own."""
    with Journal(folder) as journal:
        for number in range(n):
            journal.put(record(number, f"answer {number}", (cell(number),)))
    return next(folder.glob("*.jsonl"))


def test_a_record_comes_back_as_it_went_in(tmp_path: Path) -> None:
    one = replace(
        record(1, 'quotes " and\nlines, ü and \u2028', (cell("a"), cell("b"))),
        cost_usd=0.001,
        top_logprobs=(("yes", -0.1), (" no", -2.0)),
        batch_id="batch_1",
        is_counted=False,
    )
    with Journal(tmp_path / "j") as journal:
        journal.put(one)
        assert journal.get(one.key) == one
        assert journal.get(record(2).key) is None
    assert Journal(tmp_path / "j").get(one.key) == one


@given(st.none() | st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, text: str | None) -> None:
    folder = tmp_path_factory.mktemp("any")
    with Journal(folder) as journal:
        journal.put(record(1, text, (cell(1),)))
    again = Journal(folder)
    found = again.get(record(1).key)
    assert found is not None
    assert (found.text, again.damage) == (text, [])


def test_a_new_journal_leaves_no_folder_behind(tmp_path: Path) -> None:
    Journal(tmp_path / "j").close()
    assert not (tmp_path / "j").exists()


def test_a_torn_last_line_is_passed_over_and_counted(tmp_path: Path) -> None:
    segment = filled(tmp_path, 2)
    segment.write_bytes(segment.read_bytes()[:-25])
    again = Journal(tmp_path)
    assert len(again) == 1
    assert again.damage == [Damage(segment.name, 2, is_torn_end=True)]
    assert again.n_torn == 1
    with again:
        again.put(record(1))
    assert len(Journal(tmp_path)) == 2


def test_wherever_the_last_line_is_torn_only_that_record_is_lost(tmp_path: Path) -> None:
    segment = filled(tmp_path, 3)
    whole = segment.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for end in range(start + 1, len(whole), 7):
        segment.write_bytes(whole[:end])
        again = Journal(tmp_path)
        assert (len(again), again.n_torn) == (2, 1)


def test_a_line_that_another_process_is_still_writing_is_taken_in_when_it_is_whole(tmp_path: Path) -> None:
    segment = filled(tmp_path, 2)
    whole = segment.read_bytes()
    segment.write_bytes(whole[:-25])
    reader = Journal(tmp_path)
    segment.write_bytes(whole)
    reader.refresh()
    assert (len(reader), reader.damage) == (2, [])


@pytest.mark.parametrize("damage", [b"not json\n", b'{"key": "zz"}\n', b"[]\n", b"\n", b"\xff\xfe\n"])
def test_a_damaged_line_costs_only_itself(tmp_path: Path, damage: bytes) -> None:
    segment = filled(tmp_path, 1)
    segment.write_bytes(damage + segment.read_bytes())
    again = Journal(tmp_path)
    assert again.get(record(0).key) is not None
    assert again.damage == [Damage(segment.name, 1, is_torn_end=False)]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.5, 0.8, 0.97, 0.99])
def test_a_flipped_bit_costs_only_its_record_and_is_named_with_its_line(tmp_path: Path, share: float) -> None:
    segment = filled(tmp_path, 5)
    lines = segment.read_bytes().splitlines(keepends=True)
    line = bytearray(lines[2])
    line[int(share * (len(line) - 1))] ^= 0x01
    segment.write_bytes(b"".join([*lines[:2], bytes(line), *lines[3:]]))
    again = Journal(tmp_path)
    assert [r.text for r in again] == ["answer 0", "answer 1", "answer 3", "answer 4"]
    assert again.damage == [Damage(segment.name, 3, is_torn_end=False)]
    assert again.find([cell(2), cell(3)]).keys() == {cell(3)}


def test_a_changed_answer_with_valid_json_does_not_pass_either(tmp_path: Path) -> None:
    segment = filled(tmp_path, 1)
    segment.write_bytes(segment.read_bytes().replace(b"answer 0", b"answer 1"))
    assert (len(Journal(tmp_path)), Journal(tmp_path).n_torn) == (0, 1)


def test_a_record_that_changes_while_it_is_in_use_is_refused(tmp_path: Path) -> None:
    segment = filled(tmp_path, 1)
    journal = Journal(tmp_path)
    segment.write_bytes(segment.read_bytes().replace(b"answer 0", b"answer 1"))
    with pytest.raises(StorageError, match="changed while it was in use"):
        journal.get(record(0).key)


def test_every_line_is_plain_json_for_other_programs(tmp_path: Path) -> None:
    (row,) = map(json.loads, filled(tmp_path, 1).read_text().splitlines())
    assert (row["text"], row["cells"]) == ("answer 0", [cell(0)])


# ---- finding ------------------------------------------------------------------------------------------------------


def test_cells_find_the_answer_that_decided_them_last(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.put(record(1, "first", (cell("a"), cell("b"))))
        journal.put(record(2, "second", (cell("b"), cell("c"))))
        for opened in (journal, Journal(tmp_path)):
            found = opened.find(cell(name) for name in "abcd")
            assert {c: r.text for c, r in found.items()} == {
                cell("a"): "first",
                cell("b"): "second",
                cell("c"): "second",
            }
            assert opened.n_cells == 3


def test_each_record_is_read_once_however_many_cells_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = tuple(cell(n) for n in range(40))
    with Journal(tmp_path) as journal:
        journal.put(record(1, "one", cells[:20]))
        journal.put(record(2, "two", cells[20:]))
        read, n_read = journal._read, 0

        def counting(*place: object) -> Record:
            nonlocal n_read
            n_read += 1
            return read(*place)  # type: ignore[arg-type]

        monkeypatch.setattr(journal, "_read", counting)
        assert len(journal.find(cells)) == 40
    assert n_read == 2


def test_the_later_of_two_answers_to_one_question_stands_and_both_are_kept(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.put(record(1, "first"))
        journal.put(record(1, "second"))
    again = Journal(tmp_path)
    found = again.get(record(1).key)
    assert found is not None
    assert found.text == "second"
    assert [r.text for r in again] == ["second"]
    assert [r.text for r in again.lines()] == ["first", "second"]
    assert (len(again), again.n_lines) == (1, 2)


def test_two_writers_never_share_a_segment_and_merge(tmp_path: Path) -> None:
    with Journal(tmp_path) as one, Journal(tmp_path) as two:
        one.put(record(1))
        two.put(record(2, cells=(cell("two"),)))
        assert record(2).key not in one
        one.refresh()
        assert record(2).key in one
        assert cell("two") in one.find([cell("two")])
        two.put(record(3))
        one.refresh()
        two.refresh()
        assert set(numbers(one)) == set(numbers(two)) == {1, 2, 3}
        one.refresh()
        assert one.n_lines == 3
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


def test_after_closing_its_own_records_are_not_taken_in_twice(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.put(record(1))
    journal.close()
    journal.refresh()
    assert journal.n_lines == 1
    journal.put(record(2))
    journal.close()
    assert len(list(tmp_path.glob("*.jsonl"))) == 2


def test_two_hundred_thousand_cells_open_in_seconds(tmp_path: Path) -> None:
    n_records, n_cells = 5000, 40
    with Journal(tmp_path) as journal:
        journal.put(record(0, cells=(cell("first"),)))
    segment = next(tmp_path.glob("*.jsonl"))
    from annotation.vlm.journal import _line

    template = record(1, "x" * 1000)
    with segment.open("ab") as stream:
        for number in range(n_records):
            cells = tuple(cell((number, k)) for k in range(n_cells))
            stream.write(_line(replace(template, key=cell(number), cells=cells)))
    start_s = time.monotonic()
    journal = Journal(tmp_path)
    assert time.monotonic() - start_s < 5
    assert (len(journal), journal.n_cells, journal.damage) == (n_records + 1, n_records * n_cells + 1, [])
    start_s = time.monotonic()
    assert len(journal.find(cells)) == n_cells
    assert time.monotonic() - start_s < 0.5


def test_memory_holds_places_not_answers(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.put(replace(record(1), text="x" * 10_000))
        assert "x" * 100 not in repr(vars(journal))


# ---- disks --------------------------------------------------------------------------------------------------------

_WRITER = """
import sys
from pathlib import Path
from annotation.vlm.journal import Journal, Record, utc_now
journal = Journal(Path(sys.argv[1]))
for n in range(10**9):
    key = f"{n:032x}" * 2
    journal.put(Record(key, (key,), "p", "m", "x" * 5000, None, "stop", None, 1, 1, utc_now()))
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
    assert len(journal) >= 37
    assert journal.n_torn <= 1
    assert sorted(numbers(journal)) == list(range(len(journal)))


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A disk that takes ten bytes of a line and then is full."""
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
        journal.put(record(1, cells=(cell(1),)))
    assert next(tmp_path.glob("*.jsonl")).read_bytes() == b""
    assert record(1).key not in journal
    assert journal.find([cell(1)]) == {}
    journal.close()


def test_a_disk_that_fills_up_keeps_every_earlier_record_and_goes_on_when_there_is_room(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with Journal(tmp_path) as journal:
        journal.put(record(1))
        request.getfixturevalue("full_disk")
        with pytest.raises(StorageError):
            journal.put(record(2))
        request.getfixturevalue("monkeypatch").undo()
        journal.put(record(3))
    again = Journal(tmp_path)
    assert (numbers(again), again.damage) == ([1, 3], [])


def free_space(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> list[Path]:
    """The disk from now on, and where it was looked at."""
    looked: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        looked.append(Path(path))
        return SimpleNamespace(free=n_bytes)

    monkeypatch.setattr("annotation.vlm.journal.shutil.disk_usage", usage)
    return looked


def test_little_room_is_an_error_before_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "runs" / "journal")
    looked = free_space(monkeypatch, MIN_FREE_BYTES - 1)
    for _ in range(2):
        with pytest.raises(StorageError, match=r"at least 64 MB.*nothing more was sent.*Free some space"):
            journal.require_room()
    # The folder is not there yet: the disk is that of the folder it will be in.
    assert looked == [tmp_path, tmp_path]


def test_enough_room_is_looked_for_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, looked = Journal(tmp_path), free_space(monkeypatch, MIN_FREE_BYTES)
    for _ in range(100):
        journal.require_room()
    assert len(looked) == 1


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError):
        Journal(tmp_path / "file" / "j").put(record(1))
