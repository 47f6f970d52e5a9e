"""The whole protocol: from a request to what goes out on its wire."""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from .batches import BatchDesk
from .completion import Manner, complete
from .faults import IN_ANSWER, IN_MESSAGE, IN_TEXT, ON_THE_WIRE, FaultPlan, Hit, duration
from .names import CHAT, DEFAULT_MODEL, JsonObject
from .question import Question, Refused, read_question
from .tally import Tally
from .wire import HangUp, HttpRequest, Reply, Wire, reply
from .witness import Witness, chance


class Endpoint:
    """The whole protocol: from a request to what goes out on its wire."""

    def __init__(self, witness: Witness, manner: Manner, plan: Mapping[str, object]) -> None:
        """An endpoint with nothing seen yet; raises `ValueError` for a plan it cannot read."""
        self.tally = Tally()
        self.plan = FaultPlan(plan, manner.seed)
        self._witness = witness
        self._manner = manner
        self._desk = BatchDesk(manner, self._answer_line)
        self._started = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()

    def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a new connection in the background."""
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire = Wire(reader, writer)
        try:
            while (request := await wire.request()) is not None:
                await self._handle(request, wire)
                if request.headers.get("connection", "").lower() == "close":
                    break
        except (HangUp, OSError, EOFError):
            pass  # The caller is gone, or was to be left alone.
        finally:
            writer.close()

    async def _handle(self, request: HttpRequest, wire: Wire) -> None:
        is_chat = (request.method, request.path) == ("POST", CHAT)
        if request.path.startswith("/simulator/"):
            await wire.send(self._control(request))
            return
        self.tally.requests_received += 1
        self.tally.bytes_received += len(request.body)
        request_id = {"x-request-id": f"req_{self.tally.requests_received}"}
        try:
            self._check_key(request)
            if is_chat:
                await self._chat(request, wire, request_id)
                return
            self._turn_away(request.path)
            if await self._misused(request.path, wire, lambda: self._plain(request)):
                return
            response = self._plain(request)
        except Refused as refused:
            response = reply(refused.body, refused.status, refused.headers)
        self.tally.statuses[response.status] += 1
        await wire.send(response._replace(headers={**response.headers, **request_id}))

    async def _chat(self, request: HttpRequest, wire: Wire, request_id: Mapping[str, str]) -> None:
        self.tally.chat_requests_received += 1
        self.tally.concurrency += 1
        self.tally.max_concurrency = max(self.tally.max_concurrency, self.tally.concurrency)
        number = self.tally.chat_requests_received
        try:
            question = read_question(request.body)
            self.tally.asked(question)
            self._turn_away(CHAT, question)
            headers = {**request_id, **(self.plan.limiter.headers() if self.plan.limiter else {})}
            await asyncio.sleep(self._latency_s(number))
            if await self._misused(CHAT, wire, lambda: self._answered(question)):
                return
            response = self._answered(question)
            if wire.is_abandoned:
                self.tally.abandoned_answers += 1
                raise HangUp
            self.tally.statuses[200] += 1
            await wire.send(response._replace(headers=headers))
            self._delivered()
        finally:
            self.tally.concurrency -= 1

    def _delivered(self) -> None:
        self.tally.completed_answers += 1
        self.plan.n_answers += 1
        last = self.plan.option("die_after", "answers")
        if last is not None and self.plan.n_answers >= last:
            os._exit(1)

    def _latency_s(self, number: int) -> float:
        swing = 2 * chance(self._manner.seed, "latency", number) - 1
        return max(0.0, self._manner.latency_s + self._manner.latency_jitter_s * swing)

    def _answered(self, question: Question, *, in_batch: bool = False) -> Reply:
        hits = self._served(self.plan.hits((*IN_ANSWER, *IN_TEXT, *IN_MESSAGE)))
        completion = complete(question, self._witness, self._manner, hits)
        self.tally.billed(question, completion, in_batch=in_batch)
        self.tally.answers_without_truth += (
            bool(self._witness.truth) and question.sight.sha256 not in self._witness.truth
        )
        return reply(completion.body)

    def _answer_line(self, body: Mapping[str, Any], _: str) -> Reply:
        try:
            question = read_question(body)
            self._check_model(question.model)
        except Refused as refused:
            return reply(refused.body, refused.status)
        return self._answered(question, in_batch=True)

    async def _misused(self, path: str, wire: Wire, make: Callable[[], Reply]) -> bool:
        """Serve a fault of the wire, if one hits; then the connection is of no more use."""
        hit = self.plan.first_hit(ON_THE_WIRE, path)
        if hit is None:
            return False
        self._served([hit])
        if hit.name == "html_page":
            page = b"<!DOCTYPE html><html><head><title>Gateway</title></head><body>Please sign in.</body></html>"
            self.tally.statuses[200] += 1
            await wire.send(Reply(200, page, content_type="text/html; charset=utf-8"))
            return True
        if hit.name == "reset" and (hit.options["when"] or ("before" if hit.draw < 0.5 else "middle")) == "before":
            wire.reset()
            raise HangUp
        response = make()
        ways: Mapping[str, Callable[[], Awaitable[None]]] = {
            "reset": lambda: wire.send_part(response),
            "truncated_body": lambda: wire.send_part(response),
            "slow_loris": lambda: wire.dribble(response, hit.options["interval_s"]),
            "huge_body": lambda: wire.send_huge(response, hit.options["megabytes"]),
        }
        await ways[hit.name]()
        if hit.name == "reset":
            wire.reset()
        raise HangUp

    def _turn_away(self, path: str, question: Question | None = None) -> None:
        """Raise `Refused` for a request that is not to be answered."""
        model = DEFAULT_MODEL if question is None else question.model
        hit = self.plan.first_hit(("storm", "insufficient_quota", "unknown_model", "burst_5xx"), path)
        if hit is not None:
            self._served([hit])
            if hit.name == "burst_5xx":
                statuses = hit.options["statuses"]
                status = statuses[int(hit.draw * len(statuses))]
                raise Refused(status, "The server had an error while processing your request.", "server_error")
            if hit.name == "insufficient_quota":
                message = "You exceeded your current quota, please check your plan and billing details."
                raise Refused(429, message, hit.name, hit.name)
            if hit.name == "storm":
                raise self._come_back(f"Rate limit reached for {model}.", "requests", 1.0)
            raise _unknown_model(model)
        if question is not None:
            self._check_model(model)
            self._check_rate(question)

    def _check_rate(self, question: Question) -> None:
        limiter = self.plan.limiter
        held = None if limiter is None else limiter.take(question.n_prompt_tokens + (question.max_tokens or 0))
        if held is not None:
            self.tally.faults_served["rate_limit"] += 1
            name, wait_s = held
            message = f"Rate limit reached for {question.model} on {name} per min. Please try again in"
            raise self._come_back(f"{message} {duration(wait_s)}.", name, wait_s)

    def _come_back(self, message: str, kind: str, wait_s: float) -> Refused:
        """A 429 that says when to come back."""
        fixed_s = self.plan.option("retry_after_s", "seconds")
        wait_s = wait_s if fixed_s is None else fixed_s
        headers = {"retry-after": str(math.ceil(wait_s)), "retry-after-ms": str(math.ceil(wait_s * 1000))}
        headers |= self.plan.limiter.headers() if self.plan.limiter else {}
        return Refused(429, message, kind, "rate_limit_exceeded", headers)

    def _check_model(self, model: str) -> None:
        if self._manner.models and model not in self._manner.models:
            raise _unknown_model(model)

    def _check_key(self, request: HttpRequest) -> None:
        key = self._manner.api_key
        given = request.headers.get("api-key") or request.headers.get("authorization", "").removeprefix("Bearer ")
        if key is not None and given != key:
            message = "Incorrect API key provided." if given else "You didn't provide an API key."
            raise Refused(401, message, "invalid_request_error", "invalid_api_key")

    def _served(self, hits: list[Hit]) -> list[Hit]:
        self.tally.faults_served.update(hit.name for hit in hits)
        return hits

    def _plain(self, request: HttpRequest) -> Reply:
        """The answer to anything but a chat request; raises `Refused`."""
        response = None
        match request.path.removeprefix("/v1/").split("/"):
            case ["models"] if request.method == "GET":
                names = self._manner.models or (DEFAULT_MODEL,)
                models = [{"id": n, "object": "model", "created": 0, "owned_by": "simulated"} for n in names]
                response = reply({"object": "list", "data": models})
            case ["files", *rest]:
                response = self._files(request, rest)
            case ["batches", *rest]:
                response = self._batches(request, rest)
        if response is None:
            message = f"Invalid URL ({request.method} {request.path})"
            raise Refused(404, message, "invalid_request_error", "unknown_url")
        return response

    def _files(self, request: HttpRequest, rest: Sequence[str]) -> Reply | None:
        desk = self._desk
        match request.method, *rest:
            case ["POST"]:
                return reply(desk.upload(request).as_json())
            case "GET", file_id:
                return reply(desk.file(file_id).as_json())
            case "GET", file_id, "content":
                return Reply(200, desk.file(file_id).data, content_type="application/octet-stream")
            case "DELETE", file_id:
                del desk.files[desk.file(file_id).file_id]
                return reply({"id": file_id, "object": "file", "deleted": True})
        return None

    def _batches(self, request: HttpRequest, rest: Sequence[str]) -> Reply | None:
        desk = self._desk
        match request.method, *rest:
            case ["POST"]:
                failed, expired = (self.plan.hit(name, request.path) for name in ("batch_failed", "batch_expired"))
                self._served([hit for hit in (failed, expired) if hit is not None])
                return reply(desk.create(_json_body(request), failed, expired).as_json())
            case ["GET"]:
                limit = request.query.get("limit", "20")
                return reply(desk.page(int(limit) if limit.isdecimal() else 20, request.query.get("after")))
            case "GET", batch_id:
                return reply(desk.batch(batch_id).as_json())
            case "POST", batch_id, "cancel":
                return reply(desk.cancel(batch_id).as_json())
        return None

    def _control(self, request: HttpRequest) -> Reply:
        """The simulator's own paths."""
        match request.method, request.path:
            case "GET", "/simulator/state":
                return reply({"uptime_s": round(time.monotonic() - self._started, 3), **self.tally.as_json()})
            case "POST", "/simulator/faults":
                try:
                    plan = _json_body(request)
                    self.plan = FaultPlan(plan, self._manner.seed)
                except (ValueError, TypeError, Refused) as error:
                    return reply({"error": {"message": str(error)}}, 400)
                return reply({"faults": plan})
        return reply({"error": {"message": "Expected GET /simulator/state or POST /simulator/faults."}}, 404)


def _unknown_model(model: str) -> Refused:
    message = f"The model `{model}` does not exist or you do not have access to it."
    return Refused(404, message, "invalid_request_error", "model_not_found")


def _json_body(request: HttpRequest) -> JsonObject:
    try:
        content = json.loads(request.body)
    except ValueError as error:
        raise Refused(400, "The body is no JSON.", "invalid_request_error") from error
    if not isinstance(content, dict):
        raise Refused(400, "The body is no JSON object.", "invalid_request_error")
    return content
