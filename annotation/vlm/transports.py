"""How each kind of endpoint is reached: through a network, or in this process by the same protocol."""

from __future__ import annotations

import sys

import httpx2

from annotation.vlm.settings import VlmSettings


def transport_for(
    settings: VlmSettings, *, proxy: str | None = None, offline: bool = False
) -> httpx2.AsyncBaseTransport:
    """The transport for this endpoint.

    Args:
        settings: which endpoint.
        proxy: address of the proxy that a network asks for.
        offline: whether a model in this process may only be read from files that are here.

    Raises:
        ConfigurationError: a model in this process cannot be loaded.
    """
    if settings.is_embedded:
        from annotation.vlm.embedded import create_app  # noqa: PLC0415  (scikit-image is slow to import)

        return httpx2.ASGITransport(create_app())
    if settings.is_in_process:
        from annotation.vlm.local import create_app as create_local_app  # noqa: PLC0415  (so is transformers)

        app = create_local_app(
            settings.model, device=settings.device, batch_size=settings.local_batch_size, offline=offline
        )
        return httpx2.ASGITransport(app)
    n_connections = settings.concurrency + 4
    limits = httpx2.Limits(max_connections=n_connections, max_keepalive_connections=n_connections)
    return httpx2.AsyncHTTPTransport(limits=limits, proxy=proxy)


def release_models() -> None:
    """Let go of models that were loaded into this process, so that others may use the memory."""
    local = sys.modules.get("annotation.vlm.local")
    if local is not None:
        local.release()
