"""What the workers of a run tell one another outside of collectives: through the rendezvous store."""

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
    """Each worker's step, in the rendezvous store: there one can read who fell behind in a collective."""

    def __init__(self, place: Place, store: KeyValueStore | None, patience_seconds: float = 0.0) -> None:
        """patience_seconds: how long the survivors of a failed collective wait for one another."""
        self.place = place
        self._store = store
        self._patience_seconds = patience_seconds

    def agree(self, name: str, value: str) -> str:
        """Rank 0's value, on every worker. Raises CommunicationError, as all methods but blame."""
        if self._store is None:
            return value
        with _asking():
            if self.place.rank == 0:
                self._store.set(name, value)
            return str(self._store.get(name).decode())

    def collect(self, name: str, value: str) -> list[str]:
        """Every worker's value, in rank order."""
        if self._store is None:
            return [value]
        with _asking():
            self._store.set(f"{name}/{self.place.rank}", value)
            return [self._store.get(f"{name}/{rank}").decode() for rank in range(self.place.world_size)]

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
        if self._store is not None:
            with _asking():
                self._store.set(f"step/{self.place.rank}", str(step))

    def blame(self) -> str:
        """Which workers fell behind, in one line; asked by the survivors of a failed collective.

        Each survivor marks itself and waits for the others to do so; those that have not are named. A store
        that does not answer is given up.
        """
        if self._store is None:
            return "there is no other worker"
        told: list[str] = []
        thread = threading.Thread(target=lambda: told.append(self._ask()), daemon=True)
        thread.start()
        thread.join(self._patience_seconds + STORE_SECONDS)
        return told[0] if told else "the rendezvous store does not answer, so no worker's step is known"

    def _ask(self) -> str:
        assert self._store is not None
        ranks = range(self.place.world_size)
        try:
            self._store.set(f"survived/{self.place.rank}", "1")
            deadline = time.monotonic() + self._patience_seconds
            while True:
                silent = [rank for rank in ranks if not self._store.check([f"survived/{rank}"])]
                if len(silent) <= 1 or time.monotonic() > deadline:
                    break
                time.sleep(0.1)
            steps = [self._step_of(rank) for rank in ranks]
        except RuntimeError as error:  # the store's own error, when its host is gone
            return f"the rendezvous store is gone, so no worker's step is known ({first_line(error)})"
        told = ", ".join(f"rank {rank} at step {step}" for rank, step in enumerate(steps))
        if not silent:
            return f"every worker is alive and gave up ({told})"
        return f"rank {', '.join(map(str, silent))} fell behind: it no longer answers ({told})"

    def _step_of(self, rank: int) -> str:
        assert self._store is not None
        key = f"step/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else "none"


@contextmanager
def _asking() -> Iterator[None]:
    """The store's errors as ours."""
    try:
        yield
    except RuntimeError as error:
        raise CommunicationError(f"the rendezvous store failed: {first_line(error)}") from error
