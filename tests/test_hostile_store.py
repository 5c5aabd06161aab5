"""The rendezvous store has no password: what somebody else writes there is not believed."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist

from sage.interfaces import CommunicationError, Place
from sage.workers import group, launch
from sage.workers.store import RendezvousStore
from tests.test_launch import PATIENCE_SECONDS, free_port

ROOT = Path(__file__).parent.parent
HOSTILE = [
    "",
    "../../elsewhere",
    "/tmp/elsewhere",
    "x" * 100_000,
    "\x1b[2J",
    "{}",
    "[]",
    '{"files": 3}',
    "-1",
    "a/b",
]


class Written(dict[str, bytes]):
    """A store in which somebody has already written, and writes over what others write."""

    def __init__(self, value: str) -> None:
        self.value = value.encode()

    def set(self, key: str, value: str) -> None:
        self[key] = self.value

    def get(self, key: str) -> bytes:  # type: ignore[override]
        return dict.get(self, key, self.value)

    def check(self, keys: list[str]) -> bool:
        return True


@pytest.mark.parametrize("value", [*HOSTILE, "\udcff"])
def test_a_worker_believes_itself(value: str) -> None:
    stored = Written(value if value != "\udcff" else "")
    if value == "\udcff":
        stored.value = b"\xff\xfe"
    rank_0 = RendezvousStore(Place(0, 2), stored)
    assert rank_0.agree("run", "mine") == "mine"
    for rank in range(2):
        found = RendezvousStore(Place(rank, 2), stored).collect("where", "mine")
        assert found[rank] == "mine"
        assert isinstance(found[1 - rank], str)
    assert "\n" not in rank_0.blame()
    assert len(rank_0.blame()) < 200


def listeners() -> set[str]:
    """The local addresses, in hexadecimal, on which processes of this machine listen."""
    found = set()
    for path in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        rows = [line.split() for line in path.read_text().splitlines()[1:]] if path.exists() else []
        found |= {row[1] for row in rows if row[3] == "0A"}
    return found


def test_the_store_of_workers_on_this_machine_listens_on_the_loopback_only() -> None:
    store = group.open_local_store()
    (address,) = [address for address in listeners() if address.endswith(f":{store.port:04X}")]
    assert address.split(":")[0] in ("0100007F", "0000000000000000FFFF00000100007F")


def test_workers_of_one_machine_get_a_secret_and_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth9")
    found = launch._worker_environment(1, 2, 1234, "abc")
    assert (found["MASTER_ADDR"], found[group.SECRET]) == ("127.0.0.1", "abc")
    assert (found["GLOO_SOCKET_IFNAME"], found["NCCL_SOCKET_IFNAME"]) == ("lo", "eth9")


NAMES = ["run", "resume", "done", "manifest/1", "manifest/2", "manifest/3"]
COLLECTED = ["identity", "where", "named", "seen", "opened", "restored"]
COLLECTED += ["checkpoint/1", "checkpoint/2", "loss/3", "gradient/3"]
KEYS = [*NAMES, *(f"{name}/{rank}" for name in COLLECTED for rank in range(2)), "step/0", "step/1"]


@contextmanager
def writing_everywhere(port: int, value: str) -> Iterator[None]:
    """Somebody who can reach the store writes a value to every key, again and again."""
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            try:
                socket.create_connection(("127.0.0.1", port), 0.2).close()
                store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
                keys = dist.PrefixStore("run", dist.PrefixStore("no secret/0", store))
                while not stop.is_set():
                    for key in KEYS:
                        keys.set(key, value)
                    time.sleep(0.01)
            except (OSError, RuntimeError):
                time.sleep(0.05)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(10)


@pytest.mark.parametrize("value", ["/tmp/elsewhere-of-somebody", '{"files": {"../x": 3}}'])
def test_somebody_who_writes_to_every_key_of_a_launch_without_a_secret_gets_nothing_written(
    value: str, tmp_path: Path
) -> None:
    """The run may fail, in one line a worker; it writes into the folder of runs only, and shows no
    traceback."""
    port, words = (
        free_port(),
        ["configs/digits.yaml", "epochs=1", "timeout_seconds=30", "log.tensorboard=false"],
    )
    commands = []
    with writing_everywhere(port, value):
        for rank in range(2):
            variables = {"hostip": "127.0.0.1", "port": str(port), "rank": str(rank), "world_size": "2"}
            commands.append(
                subprocess.Popen(
                    [sys.executable, "run.py", *words, "--runs", str(tmp_path / "runs")],
                    cwd=ROOT,
                    env={**os.environ, **variables},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        outputs = [command.communicate(timeout=PATIENCE_SECONDS)[0] for command in commands]
    for output in outputs:
        assert "Traceback" not in output, output
    assert {path.name for path in tmp_path.iterdir()} <= {"runs"}
    assert not Path("/tmp/elsewhere-of-somebody").exists()
    made = [path.parent.name for path in tmp_path.rglob("config.yaml")]
    assert all(re.match(r"sage-s1-\d{8}-\d{6}-\d{3}$", name) for name in made)


def test_no_message_shows_the_secret_that_the_stores_keys_begin_with() -> None:
    class SlowStore:
        def set(self, key: str, value: str, /) -> None: ...

        def get(self, key: str, /) -> bytes:
            raise RuntimeError(f"wait timeout after 10000ms, keys: /the-secret/0/run/{key}")

        def check(self, keys: list[str], /) -> bool:
            raise RuntimeError(f"Failed to look up key: /the-secret/0/run/{keys[0]}")

    store = RendezvousStore(Place(1, 2), SlowStore())
    with pytest.raises(CommunicationError) as failure:
        store.agree("run", "")
    assert str(failure.value) == "the rendezvous store failed: wait timeout after 10000ms"
    assert "the-secret" not in store.blame()
