"""The same judging job through medmicn and through bespokelabs-curator, on the same simulated endpoint.

    python benchmarks/other_library.py --prepare          once: installs the other library outside this project
    python benchmarks/other_library.py [--images 500] [--rounds 2]

Both are started as a person would: medmicn as `medmicn judge` on a folder that `medmicn ingest` and `medmicn concepts`
have taken in, the other library as the script `other_library_job.py`. Each judges the images once undisturbed and once
killed (SIGKILL) when the endpoint has given about half of the answers, then started again with the same command. The
endpoint answers one request in fifty with HTTP 500 and one in a hundred with broken JSON; it is started afresh for
every row, and it is what counts requests and tokens. Figures of several rounds are given as least–most.

What to know when reading the table:

- Both ask the same words with the same limits and the same shape of answer; medmicn puts part of the words into a
  system message, which the other library cannot combine with images. Their JSON schemas differ by a few tokens.
- medmicn decodes every image and encodes it anew, which strips metadata and bounds its size; the other library sends
  the bytes of the file, which is less work. Their sizes are the same here.
- medmicn first tests the endpoint with six small questions (once a run folder), the other library with two (at every
  start). Both are in every count.
- `ingest` and `concepts` of medmicn, which also look for broken files and duplicates, are a column of their own. The
  other library has nothing like them: it is given a list of paths.
- A request in flight when a process is killed is lost and billed, whoever sent it: with many in flight that is most
  of what a kill costs, and no library can avoid it.
- images/s and its share of the ideal (requests in flight / latency) are measured at the endpoint, from the first
  moment with many requests in flight to the last answer; start-up and tests are in the seconds of the command only.
- Of a killed run, the seconds, CPU and memory are those of the command that was given again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))

from simulated_endpoint import Simulator

from annotation.prompts import Framing, judging_request
from annotation.vlm.questions import questions_of
from annotation.vlm.settings import JPEG_QUALITY, VlmSettings
from data_contracts.concepts import Concept, Vocabulary, slug
from data_contracts.pixels import encode
from data_contracts.store import RunFolder
from data_contracts.tables import State

LIBRARY = "bespokelabs-curator==0.1.31"
DEFAULT_ENVIRONMENT = Path(tempfile.gettempdir()) / "medmicn-other-library"
PROJECT = Path(__file__).resolve().parent.parent
JOB = Path(__file__).resolve().with_name("other_library_job.py")

MODEL = "simulated"
MODALITY = "photographs of smooth colour patches"
CONCEPTS = ("redness", "blueness", "greenness", "brightness", "darkness", "contrast")
CONCEPTS += ("symmetry", "roundness", "stripes", "speckles", "haze", "vignette")
SIDE_PX = 512
JITTER = 0.2
"""Of the latency, to either side."""
SERVER_ERRORS, BROKEN_JSON = 0.02, 0.01
"""Shares of the requests."""

_TICK_S = 0.1
_MORE_THAN_A_TEST = 8
"""Requests in flight at once that no test of the endpoint reaches: from then on images are being judged."""
_ANSWERED = {State.PRESENT, State.ABSENT, State.UNCERTAIN}
_PROCESS_LIMIT_S = 120.0
_WELL = {0, 5}
"""Exit codes of a command that came to its end; medmicn tells with 5 that some images have no answer."""


# --- The job ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What both are to do."""

    folder: Path
    """Images, and everything that comes of them."""
    n_images: int
    in_flight: int
    latency_s: float
    environment: Path
    """Where the other library is installed."""
    ends_at_s: float
    """When the whole benchmark is given up, on the monotonic clock."""

    @property
    def images(self) -> Path:
        """The folder of images."""
        return self.folder / "images"

    @property
    def words(self) -> Path:
        """The file of concepts."""
        return self.folder / "concepts.csv"

    def make(self, seed: int = 0) -> None:
        """Write concepts and images: smooth random pictures, encoded as medmicn encodes what it sends."""
        self.words.write_text("name\n" + "\n".join(CONCEPTS), encoding="utf-8")
        self.images.mkdir()
        rng = np.random.default_rng(seed)
        for n in range(self.n_images):
            small = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
            pixels = np.asarray(small.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC))
            data = encode(pixels, SIDE_PX, "JPEG", jpeg_quality=JPEG_QUALITY)
            (self.images / f"{n:06d}.jpg").write_bytes(data)

    def simulator(self) -> Simulator:
        """An endpoint that nobody has asked yet; its errors fall on the same numbers of requests every time."""
        errors = json.dumps({"share": SERVER_ERRORS, "statuses": [500]})
        latency = ("--latency-s", self.latency_s, "--latency-jitter-s", JITTER * self.latency_s)
        faults = ("--fault", f"burst_5xx={errors}", "--fault", f"truncated_json={BROKEN_JSON}")
        return Simulator("--model", MODEL, *latency, *faults)


# --- The two sides ---------------------------------------------------------------------------------------------------


class Command(NamedTuple):
    """A process to start."""

    words: Sequence[str]
    environment: Mapping[str, str] = {}
    """Beside what this process has."""


@dataclass(frozen=True)
class Side:
    """One of the two libraries."""

    name: str
    preparing: Callable[[Job, Path, str], Iterable[Command]]
    """What comes before judging, in a folder of its own, for an endpoint's address."""
    judging: Callable[[Job, Path, str], Command]
    """The command that judges, and that is given again after a kill."""
    n_complete: Callable[[Path], int]
    """Images in that folder with a valid answer for every concept."""


def _medmicn_preparing(job: Job, place: Path, base_url: str) -> Iterable[Command]:
    chosen = {
        "vlm.base_url": base_url,
        "vlm.model": MODEL,
        "vlm.concurrency": job.in_flight,
        "concepts.file": job.words,
        "source.modality": MODALITY,
    }
    flags = [word for name, value in chosen.items() for word in ("--set", f"{name}={value}")]
    yield _medmicn("ingest", str(job.images), "--run", str(place / "run"), *flags)
    yield _medmicn("concepts", "--run", str(place / "run"))


def _medmicn_judging(_: Job, place: Path, __: str) -> Command:
    return _medmicn("judge", "--run", str(place / "run"))


def _medmicn(*words: str) -> Command:
    return Command([sys.executable, "-m", "flows.cli", *words, "--quiet"])


def _medmicn_n_complete(place: Path) -> int:
    ledger = RunFolder(place / "run").read_judgements().drop_duplicates(["image_id", "concept_id"], keep="last")
    answered = ledger[ledger["state"].isin([str(s) for s in _ANSWERED])]
    return int((answered.groupby("image_id")["concept_id"].nunique() == len(CONCEPTS)).sum())


def _other_preparing(job: Job, place: Path, base_url: str) -> Iterable[Command]:
    """No command: only the job as the script reads it, in the words that medmicn asks in."""
    questions = questions_of(Vocabulary.of(Concept(slug(name), name) for name in CONCEPTS))
    settings = VlmSettings(base_url=base_url, model=MODEL)
    asked = judging_request(b"", questions, Framing(MODALITY), settings.max_output_tokens)
    content = {
        "base_url": base_url,
        "model": MODEL,
        "question": f"{asked.system}\n\n{asked.parts[0]!s}",
        "concept_ids": [q.question_id for q in questions],
        "parameters": {
            "temperature": settings.temperature,
            "seed": settings.seed,
            "max_completion_tokens": asked.max_output_tokens,
        },
        "in_flight": job.in_flight,
        "timeout_s": round(settings.timeout_s),
        "images": [str(path) for path in sorted(job.images.iterdir())],
        "working_dir": str(place / "work"),
    }
    (place / "job.json").write_text(json.dumps(content), encoding="utf-8")
    return ()


def _other_judging(job: Job, place: Path, _: str) -> Command:
    [tokenizers] = job.environment.glob("lib/python*/site-packages/litellm/litellm_core_utils/tokenizers")
    quiet = {
        # Its caches go into the folder of the row: every row starts without any.
        "HOME": str(place),
        "TELEMETRY_ENABLED": "false",
        # What it would otherwise fetch from the internet at every start, from its own packages.
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "TIKTOKEN_CACHE_DIR": str(tokenizers),
        "HF_HUB_OFFLINE": "1",
    }
    return Command(
        [str(_python(job.environment)), str(JOB), str(place / "job.json"), str(place / "result.json")], quiet
    )


def _other_n_complete(place: Path) -> int:
    rows = json.loads((place / "result.json").read_text(encoding="utf-8"))
    ids = [slug(name) for name in CONCEPTS]
    return len({row["image"] for row in rows if all(row.get(concept_id) in _ANSWERED for concept_id in ids)})


SIDES = (
    Side("medmicn", _medmicn_preparing, _medmicn_judging, _medmicn_n_complete),
    Side("bespokelabs-curator", _other_preparing, _other_judging, _other_n_complete),
)


# --- Measuring -------------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """One process."""

    seconds: float
    answering_s: float | None
    """From the first moment with many requests in flight to the last answer, to a tenth of a second."""
    cpu_s: float
    peak_mb: float
    was_killed: bool


@dataclass(frozen=True)
class Row:
    """One judging of all images."""

    prepare_s: float
    last: Measured
    """The process that brought it to its end."""
    n_requests: int
    n_beyond: int
    """Answers billed beyond one an image."""
    n_in_flight: int
    """Of these, answers whose caller had gone."""
    n_tokens: int
    share_complete: float
    kept_mb: float
    """Size of all that it left on the disk."""
    n_at_kill: int | None = None
    """Answers given when the first process was killed."""


def judged(side: Side, job: Job, place: Path, *, is_killed: bool) -> Row:
    """One row: prepared, judged, and where `is_killed` killed half-way and judged again."""
    place.mkdir()
    with job.simulator() as simulator:
        started_s = time.monotonic()
        for command in side.preparing(job, place, simulator.base_url):
            run(command, job, place)
        prepare_s = time.monotonic() - started_s
        command, n_at_kill = side.judging(job, place, simulator.base_url), None
        if is_killed:
            first = run(command, job, place, simulator, kill_after=job.n_images // 2)
            if not first.was_killed:
                sys.exit(f"{side.name} ended before it could be killed; give more --images")
            n_at_kill = simulator.state()["completed_answers"]
        last = run(command, job, place, simulator)
        state = simulator.state()
    return Row(
        prepare_s=prepare_s,
        last=last,
        n_requests=state["chat_requests_received"],
        n_beyond=state["completed_answers"] + state["abandoned_answers"] - job.n_images,
        n_in_flight=state["abandoned_answers"],
        n_tokens=state["prompt_tokens_billed"] + state["completion_tokens_billed"],
        share_complete=side.n_complete(place) / job.n_images,
        kept_mb=sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) / 1e6,
        n_at_kill=n_at_kill,
    )


def run(
    command: Command, job: Job, place: Path, simulator: Simulator | None = None, kill_after: int | None = None
) -> Measured:
    """The process, run to its end, or killed once the endpoint has given `kill_after` answers."""
    log, was_killed = place / "log.txt", False
    with log.open("ab") as stream:
        process, watch = _started(command, job, stream), _Watch()
    limit_s = min(job.ends_at_s, watch.started_s + _PROCESS_LIMIT_S)
    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    try:
        while not pid and not was_killed and time.monotonic() < limit_s:
            if simulator is not None:
                watch.look(simulator.state())
            was_killed = kill_after is not None and watch.n_answers >= kill_after
            if not was_killed:
                time.sleep(_TICK_S)
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    finally:
        if not pid:
            # Its own session: whatever it has started ends with it, and nothing else does.
            os.killpg(process.pid, signal.SIGKILL)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if not was_killed and process.returncode not in _WELL:
        how = "was given up after its time" if not pid else f"ended with {process.returncode}"
        sys.exit(f"{' '.join(command.words)} {how}:\n{_tail(log)}")
    cpu_s, peak_mb = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
    return Measured(time.monotonic() - watch.started_s, watch.answering_s, cpu_s, peak_mb, was_killed)


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-3000:]


def _started(command: Command, job: Job, log: IO[bytes]) -> subprocess.Popen[bytes]:
    # Neither is to compile itself at every start, whatever this machine does usually.
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    compiled = {"PYTHONPYCACHEPREFIX": str(job.environment / "bytecode")}
    # The endpoint is on this machine: a proxy from the environment has no business here.
    direct = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return subprocess.Popen(
        command.words,
        cwd=PROJECT,
        env=usual | compiled | direct | dict(command.environment),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


@dataclass
class _Watch:
    """What the endpoint shows of the process that asks it."""

    started_s: float = field(default_factory=time.monotonic)
    n_answers: int = -1
    _asking_since_s: float | None = None
    _answered_at_s: float = 0.0

    def look(self, state: Mapping[str, int]) -> None:
        now_s = time.monotonic()
        if self._asking_since_s is None and state["concurrency"] > _MORE_THAN_A_TEST:
            self._asking_since_s = now_s
        if state["completed_answers"] != self.n_answers:
            self.n_answers, self._answered_at_s = state["completed_answers"], now_s

    @property
    def answering_s(self) -> float | None:
        return None if self._asking_since_s is None else self._answered_at_s - self._asking_since_s


# --- The table -------------------------------------------------------------------------------------------------------

_COLUMNS = (
    "library",
    "run",
    "prepare s",
    "judging command s",
    "images/s",
    "of the ideal",
    "CPU s",
    "peak MB",
    "left on disk MB",
    "requests",
    "answers beyond one an image",
    "of these in flight at the kill",
    "1000 tokens",
    "of these for the kill",
    "complete",
)


def table(rows: Mapping[tuple[str, bool], Sequence[Row]], job: Job) -> Iterable[str]:
    """Lines of Markdown: for every library the undisturbed rows, then the killed ones."""
    yield _line(_COLUMNS)
    yield "|---|---|" + "---:|" * (len(_COLUMNS) - 2)
    for (name, is_killed), mine in rows.items():
        # Of a command that was started again only the second part is timed, and that has another number of images.
        per_s: list[float] = []
        if not is_killed:
            per_s = [job.n_images / r.last.answering_s for r in mine if r.last.answering_s]
        pairs = zip(mine, rows[name, False], strict=True)
        yield _line(
            (
                name,
                f"killed at {_span((r.n_at_kill for r in mine), '.0f')}, started again" if is_killed else "undisturbed",
                "" if is_killed else _span(r.prepare_s for r in mine),
                _span(r.last.seconds for r in mine),
                _span(per_s),
                _span((n * job.latency_s / job.in_flight for n in per_s), ".2f"),
                _span(r.last.cpu_s for r in mine),
                _span((r.last.peak_mb for r in mine), ".0f"),
                _span((r.kept_mb for r in mine), ".0f"),
                _span((r.n_requests for r in mine), ".0f"),
                _span((r.n_beyond for r in mine), ".0f"),
                _span((r.n_in_flight for r in mine), ".0f"),
                _span((r.n_tokens / 1000 for r in mine), ".0f"),
                _span(((r.n_tokens - u.n_tokens) / 1000 for r, u in pairs), ".0f") if is_killed else "",
                _span((r.share_complete for r in mine), ".3f"),
            )
        )


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _span(values: Iterable[float | None], form: str = ".1f") -> str:
    """Least and most of some numbers; one of them where they look alike, nothing where there is none."""
    known = [v for v in values if v is not None]
    return "–".join(dict.fromkeys(format(v, form) for v in (min(known), max(known)))) if known else ""


# --- The program -----------------------------------------------------------------------------------------------------


def prepare(environment: Path) -> None:
    """Install the other library into an environment of its own, and let both start once: that compiles them."""
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        sys.exit("uv was not found; install it with: python -m pip install uv")
    if environment.resolve().is_relative_to(PROJECT):
        sys.exit(f"--environment {environment}: expected a folder outside this project")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(environment)], check=True, timeout=120)
    install = [uv, "pip", "install", "--quiet", "--python", str(_python(environment)), LIBRARY]
    subprocess.run(install, check=True, timeout=600)
    with tempfile.TemporaryDirectory(prefix="medmicn-other-") as folder:
        job = Job(Path(folder), 4, 4, 0.0, environment, time.monotonic() + _PROCESS_LIMIT_S)
        job.make()
        for side in SIDES:
            judged(side, job, job.folder / side.name, is_killed=False)


def _python(environment: Path) -> Path:
    return environment / "bin" / "python"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--prepare", action="store_true", help="install the other library, start both once, and no more"
    )
    parser.add_argument("--environment", type=Path, default=DEFAULT_ENVIRONMENT, help="where it is installed")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--latency-s", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=360.0, help="give up after so long")
    given = parser.parse_args()
    if given.prepare:
        prepare(given.environment)
        return
    if not _python(given.environment).is_file():
        sys.exit(f"{given.environment} has no Python; run this with --prepare first")
    rows: dict[tuple[str, bool], list[Row]] = {(side.name, k): [] for side in SIDES for k in (False, True)}
    with tempfile.TemporaryDirectory(prefix="medmicn-other-") as folder:
        ends_at_s = time.monotonic() + given.limit_s
        job = Job(Path(folder), given.images, given.in_flight, given.latency_s, given.environment, ends_at_s)
        job.make()
        for n in range(given.rounds):
            for is_killed in (False, True):
                # Alternating, so that neither always comes first.
                for side in SIDES[:: 1 if n % 2 == 0 else -1]:
                    place = Path(folder) / f"{side.name}-{n}-{is_killed}"
                    rows[side.name, is_killed].append(judged(side, job, place, is_killed=is_killed))
                    shutil.rmtree(place)
    print("\n".join(table(rows, job)))


if __name__ == "__main__":
    main()
