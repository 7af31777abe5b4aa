"""How messages travel between processes: pyzmq, ipc:// on one host and tcp:// across; never pickle.

A message is a msgpack header, typed by workers.messages, and one raw frame for each tensor in it. The orchestrator has
the `Hub`; every thread of a worker that talks has a `Line` of its own, since zmq's sockets belong to one thread.

The secret keeps strangers and strays of other runs out; it is no encryption. On one host the sockets have no files that
a killed run could leave behind (Linux's abstract names), and take connections of the same user alone; over tcp the
network must be one's own, as torch.distributed's must.
"""

from __future__ import annotations

import hmac
import math
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from workers.messages import PROTOCOL_VERSION, Hello, Message, Ping

TENSOR = 1
"""The msgpack extension that stands for a frame."""
LINGER_MS = 2000
SEND_MS = 1000
PING_SECONDS = 0.5


class ChannelError(RuntimeError):
    """The other end is not there, or is not what it should be."""


# ---- Tensors as frames. ----


class RawTensor:
    """A tensor that this process passes on without looking into it; `data` has the buffer protocol.

    No dataclass: msgspec would take it apart instead of asking what to do with it.
    """

    __slots__ = ("data", "dtype", "shape")

    def __init__(self, dtype: str, shape: list[int], data: Any):
        self.dtype, self.shape, self.data = dtype, shape, data


class _TensorHead(msgspec.Struct, array_like=True):
    """Stands for a tensor in a header: the number of its frame, and how to read it."""

    frame: int
    dtype: str
    shape: list[int]


def to_frames(message: Message, to_raw: Callable[[Any], RawTensor] | None = None) -> list[Any]:
    """The frames of a message; `to_raw` tells how this process's own tensors become raw ones."""
    frames: list[Any] = [b""]

    def replace(item: Any) -> msgspec.msgpack.Ext:
        raw = item if isinstance(item, RawTensor) else to_raw(item) if to_raw else None
        if raw is None:
            raise TypeError(f"{type(item).__name__} cannot be sent")
        frames.append(raw.data)
        return msgspec.msgpack.Ext(TENSOR, msgspec.msgpack.encode(_TensorHead(len(frames) - 1, raw.dtype, raw.shape)))

    frames[0] = msgspec.msgpack.Encoder(enc_hook=replace).encode(message)
    return frames


def from_frames(frames: list[bytes], from_raw: Callable[[RawTensor], Any] | None = None) -> Message:
    """The message of some frames; without `from_raw` its tensors stay raw. Raises ChannelError for what is none."""

    def restore(code: int, data: memoryview) -> Any:
        head = msgspec.msgpack.decode(data, type=_TensorHead)
        if code != TENSOR or not 0 < head.frame < len(frames):
            raise msgspec.ValidationError(f"extension {code}, frame {head.frame} of {len(frames)}")
        raw = RawTensor(head.dtype, head.shape, frames[head.frame])
        return from_raw(raw) if from_raw else raw

    try:
        message: Message = msgspec.msgpack.Decoder(Message, ext_hook=restore).decode(frames[0])
    except (msgspec.MsgspecError, IndexError) as error:
        raise ChannelError(f"a message that is none: {error}") from error
    return message


# ---- The two ends. ----


class Endpoints(msgspec.Struct, kw_only=True):
    """Where a hub is found, and with what secret; what a worker must be told to join a run."""

    secret: str
    pid: int
    """Process id of the hub."""
    local: str
    """ipc:// addresses for processes of the hub's host..."""
    local_pings: str
    remote: str | None = None
    """...and tcp:// addresses for others; None where there are none."""
    remote_pings: str | None = None

    def for_host(self, *, same_host: bool) -> tuple[str, str]:
        """Addresses for messages and for pings. Raises ChannelError where others are not listened to."""
        if same_host:
            return self.local, self.local_pings
        if self.remote is None or self.remote_pings is None:
            raise ChannelError("the hub listens on its own host only")
        return self.remote, self.remote_pings


class Hub:
    """The orchestrator's end. A peer is named "<rank>.<role>"; it exists once it said a right Hello.

    `tcp_host`: an address of this host that others reach; None if there are no others.
    """

    def __init__(self, secret: str, tcp_host: str | None = None):
        self._context, self._secret = zmq.Context(), secret
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.SNDTIMEO, SEND_MS)  # to a stopped process, whose queue is full
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._identities: dict[str, bytes] = {}
        self._names: dict[bytes, str] = {}
        name = os.urandom(8).hex()
        local, local_pings = (f"ipc://@tierforce-{name}-{of}" for of in ("hub", "pings"))
        self._pings = _Pings(self._context, local_pings, tcp_host)
        self._socket.setsockopt(zmq.IPC_FILTER_UID, os.getuid())
        self._socket.bind(local)
        remote = None if tcp_host is None else _bind_tcp(self._socket, tcp_host)
        self.endpoints = Endpoints(
            secret=secret,
            pid=os.getpid(),
            local=local,
            local_pings=local_pings,
            remote=remote,
            remote_pings=self._pings.remote,
        )

    def send(self, peer: str, message: Message) -> None:
        """Raises ChannelError where there is no such peer (any more)."""
        try:
            self._socket.send_multipart([self._identities[peer], *to_frames(message)])
        except (KeyError, zmq.ZMQError) as error:
            raise ChannelError(f"{peer} cannot be reached") from error

    def receive(self, timeout_s: float) -> tuple[str, Message] | None:
        """A peer and its message, or None: nothing came in time, or only what must not be heard."""
        deadline = time.monotonic() + timeout_s
        while self._socket.poll(max(0, int((deadline - time.monotonic()) * 1000))):
            identity, *frames = self._socket.recv_multipart()
            try:
                message = from_frames(frames)
            except ChannelError:
                continue
            if identity in self._names:
                return self._names[identity], message
            if greeted := self._greeted(identity, message):
                return greeted
        return None

    def _greeted(self, identity: bytes, message: Message) -> tuple[str, Message] | None:
        """The peer and its first message, or None where that is no right Hello.

        Identities are "<peer>#<anything>", so that a restarted peer is another one.
        """
        if not isinstance(message, Hello) or not hmac.compare_digest(message.secret, self._secret):
            return None
        if message.version != PROTOCOL_VERSION:
            return None
        peer = identity.partition(b"#")[0].decode("ascii", "replace")
        self.forget(peer)
        self._identities[peer], self._names[identity] = identity, peer
        return peer, message

    def knows(self, peer: str) -> bool:
        return peer in self._identities

    def forget(self, peer: str) -> None:
        """Drops a peer: what it still sends is not heard."""
        if peer in self._identities:
            self._names.pop(self._identities.pop(peer), None)

    def close(self) -> None:
        self._pings.close()
        self._socket.close()
        self._context.term()


class _Pings:
    """Tells everyone regularly that the orchestrator's process lives, whatever its main thread is at."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], local: str, tcp_host: str | None):
        self._socket = context.socket(zmq.PUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(local)
        self.remote = None if tcp_host is None else _bind_tcp(self._socket, tcp_host)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pings", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        frame = to_frames(Ping())[0]
        while not self._stop.wait(PING_SECONDS):
            self._socket.send(frame)
        self._socket.close()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def _bind_tcp(sock: zmq.Socket[bytes], host: str) -> str:
    """Binds the socket to a free port of `host`; returns its address."""
    port = sock.bind_to_random_port(f"tcp://{socket.gethostbyname(host)}")
    return f"tcp://{socket.gethostbyname(host)}:{port}"


class Line:
    """A worker's end of a channel, for one thread. `to_raw` and `from_raw` are for this process's tensors.

    `node` and `num_devices` say where the process runs; see workers.messages.Hello.
    """

    def __init__(
        self,
        address: str,
        peer: str,
        secret: str,
        to_raw: Callable[[Any], RawTensor] | None = None,
        from_raw: Callable[[RawTensor], Any] | None = None,
        *,
        node: int = 0,
        num_devices: int = 0,
    ):
        self._to_raw, self._from_raw = to_raw, from_raw
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, f"{peer}#{os.urandom(8).hex()}".encode())
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.connect(address)
        self.send(Hello(PROTOCOL_VERSION, secret, os.getpid(), socket.gethostname(), node, num_devices))

    def send(self, message: Message) -> None:
        self._socket.send_multipart(to_frames(message, self._to_raw))

    def receive(self, timeout_s: float | None = None) -> Message | None:
        """The next message, or None if nothing came in time; without `timeout_s` it waits. Raises ChannelError."""
        if not self._socket.poll(None if timeout_s is None else int(timeout_s * 1000)):
            return None
        return from_frames(self._socket.recv_multipart(), self._from_raw)

    def close(self) -> None:
        self._socket.close()


class PingListener:
    """Tells whether the orchestrator lives; for one thread. The end of `pid`, of this host, is seen at once."""

    def __init__(self, address: str, clock: Callable[[], float], pid: int | None = None):
        self._clock, self._heard_at = clock, clock()
        self._is_over: Callable[[], bool] = (lambda: False) if pid is None else _end_of(pid)
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.connect(address)

    def seconds_of_silence(self) -> float:
        """Seconds since the last ping; infinite where the orchestrator's process is known to be over."""
        if self._is_over():
            return math.inf
        while self._socket.poll(0):
            self._socket.recv()
            self._heard_at = self._clock()
        return self._clock() - self._heard_at

    def close(self) -> None:
        self._socket.close(linger=0)


def _end_of(pid: int) -> Callable[[], bool]:
    """Tells whether this process has ended: at once, and though nobody has taken note of it yet (a zombie)."""
    poll = select.poll()
    try:
        poll.register(os.pidfd_open(pid), select.POLLIN)
    except ProcessLookupError:
        return lambda: True
    except OSError:  # a system without such handles: silence will tell
        return lambda: False
    return lambda: bool(poll.poll(0))
