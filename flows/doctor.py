"""What works on this machine, and at the endpoints that are configured: checks with a finding and a remedy each."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

import httpx2

from annotation.vlm.budget import Budget
from annotation.vlm.client import VlmClient
from annotation.vlm.journal import Journal
from annotation.vlm.preflight import is_listed, price_of, require_key, require_model, require_price
from annotation.vlm.probe import Capabilities, n_requests, probe
from annotation.vlm.settings import is_loopback
from annotation.vlm.tokens import family_of, image_tokens
from annotation.vlm.transports import transport_for
from data_contracts.embedded_weights import lite0_weights_path, minilm_folder
from data_contracts.errors import ConfigurationError, EndpointError, InputRefused, MedMicnError
from data_contracts.manifest import installed_versions
from data_contracts.store import RunFolder
from flows.chain import Context
from flows.console import Console
from flows.settings import EndpointSettings, Settings, api_key, prefect_api_url, proxy_for
from flows.vlm import endpoint_name, stored_capabilities

T = TypeVar("T")

_ENOUGH_DISK_GB = 2.0
_PATIENCE_S = 10.0
"""How long a list of models is waited for."""
_PROBE_PATIENCE_S = 60.0
"""How long the test questions wait for an endpoint that asks for patience."""
_PROBE_REMEDY = "`medmicn doctor --probe` sends it a few drawn pictures."


class Check(NamedTuple):
    """One finding."""

    name: str
    works: bool
    finding: str
    remedy: str = ""
    needed: bool = True
    """Whether anything configured needs it; optional parts never make `doctor` fail."""
    endpoint: str = ""
    """The endpoint it is about; empty: this machine."""


def examine(settings: Settings, runs: list[RunFolder], console: Console, *, probing: bool = False) -> Iterator[Check]:
    """Every check as it is made, in the order in which people should mend them; see `examine_endpoints`."""
    yield from _ground()
    yield from _weights()
    yield from _optional(settings)
    yield from examine_endpoints(settings, runs, console, probing=probing)


def examine_endpoints(
    settings: Settings, runs: list[RunFolder], console: Console, *, probing: bool = False
) -> Iterator[Check]:
    """The checks of every vision-language endpoint as they are made.

    Args:
        settings: what is configured.
        runs: run folders that may know an earlier probe, the newest first.
        console: where it is said that something takes a while.
        probing: whether test questions are sent now.
    """
    budget = Budget(max_requests=settings.vlm.max_requests, max_cost_usd=settings.vlm.max_cost_usd)
    for endpoint in settings.vlm.endpoints:
        for check in _Endpoint(endpoint, settings, runs, budget, console).examined(probing=probing):
            yield check._replace(endpoint=endpoint_name(endpoint))


def _ground() -> Iterator[Check]:
    version = sys.version.split()[0]
    yield Check("python", sys.version_info >= (3, 11), version, "medmicn needs Python 3.11 or newer.")
    missing = [name for name, found in installed_versions().items() if found == "not installed"]
    shown = ", ".join(missing) if missing else "all installed"
    yield Check("packages", not missing, shown, "pip install medmicn")
    free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    yield Check("disk", free_gb > _ENOUGH_DISK_GB, f"{free_gb:.0f} GB free here", "Free some space, or use --run DIR.")


def _weights() -> Iterator[Check]:
    yield _tried("embedded backbone", lambda: lite0_weights_path().name)
    yield _tried("embedded text model", lambda: minilm_folder().parent.name)


def _optional(settings: Settings) -> Iterator[Check]:
    import torch

    gpu = torch.cuda.is_available()
    shown = torch.cuda.get_device_name() if gpu else "none; a CPU is enough with a frozen backbone"
    yield Check("GPU", gpu, shown, needed=False)
    yield _prefect_server(settings)
    plugins = importlib.util.find_spec("pylibjpeg") is not None
    yield Check(
        "compressed DICOM",
        plugins,
        "pylibjpeg" if plugins else "uncompressed only",
        "pip install medmicn[dicom]",
        needed=False,
    )
    runner = settings.flow.task_runner
    if runner != "threads":
        module = f"prefect_{runner}"
        there = importlib.util.find_spec(module) is not None
        yield Check(f"{runner} runner", there, module, f"pip install medmicn[{runner}]")
    if settings.privacy.offline:
        yield Check("offline", True, "other machines are refused, whoever asks for them")


def _prefect_server(settings: Settings) -> Check:
    server = prefect_api_url()
    if server and settings.privacy.offline and not is_loopback(urlsplit(server).hostname or ""):
        finding = f"{server} is another machine, which privacy.offline forbids"
        return Check("Prefect server", False, finding, "unset PREFECT_API_URL, or use a server on this machine.")
    return Check(
        "Prefect server",
        bool(server),
        server or "none configured; `run` starts a temporary one",
        "For `schedule`: prefect server start, then export PREFECT_API_URL=http://127.0.0.1:4200/api",
        needed=False,
    )


class _Endpoint:
    """One endpoint under examination."""

    def __init__(
        self, endpoint: EndpointSettings, settings: Settings, runs: list[RunFolder], budget: Budget, console: Console
    ) -> None:
        self.endpoint = endpoint
        self.settings = settings
        self.price = price_of(endpoint)
        self.budget = budget
        self.console = console
        self.known_from, self.known = self._known(runs)

    def examined(self, *, probing: bool) -> Iterator[Check]:
        """Its checks; where one fails that is needed, those that would only fail because of it are left out."""
        if self.endpoint.is_embedded:
            yield Check("model", True, "built in: image measurements, no key and no network")
            return
        works = True
        for check in self._without_asking() if self.endpoint.is_remote else self._without_loading():
            works = works and (check.works or not check.needed)
            yield check
        if self.endpoint.is_remote and works:
            address = _tried("address", lambda: self._asked(_listed))
            works = address.works
            yield address
        if not probing:
            yield self._last_probe()
        elif works:
            yield self._probed_now()

    def _without_asking(self) -> Iterator[Check]:
        yield self._key()
        yield self._price()
        yield self._image_tokens()

    def _without_loading(self) -> Iterator[Check]:
        yield self._files()

    def _key(self) -> Check:
        variable, has_key = self.endpoint.api_key_env, api_key(self.endpoint) is not None

        def found() -> str:
            require_key(self.endpoint, has_key=has_key, key_variable=variable)
            sent = f"{variable} is set and goes to {self.endpoint.host}"
            return sent if has_key else f"{variable} is not set; nothing says that {self.endpoint.host} wants a key"

        return _tried("key", found)

    def _price(self) -> Check:
        price = self.price
        if price is None:
            return self._without_price()
        rates = f"{price.input_usd_per_token * 1e6:g} USD in, {price.output_usd_per_token * 1e6:g} USD out"
        return Check("price", True, f"{rates} for a million tokens ({price.source})")

    def _without_price(self) -> Check:
        capped = self.endpoint.model_copy(update={"max_cost_usd": self.settings.vlm.max_cost_usd})
        try:
            require_price(capped, None)
        except ConfigurationError as error:
            return Check("price", False, error.message, error.remedy or "")
        return Check(
            "price",
            False,
            "unknown: no list has this model at this address",
            "Set vlm.input_usd_per_million_tokens and vlm.output_usd_per_million_tokens (0 for a server of your own).",
            needed=False,
        )

    def _image_tokens(self) -> Check:
        side_px, model = self.endpoint.side_px, self.endpoint.model
        family, of_size = family_of(model), f"for an image of {side_px} × {side_px} px"
        if self.known is not None and self.known.tokens_per_image is not None:
            return Check("image tokens", True, f"{self.known.tokens_per_image} {of_size}, as the last probe counted")
        n_tokens = image_tokens(model, side_px, side_px)
        if family is not None:
            return Check("image tokens", True, f"{n_tokens} {of_size}, as published for {family}")
        finding = f"{n_tokens} {of_size}: a high guess, as no published rule names this model; a probe counts them"
        return Check("image tokens", False, finding, needed=False)

    def _files(self) -> Check:
        model = self.endpoint.model
        if Path(model).is_dir():
            there = (Path(model) / "config.json").is_file()
            finding = f"{model} is a folder " + ("with a config.json" if there else "without config.json")
            return Check("model", there, finding, "Point vlm.model to the folder that holds config.json and weights.")
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            is_cached = isinstance(try_to_load_from_cache(model, "config.json"), str)
        except HFValidationError:
            remedy = "Correct vlm.model: a hub name (ORG/NAME) or a folder."
            return Check("model", False, f"{model} is no folder, and no name of the hub", remedy)
        if is_cached:
            return Check("model", True, "in the hub's cache on this machine")
        if self.settings.privacy.offline:
            remedy = "Download it once with a network, and point vlm.model to the folder."
            return Check("model", False, "not on this machine, and privacy.offline forbids to fetch it", remedy)
        return Check("model", False, "not on this machine yet; the first use downloads it", needed=False)

    def _last_probe(self) -> Check:
        if self.known is None:
            return Check("last probe", False, "none is known here", _PROBE_REMEDY, needed=False)
        when = f"{self.known.probed_at[:16].replace('T', ' ')} UTC, {self.known_from}"
        return Check("last probe", True, "\n".join([when, *self.known.lines()]))

    def _probed_now(self) -> Check:
        self.console.say(f"  asking {n_requests(self.endpoint)} test questions about drawn pictures …")
        before = self.budget.spent

        def found() -> str:
            lines = self._asked(_capabilities)
            spent = self.budget.spent
            cost = "price unknown" if self.price is None else f"{spent.usd - before.usd:.6f} USD"
            return "\n".join([*lines, f"it took {spent.n_requests - before.n_requests} requests, {cost}"])

        return _tried("probe now", found)

    def _asked(self, ask: Callable[[VlmClient, _Heard], Awaitable[T]]) -> T:
        """What `ask` brings back through a client like that of a run, with a journal that nobody keeps."""

        async def answer(journal: Journal) -> T:
            offline, proxy = self.settings.privacy.offline, proxy_for(self.endpoint)
            heard = _Heard(transport_for(self.endpoint, proxy=proxy, offline=offline))
            quick = {
                "max_retries": min(self.endpoint.max_retries, 1),
                "max_wait_s": min(self.endpoint.max_wait_s, _PROBE_PATIENCE_S),
            }
            client = VlmClient(
                self.endpoint.model_copy(update=quick),
                api_key(self.endpoint),
                journal,
                budget=self.budget,
                price=self.price,
                transport=heard,
            )
            async with client:
                return await ask(client, heard)

        with TemporaryDirectory(prefix="medmicn-doctor-") as folder, Journal(Path(folder)) as journal:
            return asyncio.run(answer(journal))

    def _known(self, runs: list[RunFolder]) -> tuple[str, Capabilities | None]:
        """The newest run that probed this endpoint, and what it found."""
        for run in runs:
            try:
                found = stored_capabilities(Context(run, self.settings, self.console), self.endpoint)
            except InputRefused:
                # A run of another version tells nothing here.
                continue
            if found is not None:
                return str(run.path), found
        return "", None


class _Heard(httpx2.AsyncBaseTransport):
    """A transport that remembers the last HTTP status: a client's user cannot tell silence from an error page."""

    def __init__(self, inner: httpx2.AsyncBaseTransport) -> None:
        self._inner = inner
        self.status: int | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await self._inner.handle_async_request(request)
        self.status = response.status_code
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


async def _listed(client: VlmClient, heard: _Heard) -> str:
    """What the endpoint says about its models; raises what a run would raise."""
    try:
        names = await asyncio.wait_for(client.model_names(), _PATIENCE_S)
    except TimeoutError:
        names = None
        heard.status = None
    if heard.status is None:
        raise EndpointError(f"no answer within {_PATIENCE_S:g} s", remedy="Start it, or correct vlm.base_url.")
    if heard.status >= 500:
        raise EndpointError(f"answers with HTTP {heard.status}", remedy="Look into the endpoint's own log.")
    if client.settings.azure_api_version is not None:
        return "answers; an Azure deployment lists no models"
    if not names:
        return "answers, but lists no models (the address of one that does usually ends in /v1)"
    if not is_listed(client.settings.model, names):
        await require_model(client)
    return f"answers, and lists the model ({len(names)} in all)"


async def _capabilities(client: VlmClient, _: _Heard) -> list[str]:
    return (await probe(client)).lines()


def _tried(name: str, find: Callable[[], str]) -> Check:
    try:
        return Check(name, True, find())
    except MedMicnError as error:
        return Check(name, False, error.message, error.remedy or "")
    except (RuntimeError, OSError) as error:
        return Check(name, False, str(error), "Check the address, the key and the model's name.")
