"""A simulated vision-language endpoint: real HTTP in a process of its own, with known errors and faults on demand.

    python benchmarks/simulated_endpoint --latency-s 1.0 --latency-jitter-s 0.2 --truth truth.json --fault reset=0.1

Prints its address on one line when it is ready, listens on 127.0.0.1 only, and ends by itself. From Python:

    with Simulator("--latency-s", "1.0") as simulator:
        ...simulator.base_url, simulator.state(), simulator.set_faults({"reset": 0.2})

It speaks OpenAI's protocol: models, chat completions, files and batches (also under Azure's deployment paths). It
imports nothing of the product, and reads what is asked from the JSON schema of a request, not from its words. The
last image of a request is the one in question. Answers depend on `--seed`, the image and the concept alone, so asking
again gives the same answer; with `--wavering-share` some depend on the request's own `seed` when its temperature is
above 0.

Truth. `--truth FILE` is a JSON object {sha256 of the image bytes as sent: {concept_id: true or false}}; its key
"noise" may hold {concept_id: {"sensitivity": .., "specificity": ..}}. What it does not tell, and everything without a
file, is a pseudo-truth: a hash of image and concept, which is the same for every seed, so that two simulators are two
witnesses of one world. For a choice, the true value is right with its own sensitivity.
Questions whose id begins with `probe-` are answered from the pixels: colour and number of plain discs.

Faults. `--fault NAME=VALUE` (several times) and `POST /simulator/faults` with {NAME: VALUE, ...}, which replaces the
whole plan and starts its clock and counters anew. VALUE is a number or an object of these, all optional:

    share            0 to 1, which part of the requests is hit (default 1); a plain number means this
    first            only so many requests are hit, then no more
    from_s, for_s    a window of time, counted from the moment the plan was set
    on               path prefix of the requests that can be hit (default /v1/chat/completions)

Which requests are hit depends on `--seed` and on how many requests the fault has looked at, on nothing else.

    rate_limit            buckets of {"requests_per_minute", "tokens_per_minute", "burst_s": 60}: 429, Retry-After and
                          x-ratelimit headers; a plain number means requests_per_minute
    retry_after_s         the Retry-After of every 429, whatever the buckets say (a number of seconds)
    storm                 429 on every path for so many seconds (the plain number)
    burst_5xx             {"statuses": [500, 502, 503]}: either by hash
    insufficient_quota    429 with that code and no Retry-After
    unknown_model         404 as for a model that does not exist
    reset                 connection reset; {"when": "before" or "middle"}, else either by hash
    truncated_body        the connection closes in the middle of the promised body
    slow_loris            one byte each {"interval_s": 0.2}, for ever
    html_page             200 with a proxy's page
    huge_body             {"megabytes": 40}
    missing_concepts, extra_concepts, wrong_types, nan_probability       in the answer
    duplicate_keys, truncated_json, fenced_json, prose                   in its text
    refusal, empty_content (null or ""), cut_off (finish_reason length)  in the message
    die_after             the process ends hard after so many delivered answers (the plain number)
    batch_failed, batch_expired ({"done_share": 0.5})                    on /v1/batches, looked at when one is created

Faults of answer, text and message combine, and apply to the lines of a batch too; of the others the first one that
hits is served. rate_limit, retry_after_s and die_after hold for every request, without share or window.
`GET /simulator/state` counts what happened (see `Tally`).
"""

from __future__ import annotations

from .faults import FAULTS, FaultPlan, RateLimiter
from .names import DEFAULT_MODEL
from .process import Simulator
from .program import read_truth
from .question import read_question
from .witness import Noise, Sight, Witness, answer, chance, discs, said_of_concept

__all__ = [
    "DEFAULT_MODEL",
    "FAULTS",
    "FaultPlan",
    "Noise",
    "RateLimiter",
    "Sight",
    "Simulator",
    "Witness",
    "answer",
    "chance",
    "discs",
    "read_question",
    "read_truth",
    "said_of_concept",
]
