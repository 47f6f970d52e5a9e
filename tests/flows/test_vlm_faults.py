"""The judge step against an endpoint in its own process that fails in every way: nothing is lost, nothing invented.

What was answered is compared with the simulator's truth after every command, and requests are counted by the
simulator itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from annotation.vlm.budget import Budget
from annotation.vlm.pace import Pace
from annotation.vlm.probe import n_requests
from annotation.vlm.schema import FaultCode
from benchmarks.simulated_endpoint import (
    DEFAULT_MODEL,
    Noise,
    Simulator,
    Witness,
    answer,
    read_truth,
    said_of_concept,
)
from data_contracts.errors import (
    BudgetReached,
    ConfigurationError,
    Deferred,
    EndpointError,
    ExitCode,
    MedMicnError,
)
from data_contracts.tables import ProbabilitySource
from flows.chain import StepReport
from flows.pricing import estimate_judging
from tests.flows.vlm_run import CHOICE, CONCEPTS, N_CELLS, N_IMAGES, SHAPES, SINGLES, Run, World, make_world

FLAWLESS = ("--sensitivity", 1, "--specificity", 1)
N_HIT = 3
PRICE = {"input_usd_per_million_tokens": 2, "output_usd_per_million_tokens": 8}

NewRun = Callable[..., Run]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def running(world: World) -> Iterator[Simulator]:
    with Simulator(*FLAWLESS, "--truth", world.truth_file) as simulator:
        yield simulator


@pytest.fixture
def simulator(running: Simulator) -> Simulator:
    """An endpoint that answers rightly, until it is given faults."""
    running.set_faults({})
    return running


@pytest.fixture
def new_run(world: World, tmp_path: Path, simulator: Simulator, monkeypatch: pytest.MonkeyPatch) -> NewRun:
    """A run to be judged, by the module's simulator or by another one."""

    def make(by: Simulator = simulator) -> Run:
        return Run(world, tmp_path / "run", by, monkeypatch)

    return make


@pytest.fixture
def run(new_run: NewRun) -> Run:
    return new_run()


class Counted:
    """What a simulator has seen since a moment."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._before = simulator.state()

    def __getitem__(self, name: str) -> int:
        return self._simulator.state()[name] - self._before[name]

    @property
    def requests(self) -> int:
        return self["chat_requests_received"]

    @property
    def tokens(self) -> int:
        return self["prompt_tokens_billed"] + self["completion_tokens_billed"]

    @property
    def n_faults(self) -> int:
        now = self._simulator.state()
        return sum(now["faults_served"].values()) - sum(self._before["faults_served"].values())

    @property
    def usd(self) -> float:
        return (2 * self["prompt_tokens_billed"] + 8 * self["completion_tokens_billed"]) / 1e6

    def statuses(self, status: int) -> int:
        before, now = self._before["statuses"], self._simulator.state()["statuses"]
        return now.get(str(status), 0) - before.get(str(status), 0)


def images_of(cells: set[tuple[str, str]]) -> set[str]:
    return {image_id for image_id, _ in cells}


def warning(n_images: int, code: FaultCode) -> str:
    return f"{n_images} images have no answer to some question: {code}"


def finishes(run: Run, n_open: int, **vlm: Any) -> None:
    """Assert that the same command, the faults gone, asks about the open images once each, and all is right then."""
    run.simulator.set_faults({})
    counted = Counted(run.simulator)
    report = run.judge(**vlm)
    assert (report.n_failed, list(report.warnings)) == (0, [])
    assert report.counts["requests"] == counted.requests == n_open
    assert run.is_all_right


def stopped(run: Run, kind: type[MedMicnError], **vlm: Any) -> MedMicnError:
    """How a command ends that cannot go on; asserts that the ledger is right then, and that every answer is kept."""
    counted, n_before = Counted(run.simulator), len(run.records())
    with pytest.raises(kind) as caught:
        run.judge(**vlm)
    if run.folder.judgements_dir.is_dir():
        run.open_cells()
    assert len(run.records()) - n_before == counted["completed_answers"] + counted["abandoned_answers"]
    return caught.value


def test_without_faults_every_image_is_asked_once_and_everything_is_right(run: Run) -> None:
    counted = Counted(run.simulator)
    finishes(run, N_IMAGES)
    assert counted["answers_without_truth"] == 0
    assert counted.tokens == sum(r.input_tokens + r.output_tokens for r in run.records()) > 0
    assert run.judge().reused
    assert counted.requests == len(run.records()) == N_IMAGES


# ---- requests without an answer -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "how", "code"),
    [
        ("burst_5xx", {}, FaultCode.SERVER_ERROR),
        ("reset", {"when": "before"}, FaultCode.CONNECTION_LOST),
        ("reset", {"when": "middle"}, FaultCode.CONNECTION_LOST),
        ("truncated_body", {}, FaultCode.CONNECTION_LOST),
        ("slow_loris", {"interval_s": 0.05}, FaultCode.TIMED_OUT),
        ("html_page", {}, FaultCode.SERVER_ERROR),
        ("huge_body", {"megabytes": 17}, FaultCode.CONNECTION_LOST),
    ],
)
def test_a_request_without_an_answer_is_coded_and_asked_by_the_next_command(
    run: Run, fault: str, how: dict[str, Any], code: FaultCode
) -> None:
    run.simulator.set_faults({fault: {"first": N_HIT} | how})
    counted, started_s = Counted(run.simulator), time.monotonic()
    report = run.judge(timeout_s=2.5)
    assert time.monotonic() - started_s < 10
    assert report.n_failed == N_HIT
    assert list(report.warnings) == [warning(N_HIT, code)]
    assert counted.requests == report.counts["requests"] == N_IMAGES
    lost = run.open_cells()
    assert set(lost) == {code}
    # Images are asked as a whole, so none of their cells is known.
    assert len(images_of(lost[code])) == N_HIT
    assert len(lost[code]) == N_HIT * len(CONCEPTS)
    assert len(run.records()) == N_IMAGES - N_HIT
    finishes(run, N_HIT)


@pytest.mark.parametrize(("fault", "how"), [("burst_5xx", {}), ("reset", {}), ("truncated_body", {})])
def test_a_repeated_attempt_heals_what_passes_by_itself(run: Run, fault: str, how: dict[str, Any]) -> None:
    run.simulator.set_faults({fault: {"first": N_HIT} | how})
    counted = Counted(run.simulator)
    report = run.judge(max_retries=3)
    assert (report.n_failed, list(report.warnings)) == (0, [])
    assert run.is_all_right
    assert (report.counts["requests"], counted.requests) == (N_IMAGES, N_IMAGES + N_HIT)


def test_an_answer_that_was_lost_is_counted_at_its_highest_price_and_said(run: Run) -> None:
    run.simulator.set_faults({"reset": {"first": N_HIT, "when": "middle"}})
    counted = Counted(run.simulator)
    report = run.judge(**PRICE)
    assert report.cost_usd is not None
    (lost,) = [text for text in report.warnings if "answer was lost" in text]
    maybe_usd = float(lost.split()[2])
    # The simulator billed the lost ones too, and less than they might have cost.
    assert report.cost_usd - maybe_usd < counted.usd < report.cost_usd
    assert counted["completed_answers"] == N_IMAGES - N_HIT


def test_an_endpoint_that_fails_everything_is_given_up_soon(run: Run) -> None:
    run.simulator.set_faults({"burst_5xx": 1})
    counted = Counted(run.simulator)
    error = stopped(run, EndpointError, concurrency=4)
    assert error.exit_code == ExitCode.FAILED
    assert "requests in a row, last: server_error" in str(error)
    assert 10 <= counted.requests < N_IMAGES
    finishes(run, N_IMAGES)


def test_a_server_that_dies_half_way_leaves_only_the_rest_to_ask(
    new_run: NewRun, world: World, simulator: Simulator
) -> None:
    n_answers = 10
    with Simulator(*FLAWLESS, "--truth", world.truth_file, "--fault", f"die_after={n_answers}") as mortal:
        run = new_run(mortal)
        with pytest.raises(EndpointError, match=mortal.base_url) as caught:
            run.judge(concurrency=4)
        assert caught.value.exit_code == ExitCode.FAILED
        assert mortal.wait(5) == 1
    n_kept = len(run.records())
    # Only what was on its way when the end was noticed may be missing.
    assert n_answers - 4 <= n_kept <= n_answers
    run.simulator = simulator
    finishes(run, N_IMAGES - n_kept)


# ---- answers that are of no use -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        "truncated_json",
        "prose",
        "wrong_types",
        "missing_concepts",
        "duplicate_keys",
        "empty_content",
        "cut_off",
    ],
)
def test_a_useless_answer_is_asked_for_once_more_and_both_are_paid_for(run: Run, fault: str) -> None:
    # Only one, since the second question about an image may well be among the first few requests.
    run.simulator.set_faults({fault: {"first": 1}})
    counted = Counted(run.simulator)
    report = run.judge()
    assert (report.n_failed, list(report.warnings)) == (0, [])
    assert run.is_all_right
    assert report.counts["requests"] == counted.requests == len(run.records()) == N_IMAGES + 1
    assert report.counts["tokens"] == counted.tokens
    assert run.judge().reused


@pytest.mark.parametrize(
    ("fault", "code", "n_questions_lost"),
    [
        ("truncated_json", FaultCode.INVALID_JSON, 3),
        ("prose", FaultCode.INVALID_JSON, 3),
        ("wrong_types", FaultCode.WRONG_SCHEMA, 3),
        ("duplicate_keys", FaultCode.WRONG_SCHEMA, 1),
        ("empty_content", FaultCode.EMPTY_ANSWER, 3),
        ("cut_off", FaultCode.CUT_OFF, 3),
        ("refusal", FaultCode.REFUSED, 3),
    ],
)
def test_answers_that_stay_useless_are_coded_and_never_paid_for_again(
    run: Run, fault: str, code: FaultCode, n_questions_lost: int
) -> None:
    run.simulator.set_faults({fault: 1})
    counted = Counted(run.simulator)
    report = run.judge()
    # A refusal is final; anything else is asked once more.
    n_asked = N_IMAGES * (1 if code is FaultCode.REFUSED else 2)
    assert report.counts["requests"] == counted.requests == n_asked
    assert report.n_failed == N_IMAGES
    assert list(report.warnings) == [warning(N_IMAGES, code)]
    lost = run.open_cells()
    assert set(lost) == {code}
    asked_first = {(i, SINGLES[0]) for i in run.world.truth}
    assert lost[code] == asked_first if n_questions_lost == 1 else len(lost[code]) == N_CELLS
    run.simulator.set_faults({})
    again = run.judge()
    assert (again.n_failed, again.counts["requests"], again.counts["from_journal"]) == (N_IMAGES, 0, N_IMAGES)
    assert counted.requests == n_asked
    assert run.open_cells() == lost


def test_concepts_that_are_missing_every_time_are_coded_and_the_others_are_kept(run: Run) -> None:
    run.simulator.set_faults({"missing_concepts": 1})
    report = run.judge()
    lost = run.open_cells()
    assert set(lost) == {FaultCode.WRONG_SCHEMA}
    assert len(images_of(lost[FaultCode.WRONG_SCHEMA])) == report.n_failed == N_IMAGES
    assert 0 < len(lost[FaultCode.WRONG_SCHEMA]) < N_CELLS
    # Of the values of a group all are known or none is.
    shapes = [len({(i, s) for s in SHAPES} & lost[FaultCode.WRONG_SCHEMA]) for i in run.world.truth]
    assert set(shapes) <= {0, len(SHAPES)}


def test_only_what_is_missing_is_asked_once_more(run: Run) -> None:
    run.simulator.set_faults({"missing_concepts": {"first": 1}})
    run.judge()
    n_questions = [len(r.cells) for r in run.records()]
    assert n_questions.count(len(SINGLES) + 1) == N_IMAGES
    # Either the first and the last of three questions were missing, or the one between.
    assert len(n_questions) == N_IMAGES + 1
    assert min(n_questions) < len(SINGLES) + 1


@pytest.mark.parametrize("fault", ["fenced_json", "extra_concepts", "nan_probability"])
def test_an_answer_that_can_be_used_is_used_and_no_more_than_was_asked(run: Run, fault: str) -> None:
    run.simulator.set_faults({fault: 1})
    report = run.judge()
    assert (report.n_failed, report.counts["requests"]) == (0, N_IMAGES)
    assert run.is_all_right
    ledger = run.ledger()
    assert len(ledger) == N_CELLS
    if fault == "nan_probability":
        assert ledger["probability"].isna().all()
        assert ledger["probability_source"].isna().all()
    else:
        assert ledger["probability"].between(0, 1).all()
        assert set(ledger["probability_source"]) == {ProbabilitySource.STATED, ProbabilitySource.EXCLUDED}


def test_an_answer_that_had_too_little_room_gets_twice_as_much(run: Run) -> None:
    counted = Counted(run.simulator)
    # Three answers take 70 to 90 tokens.
    report = run.judge(max_output_tokens=60)
    assert (report.n_failed, report.counts["requests"], counted.requests) == (0, 2 * N_IMAGES, 2 * N_IMAGES)
    assert [r.finish_reason for r in run.records()].count("length") == N_IMAGES
    assert run.is_all_right


# ---- too many -----------------------------------------------------------------------------------------------------


def test_a_storm_is_waited_for_and_nobody_is_lost(run: Run) -> None:
    storm_s, at_once = 1.5, 4
    run.simulator.set_faults({"storm": {"for_s": storm_s, "on": "/v1/chat"}})
    counted, started_s = Counted(run.simulator), time.monotonic()
    report = run.judge(concurrency=at_once)
    assert (report.n_failed, list(report.warnings)) == (0, [])
    assert run.is_all_right
    # Once the endpoint is well again, it is soon asked as before.
    assert storm_s < time.monotonic() - started_s < 8
    # All that were on their way at first, and then a few that found out whether it is over.
    assert 2 <= counted.statuses(429) <= at_once + 4
    assert counted.requests == N_IMAGES + counted.statuses(429)
    assert len(run.records()) == N_IMAGES


def test_the_rate_of_a_limiter_is_found_and_kept(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.simulator.set_faults({"rate_limit": {"requests_per_minute": 1200, "burst_s": 0.3}})
    counted, n_answers = Counted(run.simulator), 3 * N_IMAGES
    n_answered_before: list[int] = []
    told = Pace.told_to_wait

    def watched(pace: Pace, seconds: float, left_at_s: float) -> None:
        n_answered_before.append(len(run.records()))
        told(pace, seconds, left_at_s)

    monkeypatch.setattr(Pace, "told_to_wait", watched)
    report = run.judge(concepts_per_request=1)
    assert (report.n_failed, report.counts["requests"]) == (0, n_answers)
    assert run.is_all_right
    assert counted.requests == n_answers + counted.statuses(429)
    # At first more are on their way than it allows; from then on it has little to say.
    assert len(n_answered_before) == counted.statuses(429) > 0
    assert sum(n > n_answers / 3 for n in n_answered_before) <= 8


def test_a_wait_beyond_patience_defers_and_the_same_command_goes_on(run: Run) -> None:
    n_first = 5
    run.simulator.set_faults(
        {"rate_limit": {"requests_per_minute": 60, "burst_s": n_first}, "retry_after_s": 3600},
    )
    counted, started_s = Counted(run.simulator), time.monotonic()
    error = stopped(run, Deferred, max_wait_s=30, concurrency=4)
    assert time.monotonic() - started_s < 5
    assert error.exit_code == ExitCode.RESUMABLE
    assert isinstance(error, Deferred)
    assert 3590 < error.retry_after_s <= 3600
    assert counted.requests <= n_first + 1 + 4
    n_kept = len(run.records())
    assert n_kept >= n_first
    finishes(run, N_IMAGES - n_kept)


def test_money_that_is_used_up_ends_the_run_at_once_and_nothing_is_lost(run: Run) -> None:
    # With this share it is the fourth request that hears of it.
    run.simulator.set_faults({"insufficient_quota": 0.14})
    counted, started_s = Counted(run.simulator), time.monotonic()
    error = stopped(run, EndpointError, concurrency=2, max_retries=5)
    assert time.monotonic() - started_s < 5
    assert error.exit_code == ExitCode.FAILED
    assert "quota of this key is used up" in str(error)
    # No attempt at it is repeated, however often the client may.
    assert counted.statuses(429) <= 2
    assert counted.requests < N_IMAGES
    n_kept = len(run.records())
    assert n_kept >= 2
    finishes(run, N_IMAGES - n_kept)


# ---- the wrong endpoint -------------------------------------------------------------------------------------------


def test_a_model_that_is_not_offered_is_refused_before_anything_is_sent(run: Run) -> None:
    counted = Counted(run.simulator)
    error = stopped(run, ConfigurationError, model="simulated-vln")
    assert DEFAULT_MODEL in str(error)
    assert counted.requests == 0
    finishes(run, N_IMAGES)


def test_a_model_that_is_offered_and_unknown_is_an_error_of_the_endpoint(run: Run) -> None:
    run.simulator.set_faults({"unknown_model": 1})
    counted = Counted(run.simulator)
    error = stopped(run, EndpointError, max_retries=5)
    assert error.exit_code == ExitCode.FAILED
    assert DEFAULT_MODEL in str(error)
    assert counted.requests <= 16
    assert run.records() == []
    finishes(run, N_IMAGES)


def test_a_second_witness_that_cannot_be_asked_is_noticed_before_the_first_one_is(run: Run) -> None:
    counted = Counted(run.simulator)
    also = run.context(model="second-vlm").settings.vlm.model_dump(exclude={"also"})
    error = stopped(run, ConfigurationError, also=[also])
    assert "second-vlm" in str(error)
    assert counted.requests == 0


def test_a_blind_endpoint_is_refused_before_any_image_is_sent(new_run: NewRun, world: World) -> None:
    with Simulator("--blind", "--truth", world.truth_file) as blind:
        run = new_run(blind)
        error = stopped(run, EndpointError, probe=True)
        assert error.exit_code == ExitCode.FAILED
        assert "does not see images" in str(error)
        state = blind.state()
    # The truth file knows every image of the user and no drawn one.
    assert state["chat_requests_received"] == state["answers_without_truth"] == n_requests(run.context().settings.vlm)
    assert not list(run.folder.judgements_dir.glob("*"))


def test_an_endpoint_without_schemas_and_token_counts_still_works(new_run: NewRun, world: World) -> None:
    with Simulator(*FLAWLESS, "--truth", world.truth_file, "--no-schema", "--no-usage") as plain:
        run = new_run(plain)
        counted = Counted(plain)
        report = run.judge(probe=True, **PRICE)
        assert (report.n_failed, report.counts["requests"]) == (0, N_IMAGES)
        assert counted["answers_without_truth"] == counted.requests - N_IMAGES == 6
        (found,) = run.folder.read_manifest().endpoints.values()
        usd, tokens = counted.usd, counted.tokens
    assert (found["sees_images"], found["keeps_schema"], found["reports_usage"]) == (True, False, False)
    assert found["tokens_per_image"] is None
    assert run.is_all_right
    # Nobody counts them, so each request counts as the most it may have had.
    records = run.records()
    assert not any(r.is_counted for r in records)
    assert sum(r.input_tokens + r.output_tokens for r in records) > tokens
    assert report.cost_usd is not None
    assert report.cost_usd > usd


def test_two_witnesses_are_asked_once_each_and_speak_for_themselves(
    run: Run, world: World, simulator: Simulator
) -> None:
    noise, model = Noise(0.7, 0.6), "second-vlm"
    errs = ("--seed", 7, "--sensitivity", noise.sensitivity, "--specificity", noise.specificity)
    with Simulator(*errs, "--model", model, "--truth", world.truth_file) as second:
        counted = [Counted(simulator), Counted(second)]
        also = run.context(base_url=second.base_url, model=model).settings.vlm.model_dump(exclude={"also"})
        report = run.judge(also=[also])
        assert (report.n_failed, report.counts["requests"]) == (0, 2 * N_IMAGES)
        assert [c.requests for c in counted] == [N_IMAGES, N_IMAGES]
    assert run.is_all_right
    truth, _ = read_truth(world.truth_file)
    witness = Witness(seed=7, noise=noise, truth=truth)
    ledger = run.ledger(model)
    said = dict(zip(zip(ledger["image_id"], ledger["concept_id"], strict=True), ledger["state"], strict=True))
    assert len(said) == N_CELLS
    expected = {(i, c): said_of_concept(c, world.sights[i], witness).word for i in world.truth for c in SINGLES}
    for image_id, sight in world.sights.items():
        choices = {"enum": [*SHAPES, "none", "uncertain"]}
        schema = {"properties": {CHOICE: {"properties": {"choice": choices}}}}
        chosen = answer(schema, sight, witness)[CHOICE]["choice"]
        expected |= {(image_id, s): "present" if s == chosen else "absent" for s in SHAPES}
    assert said == expected
    right = [(said[i, c] == "present") == world.truth[i][c] for i, c in said]
    assert 0.5 < sum(right) / len(right) < 0.85


# ---- caps ---------------------------------------------------------------------------------------------------------


def until_done(run: Run, check: Callable[[Counted], None], **vlm: Any) -> tuple[StepReport, int]:
    """Give the same command until its cap is not reached; `check` sees each of them. The last report, and how many."""
    for n_commands in range(1, N_IMAGES):
        counted = Counted(run.simulator)
        try:
            report = run.judge(**vlm)
        except BudgetReached:
            check(counted)
            continue
        check(counted)
        return report, n_commands
    raise AssertionError("expected every command to do a part")


def test_a_cap_on_requests_holds_for_every_attempt_and_the_next_command_goes_on(run: Run) -> None:
    cap, n_faults = 7, 4
    run.simulator.set_faults({"burst_5xx": {"first": n_faults}})
    counted = Counted(run.simulator)

    def check(one: Counted) -> None:
        assert 0 < one.requests <= cap
        # Whatever was answered until the cap is kept.
        assert len(run.records()) == counted["completed_answers"]

    report, n_commands = until_done(run, check, max_requests=cap, max_retries=2)
    assert report.n_failed == 0
    assert run.is_all_right
    assert counted.requests == N_IMAGES + n_faults
    assert n_commands == -(-(N_IMAGES + n_faults) // cap)


def test_the_cap_on_requests_stops_resumable(run: Run) -> None:
    error = stopped(run, BudgetReached, max_requests=5)
    assert error.exit_code == ExitCode.RESUMABLE
    assert "cap of 5 requests" in str(error)
    finishes(run, N_IMAGES - 5)


def test_a_cap_on_money_holds_at_every_moment_and_the_next_command_goes_on(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work,) = estimate_judging(run.context(**PRICE))
    most_usd, n_lost = work.estimate.most_usd_per_request, 2
    assert most_usd is not None
    cap_usd = 3.5 * most_usd
    committed_usd: list[float] = []
    reserve = Budget.reserve

    async def watched(budget: Budget, usd: float) -> None:
        await reserve(budget, usd)
        committed_usd.append(budget.committed_usd)

    def check(one: Counted) -> None:
        assert 0 < one.usd <= cap_usd

    monkeypatch.setattr(Budget, "reserve", watched)
    # The endpoint bills an answer that never arrives.
    run.simulator.set_faults({"reset": {"first": n_lost, "when": "middle"}})
    counted = Counted(run.simulator)
    report, n_commands = until_done(run, check, max_cost_usd=cap_usd, max_retries=2, **PRICE)
    assert report.n_failed == 0
    assert n_commands > 2
    assert len(committed_usd) == counted.requests == N_IMAGES + n_lost
    # Of sixteen that may ask at once three fit.
    assert 2.9 * most_usd < max(committed_usd) <= cap_usd
    assert run.is_all_right
    assert len(run.records()) == N_IMAGES


# ---- everything at once -------------------------------------------------------------------------------------------


def test_under_all_faults_together_nothing_is_lost_invented_or_paid_for_twice(run: Run) -> None:
    shares = {
        **dict.fromkeys(("burst_5xx", "html_page", "truncated_body", "refusal", "empty_content", "cut_off"), 0.05),
        **dict.fromkeys(("reset", "truncated_json", "missing_concepts", "duplicate_keys", "wrong_types"), 0.1),
        **dict.fromkeys(("fenced_json", "extra_concepts", "nan_probability"), 0.3),
    }
    rate = {"rate_limit": {"requests_per_minute": 3000, "burst_s": 0.3}}
    run.simulator.set_faults(shares | rate)
    counted = Counted(run.simulator)
    report = run.judge(max_retries=1)
    lost = run.open_cells()
    assert report.n_failed == len(set().union(*map(images_of, lost.values()))) > 0
    never_answered = {FaultCode.SERVER_ERROR, FaultCode.CONNECTION_LOST}
    n_open = len(set().union(*(images_of(cells) for code, cells in lost.items() if code in never_answered)))
    assert counted.n_faults > N_IMAGES
    run.simulator.set_faults({})
    again = Counted(run.simulator)
    assert run.judge().counts["requests"] == again.requests == n_open
    assert set(run.open_cells()) <= set(lost) - never_answered
    records = run.records()
    assert len({r.key for r in records}) == len(records)
