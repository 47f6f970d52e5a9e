"""The judging job of `other_library.py` as one would write it with bespokelabs-curator.

    python benchmarks/other_library_job.py JOB.json RESULT.json

It runs in an environment of its own, where that library is installed and this project is not. Giving the same command
again resumes: the library keeps its requests and responses in `working_dir`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

from bespokelabs import curator  # pyrefly: ignore[missing-import]
from pydantic import BaseModel, create_model

NO_LIMIT_PER_MINUTE = 10**9
"""The library always paces itself; this never holds anything back, as medmicn does by default."""
NO_KEY = "no-key-needed"


class Verdict(BaseModel):
    """What is said of one concept."""

    state: Literal["present", "absent", "uncertain"]
    probability: float
    evidence: str


class Judge(curator.LLM):
    """Asks one question about every image."""

    def prompt(self, row: dict[str, Any]) -> Any:
        """The question and its image, which the library reads and encodes when it is sent."""
        return row["question"], curator.types.Image(url=row["image"])

    def parse(self, row: dict[str, Any], response: BaseModel) -> dict[str, Any]:
        """The state of every concept; the library has validated the answer."""
        return {"image": row["image"], **{name: verdict.state for name, verdict in response}}


def judge_for(job: dict[str, Any]) -> Judge:
    """The library's object, with no limit but the number of requests in flight."""
    fields: dict[str, Any] = dict.fromkeys(job["concept_ids"], (Verdict, ...))
    return Judge(
        model_name=job["model"],
        response_format=create_model("Judgements", **fields),
        backend="openai",
        generation_params=job["parameters"],
        backend_params={
            "base_url": job["base_url"],
            "api_key": NO_KEY,
            "max_concurrent_requests": job["in_flight"],
            "max_requests_per_minute": NO_LIMIT_PER_MINUTE,
            "max_tokens_per_minute": NO_LIMIT_PER_MINUTE,
            "request_timeout": job["timeout_s"],
            # What is missing in the end is counted; by default the library would give nothing at all.
            "require_all_responses": False,
        },
    )


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    rows = [{"image": image, "question": job["question"]} for image in job["images"]]
    answered = judge_for(job)(rows, working_dir=job["working_dir"])
    Path(sys.argv[2]).write_text(json.dumps(list(answered.dataset)), encoding="utf-8")


if __name__ == "__main__":
    main()
