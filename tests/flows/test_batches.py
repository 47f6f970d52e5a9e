"""The judge step through a Batch API, command after command, against the simulated endpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pandas as pd
import pytest

from annotation.vlm.batch import Batches
from annotation.vlm.batch_calls import BatchCalls, RemoteBatch
from annotation.vlm.journal import Journal, Record
from benchmarks.simulated_endpoint import DEFAULT_MODEL, Simulator
from data_contracts.errors import Deferred, ExitCode, MedMicnError, StoppedResumable
from data_contracts.store import RunFolder
from flows.chain import Context, StepReport, execute
from flows.console import Console
from flows.settings import Settings
from flows.steps import STEPS, begin
from flows.vlm import VlmSessions
from pipeline.phantoms import make_phantoms

N_IMAGES = 6
CONCEPTS = {"dark-centre": "The centre is darker.", "jagged-outline": "The outline is jagged."}
Judge = Callable[..., StepReport]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    make_phantoms(folder, n_images=N_IMAGES, seed=1, side_px=48)
    return folder / "images"


@pytest.fixture(scope="module")
def simulator() -> Iterator[Simulator]:
    with Simulator("--batch-seconds", 0.0) as running:
        yield running


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch, simulator: Simulator) -> None:
    monkeypatch.setattr("flows.batches._FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr("annotation.vlm.batch_calls._SETTLE_S", 0.0)
    simulator.set_faults({})


def concepts_of(definitions: dict[str, str]) -> pd.DataFrame:
    rows = [
        {
            "concept_id": concept_id,
            "name": concept_id.replace("-", " "),
            "definition": definition,
            "proposed_for": [],
            "origin": "user",
            "status": "kept",
            "position": position,
        }
        for position, (concept_id, definition) in enumerate(definitions.items())
    ]
    columns = dict.fromkeys(("group", "reason", "nearest", "similarity", "synonyms", "contrast", "provenance"))
    return pd.DataFrame([columns | row for row in rows])


@pytest.fixture
def run(images: Path, tmp_path: Path) -> RunFolder:
    """A run with images and two concepts, not judged yet."""
    settings = Settings()
    run = begin(images, RunFolder(tmp_path / "run"), settings)
    execute(STEPS["ingest"], Context(run, settings, Console(quiet=True)))
    run.write_concepts(concepts_of(CONCEPTS))
    return run


def await_ends(base_url: str) -> None:
    """Return once no batch is under way; a simulator is quick, but it is another process."""
    with httpx2.Client(trust_env=False) as client, suppress(httpx2.ConnectError):
        for _ in range(200):
            batches = client.get(f"{base_url}/batches", params={"limit": 100}).json()["data"]
            if all(batch["status"] in {"completed", "failed", "expired"} for batch in batches):
                return
            time.sleep(0.05)


@pytest.fixture
def judge(run: RunFolder, simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> Judge:
    """Give the judge command; keyword arguments are keys of [vlm]."""
    price = {"input_usd_per_million_tokens": 2, "output_usd_per_million_tokens": 8}
    reaching = {"base_url": simulator.base_url, "model": DEFAULT_MODEL, "probe": False, "max_retries": 0, **price}

    def command(**vlm: Any) -> StepReport:
        monkeypatch.setattr("flows.vlm.SESSIONS", VlmSessions())
        settings = Settings.model_validate({"vlm": reaching | {"batch": True} | vlm, "flow": {"shard_size": 4}})
        try:
            return execute(STEPS["judge"], Context(run, settings, Console(quiet=True)))
        except StoppedResumable:
            await_ends(settings.vlm.base_url)
            raise

    return command


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Batches that are still under way, whatever the simulator says."""
    names: set[str] = set()
    look = BatchCalls.look

    async def look_again(calls: BatchCalls, batch_id: str) -> RemoteBatch:
        batch = await look(calls, batch_id)
        return batch.model_copy(update={"status": "in_progress"}) if batch_id in names else batch

    monkeypatch.setattr(BatchCalls, "look", look_again)
    return names


def newest_batch(run: RunFolder) -> str:
    states = [json.loads(path.read_text()) for path in run.journal_dir.glob("batches/*.json")]
    return max(states, key=lambda state: state["created_at"])["batch_id"]


def interrupt(_: float) -> None:
    raise KeyboardInterrupt


def deferred(judge: Judge, **vlm: Any) -> StoppedResumable:
    """How a command ends that leaves something for the next one."""
    with pytest.raises(StoppedResumable) as caught:
        judge(**vlm)
    assert caught.value.exit_code == ExitCode.RESUMABLE
    return caught.value


def records(run: RunFolder) -> list[Record]:
    with Journal(run.journal_dir) as journal:
        return list(journal.lines())


def answered(run: RunFolder) -> set[tuple[str, str]]:
    """Images and concepts with a usable answer in the ledger."""
    rows = run.read_judgements()
    rows = rows[rows["state"] != "not_assessed"]
    return set(zip(rows["image_id"], rows["concept_id"], strict=True))


def test_one_command_sends_and_the_same_command_collects(run: RunFolder, judge: Judge, simulator: Simulator) -> None:
    before = simulator.state()["batch_answers"]
    message = str(deferred(judge))
    assert "1 batches with 6 requests are under way" in message
    assert "within 24 hours" in message
    assert "same command again" in message
    assert run.read_judgements().empty
    report = judge()
    assert (report.n_failed, report.counts["requests"], list(report.warnings)) == (0, N_IMAGES, [])
    assert len(answered(run)) == N_IMAGES * len(CONCEPTS)
    paid = records(run)
    assert {record.batch_id is not None for record in paid} == {True}
    n_input, n_output = (sum(getattr(r, name) for r in paid) for name in ("input_tokens", "output_tokens"))
    assert report.cost_usd == pytest.approx((2e-6 * n_input + 8e-6 * n_output) / 2)
    assert report.counts["tokens"] == n_input + n_output
    assert simulator.state()["batch_answers"] - before == len(paid) == N_IMAGES
    assert not list(run.journal_dir.rglob("batches/*.json*"))


def test_one_command_that_waits_asks_what_was_cut_off_once_more(
    run: RunFolder, judge: Judge, simulator: Simulator
) -> None:
    simulator.set_faults({"cut_off": {"first": 2, "on": "/v1"}})
    report = judge(batch_wait_s=20)
    assert report.n_failed == 0
    assert len(answered(run)) == N_IMAGES * len(CONCEPTS)
    assert len(records(run)) == N_IMAGES + 2
    assert len({record.batch_id for record in records(run)}) == 2


def test_looking_again_sends_nothing_and_judges_what_is_there(
    run: RunFolder, judge: Judge, simulator: Simulator, held: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.batches.Batches", lambda client: Batches(client, max_requests=4))
    assert "2 batches with 6 requests" in str(deferred(judge))
    # The second of the two is held to be under way still.
    held.add(newest_batch(run))
    n_received = simulator.state()["bytes_received"]
    assert "1 batches with 2 requests" in str(deferred(judge))
    assert len(answered(run)) == 4 * len(CONCEPTS)
    assert "1 batches with 2 requests" in str(deferred(judge, batch_wait_s=0.3))
    assert simulator.state()["bytes_received"] == n_received
    held.clear()
    assert judge().n_failed == 0
    assert len(answered(run)) == N_IMAGES * len(CONCEPTS)


def test_failed_requests_end_the_command_with_failures_and_are_tried_by_the_next(run: RunFolder, judge: Judge) -> None:
    with Simulator("--batch-seconds", 0.0, "--batch-failure-share", 0.4) as failing:
        deferred(judge, base_url=failing.base_url)
        report = judge(base_url=failing.base_url)
        assert 0 < report.n_failed < N_IMAGES
        assert report.counts["requests"] == N_IMAGES
        assert any("requests of batches ended without an answer" in warning for warning in report.warnings)
        assert len(answered(run)) == (N_IMAGES - report.n_failed) * len(CONCEPTS)
        message = str(deferred(judge, base_url=failing.base_url))
        assert f"1 batches with {report.n_failed} requests" in message
        for _ in range(20):
            try:
                if not judge(base_url=failing.base_url).n_failed:
                    break
            except Deferred:
                continue
        assert len(answered(run)) == N_IMAGES * len(CONCEPTS)
        assert failing.state()["duplicate_answers"] == 0


def test_an_expired_batch_is_collected_and_its_rest_is_sent_at_once(
    run: RunFolder, judge: Judge, simulator: Simulator
) -> None:
    simulator.set_faults({"batch_expired": {"first": 1, "done_share": 0.5}})
    deferred(judge)
    assert "1 batches with 3 requests are under way" in str(deferred(judge))
    assert len(answered(run)) == 3 * len(CONCEPTS)
    assert judge().n_failed == 0
    assert len(answered(run)) == N_IMAGES * len(CONCEPTS)


def test_a_batch_that_expires_while_it_is_waited_for_is_for_the_next_command(
    run: RunFolder, judge: Judge, simulator: Simulator
) -> None:
    simulator.set_faults({"batch_expired": {"first": 1, "done_share": 0.5}})
    assert "expire" in str(deferred(judge, batch_wait_s=20))
    assert len(answered(run)) == 3 * len(CONCEPTS)
    assert judge(batch_wait_s=20).n_failed == 0
    assert len(records(run)) == N_IMAGES


def test_a_question_that_changes_meanwhile_is_the_only_one_that_is_asked_again(
    run: RunFolder, judge: Judge, held: set[str]
) -> None:
    deferred(judge)
    held.add(newest_batch(run))
    run.write_concepts(concepts_of(CONCEPTS | {"dark-centre": "The middle is darker than what lies around it."}))
    assert "2 batches with 12 requests" in str(deferred(judge))
    held.clear()
    assert judge().n_failed == 0
    assert sorted(len(record.cells) for record in records(run)) == [1] * N_IMAGES + [2] * N_IMAGES
    rows = run.read_judgements()
    assert rows.groupby("concept_id")["prompt_sha256"].nunique().tolist() == [1, 1]
    assert len(answered(run)) == len(rows) == N_IMAGES * len(CONCEPTS)


def test_what_came_while_waiting_is_judged_when_the_time_is_up(
    run: RunFolder, judge: Judge, held: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.batches.Batches", lambda client: Batches(client, max_requests=4))
    sleep = time.sleep
    monkeypatch.setattr("flows.batches.time.sleep", lambda _: (held.add(newest_batch(run)), sleep(0.1)))
    assert "1 batches with 2 requests" in str(deferred(judge, batch_wait_s=1))
    assert len(answered(run)) == 4 * len(CONCEPTS)


def test_only_what_fits_into_the_cap_is_sent(run: RunFolder, judge: Judge) -> None:
    message = str(deferred(judge, max_requests=4))
    assert "1 batches with 4 requests" in message
    assert "cap of 4 requests" in message
    for _ in range(4):
        try:
            judge(max_requests=4)
            break
        except StoppedResumable:
            assert len(records(run)) <= N_IMAGES
    assert len(answered(run)) == N_IMAGES * len(CONCEPTS)
    assert len(records(run)) == N_IMAGES


def test_without_batches_nothing_is_asked_until_those_under_way_have_ended(
    run: RunFolder, judge: Judge, simulator: Simulator, held: set[str]
) -> None:
    before = simulator.state()["chat_requests_received"]
    deferred(judge)
    held.add(newest_batch(run))
    assert "vlm.batch is off" in str(deferred(judge, batch=False))
    held.clear()
    assert judge(batch=False).n_failed == 0
    assert simulator.state()["chat_requests_received"] == before
    assert len(answered(run)) == N_IMAGES * len(CONCEPTS)


def test_an_interrupt_while_waiting_loses_nothing(
    run: RunFolder, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("flows.batches.time.sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            judge(batch_wait_s=60)
    assert judge().n_failed == 0
    assert len(answered(run)) == len(records(run)) * len(CONCEPTS) == N_IMAGES * len(CONCEPTS)


def test_a_refused_batch_is_a_failure_with_its_reason(run: RunFolder, judge: Judge, simulator: Simulator) -> None:
    simulator.set_faults({"batch_failed": {"first": 1}})
    report = judge(batch_wait_s=20)
    assert report.n_failed == N_IMAGES
    assert "6 requests of batches ended without an answer: simulated" in report.warnings
    assert judge(batch_wait_s=20).n_failed == 0


def test_several_samples_are_judged_together_or_not_at_all(
    run: RunFolder, judge: Judge, held: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = {"samples": 3, "temperature": 0.7}
    monkeypatch.setattr("flows.batches.Batches", lambda client: Batches(client, max_requests=10))
    deferred(judge, **sampling)
    held.add(newest_batch(run))
    # Ten of eighteen answers have come: three images have all of theirs, the fourth one of three.
    deferred(judge, **sampling)
    assert len(answered(run)) == 3 * len(CONCEPTS)
    held.clear()
    assert judge(**sampling).n_failed == 0
    rows = run.read_judgements()
    assert len(rows) == N_IMAGES * len(CONCEPTS)
    assert rows["probability"].mul(3).round(6).mod(1).eq(0).all(), "every one is a share of three answers"


def test_a_model_without_batches_judges_beside_one_with(run: RunFolder, judge: Judge, simulator: Simulator) -> None:
    with Simulator("--model", "other") as second:
        other = {"base_url": second.base_url, "model": "other", "probe": False}
        assert "1 batches with 6 requests" in str(deferred(judge, also=[other]))
        assert set(run.read_judgements()["witness_model"]) == {"other"}
        assert judge(also=[other]).n_failed == 0
        assert run.read_judgements().groupby("witness_model").size().tolist() == [N_IMAGES * len(CONCEPTS)] * 2
        assert second.state()["chat_requests_received"] == N_IMAGES


def test_a_finished_judgement_is_not_done_again(run: RunFolder, judge: Judge, simulator: Simulator) -> None:
    judge(batch_wait_s=20)
    n_received = simulator.state()["requests_received"]
    assert judge(batch_wait_s=20).reused
    assert simulator.state()["requests_received"] == n_received


def test_a_dead_endpoint_is_an_error_and_what_is_under_way_stays(run: RunFolder, judge: Judge) -> None:
    with Simulator("--batch-seconds", 0.0) as dying:
        url = dying.base_url
        deferred(judge, base_url=url)
    with pytest.raises(MedMicnError) as caught:
        judge(base_url=url)
    assert caught.value.exit_code == ExitCode.FAILED
    assert len(list(run.journal_dir.glob("batches/*.json"))) == 1


@pytest.mark.parametrize(
    "fault",
    [
        {"burst_5xx": {"first": 1, "on": "/v1/files"}},
        {"reset": {"first": 1, "when": "before", "on": "/v1/files"}},
        {"reset": {"first": 1, "when": "middle", "on": "/v1/batches"}},
        {"truncated_body": {"first": 1, "on": "/v1/batches"}},
        {"html_page": {"first": 1, "on": "/v1/batches"}},
        {"truncated_body": {"first": 1, "on": "/v1/files/"}},
        {"reset": {"first": 1, "when": "middle", "on": "/v1/files/"}},
    ],
    ids=json.dumps,
)
def test_a_wire_that_fails_once_pays_for_nothing_twice(
    run: RunFolder, judge: Judge, simulator: Simulator, fault: dict[str, Any]
) -> None:
    before = simulator.state()["batch_answers"]
    simulator.set_faults(fault)
    assert judge(batch_wait_s=20, max_retries=2).n_failed == 0
    assert sum(simulator.state()["faults_served"].values()) > 0
    assert simulator.state()["batch_answers"] - before == len(records(run)) == N_IMAGES
    assert len(answered(run)) == N_IMAGES * len(CONCEPTS)
