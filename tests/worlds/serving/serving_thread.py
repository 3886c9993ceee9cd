"""An application of serving behind real sockets, HTTP and gRPC, in a thread of the tests' process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from headrace.serving.api.app import BODIES, RELEASE, ServingApp, make_app
from headrace.serving.api.open_inference.over_grpc import OpenInferenceGrpc
from headrace.serving.compile_ranking import compile_ranking
from headrace.serving.draining import Ending
from headrace.serving.processes import answer_requests, listen


class Answering:
    """Where it answers."""

    def __init__(self, app: ServingApp) -> None:
        self.app, self.over, self._begun = app, threading.Event(), threading.Event()
        self.grpc = OpenInferenceGrpc(app, RELEASE, host="127.0.0.1", port=0, bytes_max=BODIES.bytes_max, calls_max=100)
        listener = listen("127.0.0.1", 0)
        self.http_port = listener.getsockname()[1]
        self.thread = threading.Thread(
            target=lambda: answer_requests(
                make_app(app),
                listener,
                self.over,
                jobs={"end": self._end},
                ending=Ending(beside=self),
                connections_max=100,
            )
        )

    def _end(self) -> None:
        self.over.wait()
        raise ValueError("told to end")

    async def begin(self) -> None:
        await self.grpc.begin()
        self._begun.set()

    async def end(self) -> None:
        await self.grpc.end()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def start(self) -> None:
        compile_ranking()  # As `serve` does: a client that waits for seconds alone would not wait for it.
        self.thread.start()
        assert self._begun.wait(10.0)


@contextmanager
def answering(app: ServingApp) -> Iterator[Answering]:
    """Answer until the context ends."""
    found = Answering(app)
    found.start()
    try:
        yield found
    finally:
        found.over.set()
        found.thread.join(10.0)
