"""A TCP proxy on the loopback whose link can be slow, hang, refuse, break at an exact byte, or flip one.

with FaultProxy(6379) as proxy:      # clients connect to proxy.port
    proxy.latency = 0.2              # seconds added to every piece, each way
    proxy.rate = 50_000              # bytes per second, each way
    proxy.hanging = True             # take data and pass nothing on
    proxy.refuse()                   # reset every connection, and every new one
    proxy.cut()                      # reset every connection once
    proxy.cut_after(9000, upload=True)                # reset the first connection that sends more at a stretch
    proxy.corrupt_after(1500, upload=False)           # change one byte of the first answer that is longer
    proxy.when(b"COMMIT", action, forwarded=True)     # once, when a client has sent this
    proxy.heal()
"""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

_PIECE = 16384


@dataclass
class _Trap:
    """Something that happens once, to the first connection it fits."""

    upload: bool
    after: int = 0
    pattern: bytes = b""
    action: Callable[[], None] | None = None
    forwarded: bool = False
    kind: str = ""
    sprung: threading.Event = field(default_factory=threading.Event)


@dataclass(eq=False)
class _Link:
    client: socket.socket
    server: socket.socket
    stretch: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    """Bytes that went one way since something went the other way."""

    def reset(self) -> None:
        for end in (self.client, self.server):
            _reset(end)


class FaultProxy:
    """Stands between clients and a server on the loopback; use it as a context manager."""

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._listener.getsockname()[1]
        self._links: set[_Link] = set()
        self._lock = threading.Lock()
        self.heal()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._refusing = True
        self._listener.close()
        self.cut()

    def heal(self) -> None:
        """Pass everything on from now on."""
        self.latency, self.rate, self.hanging, self._refusing = 0.0, None, False, False
        self._traps: list[_Trap] = []

    def refuse(self) -> None:
        """Reset every connection, and every new one until healed."""
        self._refusing = True
        self.cut()

    def accept(self) -> None:
        """Take connections again."""
        self._refusing = False

    def cut(self) -> None:
        """Reset every connection."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.reset()

    def cut_after(self, count: int, *, upload: bool) -> threading.Event:
        """Reset the first connection that sends more than ``count`` bytes at a stretch; returns what tells of it."""
        return self._set(_Trap(upload, after=count, kind="cut"))

    def corrupt_after(self, count: int, *, upload: bool) -> threading.Event:
        """Change the byte after ``count`` of the first longer stretch; returns what tells of it."""
        return self._set(_Trap(upload, after=count, kind="corrupt"))

    def when(self, pattern: bytes, action: Callable[[], None], *, forwarded: bool) -> threading.Event:
        """Act once when a client sends ``pattern``, after or instead of passing it on, and reset the connection."""
        return self._set(_Trap(upload=True, pattern=pattern, action=action, forwarded=forwarded, kind="pattern"))

    def _set(self, trap: _Trap) -> threading.Event:
        self._traps.append(trap)
        return trap.sprung

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._refusing:
                _reset(client)
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._upstream), timeout=5)
            except OSError:
                _reset(client)
                continue
            server.settimeout(None)
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link = _Link(client, server)
            with self._lock:
                self._links.add(link)
            for upload in (True, False):
                threading.Thread(target=self._pump, args=(link, upload), name="proxy-link", daemon=True).start()

    def _pump(self, link: _Link, upload: bool) -> None:
        source, target = (link.client, link.server) if upload else (link.server, link.client)
        try:
            while piece := source.recv(_PIECE):
                while self.hanging:
                    time.sleep(0.02)
                time.sleep(self.latency + (len(piece) / self.rate if self.rate else 0.0))
                link.stretch[not upload] = 0
                link.stretch[upload] += len(piece)
                self._pass_on(link, upload, piece, target)
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_WR)
        except OSError:
            link.reset()
        if upload:
            return
        with self._lock:
            self._links.discard(link)
        link.reset()

    def _pass_on(self, link: _Link, upload: bool, piece: bytes, target: socket.socket) -> None:
        trap = self._sprung_by(link, upload, piece)
        if trap is None:
            target.sendall(piece)
            return
        if trap.kind == "corrupt":
            at = len(piece) - (link.stretch[upload] - trap.after)
            target.sendall(piece[:at] + bytes([piece[at] ^ 0x55]) + piece[at + 1 :])
        elif trap.kind == "cut":
            target.sendall(piece[: max(0, len(piece) - (link.stretch[upload] - trap.after))])
            time.sleep(0.05)  # so that what came before is seen
            link.reset()
        else:
            if trap.forwarded:
                target.sendall(piece)
                time.sleep(0.05)
            assert trap.action is not None
            trap.action()
            link.reset()
        trap.sprung.set()

    def _sprung_by(self, link: _Link, upload: bool, piece: bytes) -> _Trap | None:
        with self._lock:
            for trap in self._traps:
                long_enough = trap.after < link.stretch[upload] and (
                    trap.kind != "corrupt" or self._in(trap, link, piece)
                )
                if trap.upload == upload and long_enough and trap.pattern in piece:
                    self._traps.remove(trap)
                    return trap
        return None

    def _in(self, trap: _Trap, link: _Link, piece: bytes) -> bool:
        """Whether the byte to change is in this piece, not in one that has gone through already."""
        return link.stretch[trap.upload] - len(piece) <= trap.after


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
