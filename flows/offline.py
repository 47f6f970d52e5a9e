"""Offline: in this process every connection to another machine is refused, whoever asks for it.

An audit hook hears of every socket of Python before anything is sent, be it this project's, Prefect's or a download
of some library. It cannot be removed again. Two things it cannot hear of, and what is done about them:

- A socket looks names up by itself before the hook is told, which would already tell a name server. So the methods of
  `socket.socket` that take an address are checked before.
- Compiled code may open sockets of its own, and programs that are started have their own process. The environment
  tells those that are known (Hugging Face's, Prefect's, Ray's) to keep to themselves, and names no proxy any more.
"""

from __future__ import annotations

import errno
import functools
import ipaddress
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

from annotation.vlm.settings import is_loopback
from data_contracts.errors import ConfigurationError
from flows import console as consoles
from flows.settings import Settings

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A proxy on this machine would be allowed, and lead away from it.
    "NO_PROXY": "*",
    "no_proxy": "*",
}
_PROXIES = {"http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "ws_proxy", "wss_proxy"}

_ADDRESS_AT = {"connect": 0, "connect_ex": 0, "bind": 0, "sendto": -1, "sendmsg": 3}
"""Methods of a socket that take an address, and where."""


class OtherMachineRefused(ConfigurationError, OSError):
    """A connection to another machine was asked for while `privacy.offline` holds; nothing was sent.

    An `OSError`, because libraries know what to do with a connection that fails: they tidy up, and go without what was
    not needed, such as a look for a newer version. A `ConfigurationError`, for the person who reads it when nobody
    else wanted it. Since libraries may also keep quiet about it, the first refusal of each address is said at once.
    """

    def __init__(self, what: str) -> None:
        super().__init__(
            f"privacy.offline: {what} was refused; nothing was sent.",
            remedy="Have what is needed on this machine, or leave --offline (privacy.offline) out.",
        )
        self.errno = errno.ENETUNREACH
        self.strerror = self.message


class _Guard:
    """Whether other machines are forbidden, and what was refused."""

    def __init__(self) -> None:
        self.is_on = False
        self.is_installed = False
        self.refused: list[str] = []

    def refuse(self, what: str) -> None:
        if what not in self.refused:
            self.refused.append(what)
            consoles.shared().warn(f"privacy.offline: {what} was refused; nothing was sent")
        raise OtherMachineRefused(what)


GUARD = _Guard()
"""The guard of this process. Tests may switch it off; nothing else does."""


def enforce(settings: Settings) -> Settings:
    """The settings themselves, once other machines are forbidden where they say so."""
    if settings.privacy.offline:
        forbid_other_machines()
    return settings


def forbid_other_machines() -> None:
    """Refuse every connection to another machine from now on, in this process and as far as it goes in its children.

    What is refused raises `OtherMachineRefused`. Loopback addresses, `localhost` and Unix sockets stay open. Calling
    it again changes nothing. Connections that are open already stay so: call it before anything is asked.
    """
    _tell_libraries()
    GUARD.is_on = True
    if GUARD.is_installed:
        return
    GUARD.is_installed = True
    for name, position in _ADDRESS_AT.items():
        _check_before(name, position)
    sys.addaudithook(_hear)


def _tell_libraries() -> None:
    for name in [name for name in os.environ if name.lower() in _PROXIES]:
        del os.environ[name]
    os.environ.update(_ENVIRONMENT)
    hub = sys.modules.get("huggingface_hub.constants")
    if hub is not None:
        # It was imported before, and has read its environment.
        vars(hub)["HF_HUB_OFFLINE"] = True


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    """The audit hook: hears of everything the interpreter does, so it must be quick for all but sockets."""
    check = _CHECKS.get(event)
    if check is not None and GUARD.is_on:
        check(*arguments)


def _check_before(name: str, position: int) -> None:
    inner = getattr(socket.socket, name)

    @functools.wraps(inner)
    def checked(self: socket.socket, *arguments: Any) -> Any:
        if GUARD.is_on and -len(arguments) <= position < len(arguments):
            address = arguments[position]
            if name != "bind":
                _check_address(self, address)
            elif _is_internet(self) and not _is_number(address[0]):
                # To listen is no connection, but to look up where is one to a name server.
                _check_name(address[0])
        return inner(self, *arguments)

    setattr(socket.socket, name, checked)


def _check_address(sock: socket.socket, address: Any) -> None:
    if address is None or sock.family == getattr(socket, "AF_UNIX", None):
        # Without an address it goes where the socket is connected to, and that was checked.
        return
    if not _is_internet(sock) or not isinstance(address, tuple):
        GUARD.refuse(f"a connection to {address!r} ({sock.family!r})")
    if not _is_here(address[0]):
        GUARD.refuse(f"a connection to {_shown(address[0])}, port {address[1]}")


def _check_name(name: Any, *_: Any) -> None:
    if not _is_here(name):
        GUARD.refuse(f"a look-up of {_shown(name)}")


def _check_name_of(address: Any) -> None:
    _check_name(address[0])


def _is_here(host: Any) -> bool:
    """Whether a host is this machine: no name at all, a loopback address, or "any address" of its own."""
    name = _shown(host)
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return not name or is_loopback(name.lower())
    inner = getattr(address, "ipv4_mapped", None) or address
    return inner.is_loopback or inner.is_unspecified


def _shown(host: Any) -> str:
    """A host as text; sockets take bytes as well, and nothing for every address of this machine."""
    return host.decode("ascii", "replace") if isinstance(host, bytes | bytearray) else str(host or "")


def _is_internet(sock: socket.socket) -> bool:
    return sock.family in (socket.AF_INET, socket.AF_INET6)


def _is_number(host: Any) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return not host
    return True


_CHECKS: dict[str, Callable[..., None]] = {
    "socket.connect": _check_address,
    "socket.sendto": _check_address,
    "socket.sendmsg": _check_address,
    "socket.getaddrinfo": _check_name,
    "socket.gethostbyname": _check_name,
    "socket.gethostbyaddr": _check_name,
    "socket.getnameinfo": _check_name_of,
}
