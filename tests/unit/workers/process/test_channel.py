"""workers/process/channel.py: typed messages over real sockets; no other message, and no stranger's, is heard."""

from __future__ import annotations

import os
import pickle
import threading
import time
from pathlib import Path

import msgspec
import pytest
import torch
import zmq

from workers.messages import (
    PROTOCOL_VERSION,
    Beat,
    Call,
    Close,
    Draft,
    Ended,
    Extend,
    Failure,
    Hello,
    InnerStep,
    Plain,
    Propose,
    Reply,
    Restart,
    TakeUpdate,
    UpdateNotice,
    Verdict,
    Verify,
)
from workers.process import channel
from workers.process.channel import TENSOR, ChannelError, Hub, Line, PingListener, RawTensor, from_frames, to_frames
from workers.process.tensor_frames import from_raw, to_raw

SECRET = "s3cret"
SECONDS = 5.0
QUIET_SECONDS = 0.2


@pytest.fixture
def hub():
    hub = Hub(SECRET)
    yield hub
    hub.close()


@pytest.fixture
def connect(hub):
    """Makes lines that are closed at the end."""
    lines = []

    def make(peer: str = "1.drafter", secret: str = SECRET, **how) -> Line:
        lines.append(Line(hub.endpoints.local, peer, secret, to_raw, from_raw, **how))
        return lines[-1]

    yield make
    for line in lines:
        line.close()


def crossed(message):
    """As it arrives at a process that computes."""
    return from_frames([bytes(frame) for frame in to_frames(message, to_raw)], from_raw)


MESSAGES = [
    Call(3, Propose([1, 2], 4, 1)),
    Call(4, Verify(Draft(tokens=[1], origins=["drafter"], runners_up=[-1], closeness=[0.5]))),
    Call(5, Extend([], Draft(), 2)),
    Reply(3, Verdict(num_accepted=2, next_token=7), "state"),
    Reply(3, InnerStep(draft=Draft(tokens=[5]), num_proposed=2, num_accepted=0)),
    Reply(3, Plain({"a": [1, None, True]})),
    Failure(3, "ValueError", "no", "Traceback"),
    Beat(5, "Verify", 1, 2),
    Ended(-9, 77),
    Close(True),
    Restart(),
    Hello(PROTOCOL_VERSION, SECRET, 1, "host", 1, 2),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_arrive_as_they_left(message):
    assert crossed(message) == message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8], ids=str)
@pytest.mark.parametrize("size", [(3,), (2, 1, 5), (0, 4), ()], ids=str)
def test_tensors_arrive_with_their_bits(dtype, size):
    tensor = torch.randint(-100, 100, size).to(dtype)
    arrived = crossed(Reply(1, Draft(tokens=[1], probs=[tensor]))).result.probs[0]
    assert arrived.dtype == dtype and torch.equal(arrived, tensor)


def test_a_part_of_a_tensor_sends_no_more_than_itself():
    whole = torch.arange(12.0).view(3, 4)
    frames = to_frames(Reply(1, Draft(tokens=[1], probs=[whole[:, 1]])), to_raw)
    assert len(bytes(frames[1])) == 3 * 4
    assert torch.equal(from_frames(frames, from_raw).result.probs[0], whole[:, 1])


def test_updates_carry_tensors_and_gaps():
    notice = UpdateNotice(is_rebuild=True, length=9, carried=[[torch.ones(2, 3), None], [None, torch.zeros(1)]])
    arrived = crossed(Call(1, TakeUpdate([notice]))).request.notices[0].carried
    assert torch.equal(arrived[0][0], torch.ones(2, 3)) and arrived[0][1] is None and arrived[1][1].tolist() == [0.0]


def test_who_does_not_compute_passes_tensors_on_unread():
    frames = [bytes(frame) for frame in to_frames(Reply(1, Draft(tokens=[1], probs=[torch.ones(4)])), to_raw)]
    message = from_frames(frames)
    assert isinstance(message.result.probs[0], RawTensor)
    assert [bytes(frame) for frame in to_frames(message)][1:] == frames[1:]


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [b"\xff\x00"],
        [pickle.dumps({"a": 1})],
        [msgspec.msgpack.encode({"type": "Nothing"})],
        [msgspec.msgpack.encode({"type": "Call", "id": "three", "request": {"type": "Commit", "tokens": []}})],
        [msgspec.msgpack.encode({"type": "Reply", "id": 1, "result": {"type": "Draft", "tokens": ["x"]}})],
    ],
    ids=["nothing", "empty", "noise", "pickle", "unknown type", "wrong type", "wrong type inside"],
)
def test_what_is_no_message_is_refused(frames):
    with pytest.raises(ChannelError):
        from_frames(frames)


@pytest.mark.parametrize(("code", "frame"), [(TENSOR, 2), (TENSOR, 0), (TENSOR, -1), (9, 1)])
def test_a_tensor_without_its_frame_is_refused(code, frame):
    head = msgspec.msgpack.encode([frame, "float32", [1]])
    draft = {"type": "Draft", "tokens": [1], "probs": [msgspec.msgpack.Ext(code, head)]}
    plain = {"type": "Reply", "id": 1, "result": draft}
    with pytest.raises(ChannelError):
        from_frames([msgspec.msgpack.encode(plain), b"1234"])


def test_a_tensor_whose_bytes_do_not_fit_its_shape_is_refused():
    with pytest.raises((ValueError, RuntimeError)):
        from_raw(RawTensor("float32", [3], b"1234"))
    with pytest.raises(ValueError, match="no tensor type"):
        from_raw(RawTensor("load", [1], b"1234"))


def test_nothing_here_can_pickle():
    source = Path(channel.__file__).read_text(encoding="utf-8")
    assert not any(word in source for word in ("import pickle", "recv_pyobj", "send_pyobj", "recv_json"))


def test_a_peer_says_hello_then_talks_both_ways(hub, connect):
    line = connect("2.retriever", node=1, num_devices=4)
    peer, hello = hub.receive(SECONDS)
    assert (peer, hello.node, hello.num_devices, hello.pid) == ("2.retriever", 1, 4, os.getpid())
    assert hub.knows("2.retriever")
    hub.send("2.retriever", Call(1, Propose([1], 2)))
    assert line.receive(SECONDS) == Call(1, Propose([1], 2))
    line.send(Reply(1, Draft(tokens=[3], probs=[torch.ones(2)])))
    peer, reply = hub.receive(SECONDS)
    assert peer == "2.retriever" and bytes(reply.result.probs[0].data) == torch.ones(2).numpy().tobytes()


def test_nothing_comes_in_time(hub, connect):
    assert hub.receive(0.01) is None
    assert connect().receive(0.01) is None


def first_heard(hub: Hub, stranger: zmq.Socket) -> str:
    """The name of a stranger who at last says a right Hello: nobody heard what it sent before, since order is kept."""
    hello = Hello(PROTOCOL_VERSION, SECRET, 1, "host")
    stranger.send_multipart(to_frames(hello))
    peer, message = hub.receive(SECONDS)
    assert message == hello
    return peer


@pytest.mark.parametrize("hello", [{"secret": "guess"}, {"secret": ""}, {"version": PROTOCOL_VERSION + 1}])
def test_strangers_and_other_versions_are_not_heard(hub, hello):
    told = {"version": PROTOCOL_VERSION, "secret": SECRET} | hello
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.setsockopt(zmq.IDENTITY, b"3.verifier#1")
    stranger.connect(hub.endpoints.local)
    stranger.send_multipart(to_frames(Hello(told["version"], told["secret"], 1, "host")))
    stranger.send_multipart(to_frames(Reply(1, Plain("mine"))))
    assert hub.receive(QUIET_SECONDS) is None and hub.receive(QUIET_SECONDS) is None
    assert not hub.knows("3.verifier")
    with pytest.raises(ChannelError, match="3.verifier cannot be reached"):
        hub.send("3.verifier", Close())
    assert first_heard(hub, stranger) == "3.verifier"
    stranger.close(linger=0)
    context.term()


def test_who_talks_before_hello_is_not_heard(hub):
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.connect(hub.endpoints.local)
    stranger.send_multipart([b"\x80garbage"])
    stranger.send_multipart(to_frames(Beat(1, "")))
    assert hub.receive(QUIET_SECONDS) is None and hub.receive(QUIET_SECONDS) is None
    assert first_heard(hub, stranger)
    stranger.close(linger=0)
    context.term()


def test_a_restarted_peer_takes_the_place_of_the_one_before(hub, connect):
    earlier = connect("1.drafter")
    hub.receive(SECONDS)
    later = connect("1.drafter")
    hub.receive(SECONDS)
    hub.send("1.drafter", Close())
    assert later.receive(SECONDS) == Close() and earlier.receive(0.05) is None
    earlier.send(Beat(1, ""))  # what it still has to say is of no interest
    assert hub.receive(0.5) is None


def test_a_forgotten_peer_is_neither_heard_nor_reached(hub, connect):
    line = connect("1.drafter")
    hub.receive(SECONDS)
    hub.forget("1.drafter")
    line.send(Beat(1, ""))
    assert hub.receive(0.5) is None and not hub.knows("1.drafter")


def test_sockets_of_one_host_leave_no_file(hub):
    messages, pings = hub.endpoints.for_host(same_host=True)
    assert messages.startswith("ipc://@") and pings.startswith("ipc://@") and messages != pings


def test_other_hosts_come_over_tcp_to_one_address_alone():
    hub = Hub(SECRET, "127.0.0.1")
    messages, pings = hub.endpoints.for_host(same_host=False)
    assert messages.startswith("tcp://127.0.0.1:") and pings.startswith("tcp://127.0.0.1:") and messages != pings
    line = Line(messages, "4.verifier", SECRET)
    assert hub.receive(SECONDS)[0] == "4.verifier"
    line.close()
    hub.close()


def test_pings_come_whatever_the_orchestrator_is_at(hub):
    listener = PingListener(hub.endpoints.local_pings, time.monotonic)
    deadline = time.monotonic() + 10
    heard = listener._heard_at
    while listener._heard_at == heard and time.monotonic() < deadline:
        time.sleep(0.1)
        listener.seconds_of_silence()
    assert listener._heard_at > heard
    listener.close()


def test_silence_is_counted_by_the_clock():
    now = [10.0]
    listener = PingListener("ipc:///tmp/nobody-is-there", lambda: now[0])
    now[0] = 17.5
    assert listener.seconds_of_silence() == 7.5
    listener.close()


def test_a_hub_leaves_no_thread():
    before = threading.active_count()
    Hub(SECRET).close()
    assert threading.active_count() == before
