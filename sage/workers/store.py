"""Messages between the workers of a run, beside the collectives: through the rendezvous store."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from pydantic import ValidationError

from sage.config import Settings
from sage.console import first_line
from sage.interfaces import CommunicationError, Place

PATIENCE_SECONDS = 10.0
"""How long, at most, the survivors of a failed collective wait for one another before they call others lost.
They may have entered it at different times, and then give up at different times."""
STORE_SECONDS = 5.0
"""How long the store may take to answer."""
Message = TypeVar("Message", bound=Settings)


class KeyValueStore(Protocol):
    """What is used of torch.distributed's stores; their failures are RuntimeErrors."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...


class RendezvousStore:
    """Exchanges short texts between the workers, and finds out who fell behind in a failed collective.

    All methods but blame raise CommunicationError where the store fails.
    """

    def __init__(self, place: Place, store: KeyValueStore | None, patience_seconds: float = 0.0) -> None:
        """store: None for a worker that is alone. patience_seconds: how long the survivors of a failed
        collective wait for one another."""
        self.place = place
        self._store = store
        self._patience_seconds = patience_seconds

    def agree(self, name: str, value: str) -> str:
        """Rank 0's value, on every worker. name: new for each call, the same on all workers."""
        if self._store is None:
            return value
        with _communication_errors():
            if self.place.rank == 0:  # it believes itself, not what somebody may have written meanwhile
                self._store.set(name, value)
                return value
            return _text(self._store.get(name))

    def collect(self, name: str, value: str) -> list[str]:
        """Every worker's value, in rank order. name: new for each call, the same on all workers."""
        if self._store is None:
            return [value]
        with _communication_errors():
            self._store.set(f"{name}/{self.place.rank}", value)
            return [
                value if rank == self.place.rank else _text(self._store.get(f"{name}/{rank}"))
                for rank in range(self.place.world_size)
            ]

    def collect_messages(self, name: str, message: Message) -> list[Message]:
        """Every worker's message, in rank order: sent as JSON, and validated on arrival."""
        messages: list[Message] = []
        for rank, text in enumerate(self.collect(name, message.model_dump_json())):
            try:
                messages.append(type(message).model_validate_json(text))
            except ValidationError as error:
                expected = f"expected a {type(message).__name__} of rank {rank}"
                raise CommunicationError(f"{name}: {expected}, got {text[:60]!r}") from error
        return messages

    def set_step(self, step: int) -> None:
        """Let the other workers know which step this one has come to."""
        if self._store is not None:
            with _communication_errors():
                self._store.set(f"step/{self.place.rank}", str(step))

    def blame(self) -> str:
        """Which workers fell behind, in one line; called by the survivors of a failed collective.

        Each survivor marks itself and waits for the others to do so; those that have not are named. A store
        that does not answer in time is given up.
        """
        if self._store is None:
            return "there is no other worker"
        store, answers = self._store, list[str]()
        thread = threading.Thread(target=lambda: answers.append(self._find_lost_workers(store)), daemon=True)
        thread.start()
        thread.join(self._patience_seconds + STORE_SECONDS)
        return answers[0] if answers else "the rendezvous store does not answer, so no worker's step is known"

    def _find_lost_workers(self, store: KeyValueStore) -> str:
        try:
            store.set(f"survived/{self.place.rank}", "1")
            silent = self._wait_for_survivors(store)
            steps = [_step_of(rank, store) for rank in range(self.place.world_size)]
        except RuntimeError as error:  # the store's own error, when its host is gone
            return f"the rendezvous store is gone, so no worker's step is known ({reason_of(error)})"

        listed = ", ".join(f"rank {rank} at step {step}" for rank, step in enumerate(steps))
        if not silent:
            return f"every worker is alive and gave up ({listed})"
        return f"rank {', '.join(map(str, silent))} fell behind: it no longer answers ({listed})"

    def _wait_for_survivors(self, store: KeyValueStore) -> list[int]:
        """Wait until at most one worker has not marked itself, or for patience_seconds; the ranks that have
        not."""
        deadline = time.monotonic() + self._patience_seconds
        while True:
            ranks = range(self.place.world_size)
            silent = [rank for rank in ranks if not store.check([f"survived/{rank}"])]
            if len(silent) <= 1 or time.monotonic() > deadline:
                return silent
            time.sleep(0.1)


def _step_of(rank: int, store: KeyValueStore) -> str:
    key = f"step/{rank}"
    return _text(store.get(key))[:20] if store.check([key]) else "none"


def _text(content: bytes) -> str:
    """A value as a text; what is not UTF-8 is replaced, since anybody may have written it."""
    return content.decode(errors="replace")


def reason_of(error: BaseException) -> str:
    """Why the store failed, in one line, without the keys: they begin with the run's secret."""
    return re.sub(r",? ?keys?:? .*", "", first_line(error), flags=re.IGNORECASE)


@contextmanager
def _communication_errors() -> Iterator[None]:
    """Raise the store's errors as CommunicationErrors."""
    try:
        yield
    except RuntimeError as error:
        raise CommunicationError(f"the rendezvous store failed: {reason_of(error)}") from error
