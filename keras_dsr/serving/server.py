"""The server: ports, threads, start and stop."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import math
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from keras_dsr.serving.errors import needs_extra

if TYPE_CHECKING:
    import grpc

_LOGGER = logging.getLogger("keras_dsr.serving")
_LAST = 1.0  # seconds that idle threads have to end in, even if there is no grace
_CONNECTIONS = 10  # of REST, for each request that there may be at once: many of a client's are idle
_BESIDE = 4  # gRPC's threads for status and metadata while predictions take all others
_NAME = re.compile(r"[^/:\s]+")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a server serves.

    Args:
        host: The address to listen at. There is neither encryption nor a password: leave the loopback only for a
            network that you trust.
        grpc_port: Port for gRPC; 0 for any free one. TensorFlow Serving's default.
        rest_port: Port for REST; 0 for any free one. TensorFlow Serving's default.
        poll: Seconds between two looks for new versions.
        latest: How many of a model's newest versions to serve. TensorFlow Serving's default.
        max_batch_size: How many examples to join to one run; 1 joins nothing. Larger requests run alone.
        batch_timeout: Seconds that a batch waits to be filled; 0 takes what waits anyway.
        max_queue: How many requests may wait for one signature; one more is answered UNAVAILABLE (503).
        max_requests: How many predictions there may be at once over gRPC, and as many over REST; one more is answered
            RESOURCE_EXHAUSTED (429).
        max_request_bytes: How large a request may be; a larger one is answered RESOURCE_EXHAUSTED (413). All requests
            over REST may have four times as many; one that has more is answered RESOURCE_EXHAUSTED (429).
        max_examples: How many examples a request may have; one with more is answered INVALID_ARGUMENT (400).
        rest_timeout: Seconds in which a REST request must have arrived and had its turn; gRPC's clients set their own.
        grace: Seconds that requests have to end in when the server stops. What waits is refused after them.
        allow_non_finite: Whether NaN and infinity may be among the inputs.

    Raises:
        ValueError: if a setting is out of its range.
    """

    host: str = "127.0.0.1"
    grpc_port: int = 8500
    rest_port: int = 8501
    poll: float = 1.0
    latest: int = 1
    max_batch_size: int = 32
    batch_timeout: float = 0.0
    max_queue: int = 64
    max_requests: int = 96
    max_request_bytes: int = 64 * 2**20
    max_examples: int = 1024
    rest_timeout: float = 30.0
    grace: float = 30.0
    allow_non_finite: bool = False

    def __post_init__(self):
        for name in ("grpc_port", "rest_port"):
            if not 0 <= getattr(self, name) < 65536:
                raise ValueError(f"{name} must be a port, or 0 for any free one. Received {getattr(self, name)}.")
        if self.grpc_port == self.rest_port != 0:
            raise ValueError(f"gRPC and REST need a port each. Received {self.grpc_port} for both.")
        for name in ("latest", "max_batch_size", "max_queue", "max_requests", "max_request_bytes", "max_examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1. Received {getattr(self, name)}.")
        if self.max_request_bytes >= 2**31:
            raise ValueError(
                f"max_request_bytes must be below 2 GiB, which gRPC cannot take. Received {self.max_request_bytes}."
            )
        for name in ("poll", "rest_timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a time above 0 in seconds. Received {getattr(self, name)}.")
        for name in ("batch_timeout", "grace"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a time in seconds, at least 0. Received {getattr(self, name)}.")


def model_folders(words: Iterable[str]) -> dict[str, Path]:
    """Models and their folders from words such as `savedmodels/digits` or `name=savedmodels/digits`.

    Args:
        words: A folder of versions each; the model is called as the folder unless a name and `=` stand before it.

    Raises:
        ValueError: if a name cannot stand in a URL or is given twice.

    Example:

    >>> from keras_dsr.serving import model_folders
    >>> sorted(model_folders(["savedmodels/digits", "small=savedmodels/digits-4"]))
    ['digits', 'small']
    """
    folders: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or "/" in name:  # a folder's own path may have a "=" in it
            name, folder = Path(word).resolve().name, word
        if name in folders:
            raise ValueError(f"Two models are called {name!r}. Name one of them: other={folder}.")
        folders[name] = Path(folder)
    return folders


def _check(folders: Mapping[str, Path]) -> None:
    if not folders:
        raise ValueError("There is no model to serve. Name a folder of versions, such as savedmodels/digits.")
    for name, folder in folders.items():
        if not _NAME.fullmatch(name):
            raise ValueError(f"A model's name has no spaces, slashes and colons. Received {name!r}. Give another one.")
        if not folder.is_dir():
            raise FileNotFoundError(f"The model {name!r} should be in {folder}, which is not a folder.")
        if (folder / "saved_model.pb").is_file():
            raise ValueError(
                f"{folder} is one version. Name the folder of versions, {folder.parent}; a version's folder is called "
                "by a whole number."
            )


class Server:
    """Serves models over gRPC and REST, until it is stopped.

    Args:
        models: The folder of versions of each model, by the name to serve it under.
        settings: How to serve.

    Raises:
        ImportError: if the extra `serve` is not installed.
        ValueError: if a name or folder cannot be served.
        FileNotFoundError: if a folder does not exist.

    Example:
        with Server({"digits": "savedmodels/digits"}, Settings(grpc_port=0, rest_port=0)) as server:
            with Client(server.grpc_address, "digits") as client:
                client.predict(images)
    """

    def __init__(self, models: Mapping[str, str | Path], settings: Settings = Settings()):
        try:
            from keras_dsr.serving import grpc_api, manager, metrics, predict, rest_api
        except ModuleNotFoundError as error:
            raise needs_extra(error) from error
        folders = {name: Path(folder) for name, folder in models.items()}
        _check(folders)
        self.settings = settings
        shown = metrics.Metrics(list(folders))
        self._closed = threading.Event()
        load = predict.Loader(
            shown, settings.max_batch_size, settings.batch_timeout, settings.max_queue, stopped=self._closed
        )
        self._models = manager.Manager(folders, load, poll=settings.poll, latest=settings.latest)
        predictor = predict.Predictor(
            self._models, shown, max_examples=settings.max_examples, allow_non_finite=settings.allow_non_finite
        )
        services = grpc_api.Services(
            predictor,
            self._models,
            shown,
            max_requests=settings.max_requests,
            max_request_bytes=settings.max_request_bytes,
        )
        self._handlers = services.handlers()
        self._grpc_threads = ThreadPoolExecutor(settings.max_requests + _BESIDE, thread_name_prefix="keras-dsr-grpc")
        self._rest_threads = ThreadPoolExecutor(settings.max_requests, thread_name_prefix="keras-dsr-rest")
        self._application = rest_api.RestApi(
            predictor,
            services,
            shown,
            self._rest_threads,
            max_requests=settings.max_requests,
            max_request_bytes=settings.max_request_bytes,
            timeout=settings.rest_timeout,
        ).application()
        self._ports: tuple[int, int] | None = None

    @property
    def grpc_address(self) -> str:
        """Host and port of gRPC, for `Client` or a channel.

        Raises:
            RuntimeError: if the server was not started.
        """
        return _address(self.settings.host, self._started()[0])

    @property
    def rest_address(self) -> str:
        """Host and port of REST.

        Raises:
            RuntimeError: if the server was not started.
        """
        return _address(self.settings.host, self._started()[1])

    def _started(self) -> tuple[int, int]:
        if self._ports is None:
            raise RuntimeError("A server has addresses once it was started. Use it in a with statement, or start() it.")
        return self._ports

    def start(self) -> None:
        """Takes the ports, loads the models, then answers.

        Raises:
            OSError: if a port cannot be had.
            RuntimeError: if the server was started before.
        """
        import grpc
        import uvicorn

        if self._ports is not None:
            raise RuntimeError("A server starts once. Make another one.")
        settings = self.settings
        with contextlib.ExitStack() as undo:
            listener = undo.enter_context(_listen(settings.host, settings.rest_port))
            server = grpc.server(
                self._grpc_threads,
                handlers=self._handlers,
                options=[
                    ("grpc.max_receive_message_length", settings.max_request_bytes),
                    ("grpc.max_send_message_length", -1),
                    ("grpc.so_reuseport", 0),  # a port that is taken is an error, not shared
                ],
                maximum_concurrent_rpcs=settings.max_requests + _BESIDE,
            )
            grpc_port = _bind(server, settings)
            undo.callback(_release, server)
            self._models.start()
            undo.pop_all()
        self._grpc = server
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                self._application,
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=_CONNECTIONS * settings.max_requests,
                timeout_graceful_shutdown=math.ceil(settings.grace),
            )
        )
        self._rest = threading.Thread(target=self._uvicorn.run, args=([listener],), name="keras-dsr-rest", daemon=True)
        self._ports = (grpc_port, listener.getsockname()[1])
        self._grpc.start()
        self._rest.start()

    def stop(self) -> bool:
        """Takes no more requests and versions, lets what runs come to its end within the grace, and stops.

        Returns:
            Whether all came to its end. What did not goes on in its thread, which Python waits for as the process ends.
        """
        if self._ports is None:
            return True
        deadline = time.monotonic() + self.settings.grace
        self._models.stop()
        self._uvicorn.should_exit = True
        self._grpc.stop(self.settings.grace).wait()
        self._rest.join()
        self._closed.set()
        threads = threading.Thread(target=self._join, name="keras-dsr-stop", daemon=True)
        threads.start()
        threads.join(max(_LAST, deadline - time.monotonic()))
        return not threads.is_alive()

    def _join(self) -> None:
        """Waits for all that runs."""
        for pool in (self._grpc_threads, self._rest_threads):
            pool.shutdown(cancel_futures=True)
        self._models.join()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *details: object) -> None:
        self.stop()


def run(models: Mapping[str, str | Path], settings: Settings = Settings()) -> None:
    """Serves until SIGTERM or Ctrl-C, then lets requests come to their end. A second signal ends the process at once.

    Must run in the main thread, which signals go to.

    Args:
        models: The folder of versions of each model, by the name to serve it under.
        settings: How to serve.

    Raises:
        ImportError: if the extra `serve` is not installed.
        ValueError: if a name or folder cannot be served.
        OSError: if a folder does not exist or a port cannot be had.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    _LOGGER.setLevel(logging.INFO)
    server = Server(models, settings)
    stopped = threading.Event()

    def stop(number: int, frame: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        stopped.set()

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, stop)
    try:
        server.start()
        for name in models:
            url = f"http://{server.rest_address}/v1/models/{name}"
            print(f"{name}: gRPC {server.grpc_address}, REST {url}", flush=True)
        stopped.wait()
        print("Stopping: requests that run come to their end.", flush=True)
    finally:
        ended = server.stop()
        for number, handler in before.items():
            signal.signal(number, handler)
    if not ended:
        print(f"What has not come to its end within {settings.grace:g} seconds is cut off.", flush=True)
        sys.stderr.flush()
        os._exit(0)  # the end of the interpreter would wait for what still runs


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _bind(server: grpc.Server, settings: Settings) -> int:
    """Takes the port of gRPC."""
    address = _address(settings.host, settings.grpc_port)
    try:
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(
            errno.EADDRINUSE,
            f"gRPC cannot listen at {address}: the port is taken, or the address is not of this machine. Choose "
            "another with --grpc-port, or 0 for any free one",
        ) from error


def _release(server: grpc.Server) -> None:
    """Gives the port of a server back that was not started: gRPC does so only for one that was."""
    server.start()
    server.stop(None)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket for REST."""
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        if listener is not None:
            listener.close()
        raise OSError(
            error.errno,
            f"REST cannot listen at {_address(host, port)}: {error.strerror}. Choose another port with --rest-port, "
            "or 0 for any free one",
        ) from error
    return listener
