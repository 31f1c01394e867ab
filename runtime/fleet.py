"""Several devices behind one queue: an engine in a process of its own on each, pages pulled by whichever is free.

The process that made the fleet lists pages and hands them out, a few at a time; it computes nothing. Each worker is a fresh
interpreter (never a fork) at the other end of a socket, with a session of its own, so that Ctrl-C reaches the parent alone; it
ends when the socket closes, which also happens when the parent is killed.

A worker that dies is begun anew, and what it held goes to the others. Which of the pages killed it is found out thus: they are
handed out again freely; those that were in the hands of a second dead worker go one to a worker; a worker that dies
with one such page alone convicts it, and it becomes an error.

A worker whose engine hangs, in a kernel that never returns say, is ended, and then is one that died. The engine's own thread
reports that it comes round, so that nothing of a worker that lives on beside it can hide that it hangs.
"""

from __future__ import annotations

import math
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Container, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from pagemill.config import EngineConfig, default_fraction, default_stall_seconds
from pagemill.decode.sampler import SamplingParams
from pagemill.engine import Engine
from pagemill.errors import ConfigError, DeviceError, PagemillError, RequestError, sentence
from pagemill.pages.fit import Resolution
from pagemill.pages.listing import Inputs, failed_page, find_pages
from pagemill.pages.source import PageRef
from pagemill.results import PageResult
from pagemill.stats import EngineStats, total

_WORKER = "import sys; sys.path[:] = sys.argv[2:]; from pagemill.fleet import serve; serve(int(sys.argv[1]))"
_FRUITLESS_LIVES = 4  # in a row, without one page finished: one more than it takes to convict a page
_SECONDS_TO_END = (
    5.0  # for a worker whose socket is closed, before it is killed, and then before it is left behind
)
_LONGEST_POLL = 3600.0  # seconds: the system counts milliseconds in 32 bits
_SECONDS_BETWEEN_TURNS = 0.25  # that are reported; an engine with nothing to do makes one a second
_SLOW_START = 10  # times the patience: kernels are compiled, and weights summed and brought into memory, with the first page
_SUMMED = ("max_num_seqs", "prepare_threads", "kv_cache_bytes", "kv_cache_blocks", "kv_cache_tokens")


@dataclass(eq=False)
class _Page:
    ref: PageRef
    strikes: int = 0
    """Workers that died with this page in their hands."""


@dataclass(eq=False)
class _Worker:
    """One device's process, in its present life."""

    device: str
    options: dict[str, Any]
    environment: dict[str, str]
    stall_seconds: float
    alive: bool = True
    """Running, loading or about to begin anew."""
    ready: bool = False
    pid: int = 0
    socket: socket.socket | None = None
    pipe: Connection | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    finished: int = 0
    """Pages of this life."""
    turn: float | None = None
    """When the engine's thread last came round, or began to load what was loaded before; None: the model was never loaded."""
    proven: bool = False
    """The model has read a page in this life."""
    fruitless: int = 0
    """Lives in a row that ended without a page."""
    failure: str = ""
    """Why it is not alive."""
    asked: deque[queue.SimpleQueue[EngineStats | None]] = field(default_factory=deque)

    @property
    def room(self) -> int:
        """Pages of one call that it may hold: a full batch, and a few in preparation."""
        return int(self.facts["max_num_seqs"] + self.facts["prepare_threads"])

    @property
    def patience(self) -> float:
        """Seconds in which it still has to be heard of before it hangs."""
        if self.turn is None:
            return math.inf
        limit = self.stall_seconds * (1 if self.proven else _SLOW_START)
        return self.turn + limit - time.monotonic()

    def send(self, *message: Any) -> None:
        """Send a message; nothing happens if the worker has died, since whoever listens to it finds out."""
        if self.pipe is not None:
            with suppress(OSError):
                self.pipe.send(message)


@dataclass(eq=False)
class _Reading:
    """One call of `read`: the pages to come, those handed out, and what came back."""

    number: int
    how: bytes
    """Pickled arguments of `Engine.reading`."""
    pages: Iterator[PageRef | PageResult]
    accepted: bool = False
    """An engine has found nothing wrong with the arguments."""
    opened: set[_Worker] = field(default_factory=set)
    fresh: PageRef | PageResult | None = None
    """The next page."""
    exhausted: bool = False
    again: deque[_Page] = field(default_factory=deque)
    """Pages given back by dead workers."""
    held: dict[int, tuple[_Worker, _Page]] = field(default_factory=dict)
    """Pages handed out, by ticket."""
    tickets: int = 0
    convicted: list[PageResult] = field(default_factory=list)
    """Kept back until a page is finished: where every worker dies whatever it does, no page is to blame."""
    events: queue.SimpleQueue[PageResult | Exception | None] = field(default_factory=queue.SimpleQueue)
    """Results; why the arguments were refused; None where something else has changed."""


class Fleet:
    """Reads pages with one model on several devices, like an `Engine` on one.

    Use it as a context manager, or call `close`.
    """

    def __init__(
        self, model: str, workers: SequenceOf[tuple[str, dict[str, Any], dict[str, str], float]]
    ) -> None:
        """Begin a process for each (device, options of its engine, environment, seconds in which a step ends), and wait
        until all have loaded the model.
        """
        self.model = model
        self._workers = [_Worker(*worker) for worker in workers]
        self._lock = threading.Lock()
        self._readings: dict[int, _Reading] = {}
        self._calls = 0
        self._closed = False
        self._pid = os.getpid()
        self._started: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._keepers = [
            threading.Thread(target=self._keep, args=(worker,), name=f"pagemill-{worker.device}", daemon=True)
            for worker in self._workers
        ]
        try:
            for keeper in self._keepers:
                keeper.start()
            for _ in self._workers:
                if (error := self._started.get()) is not None:
                    raise error
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_pretrained(
        cls,
        name: str = "pagemill-tiny",
        *,
        devices: SequenceOf[str],
        stall_seconds: float | None = None,
        **options: Any,
    ) -> Fleet:
        """Load a model once for each of `devices`, as in `["cuda:0", "cuda:1"]`; the same device may stand there twice.

        `options` are the fields of `EngineConfig` but `device`, and hold for each engine. Where they are not given, the cores
        are shared out among the engines (`num_threads`, `prepare_threads`), and the memory of a device among those on it
        (`kv_cache_fraction`). Packed weights on disk are mapped by all; engines that find none pack them each for itself.

        An engine that has work and ends no step in `stall_seconds`, at least 5, hangs: its process is ended, and treated as one
        that died. By default 300 on a GPU, 3600 on a CPU; no step may take as long. Ten times that is given until a process has
        read its first page, for compiling. `math.inf` waits for ever.
        Raises what `Engine.from_pretrained` raises, of the first engine that cannot start.
        """
        if isinstance(devices, str) or not devices or not all(isinstance(d, str) and d for d in devices):
            raise ConfigError(
                f"devices should be a list of names as in ['cuda:0', 'cuda:1'], got {devices!r}"
            )
        if "device" in options:
            raise ConfigError("device and devices exclude each other")
        if stall_seconds is not None and not stall_seconds >= 5:
            raise ConfigError(f"stall_seconds should be at least 5, got {stall_seconds!r}")
        cores = len(os.sched_getaffinity(0))
        share = max(1, cores // len(devices))
        defaults = EngineConfig()
        own = {
            "num_threads": share,
            "prepare_threads": min(share, defaults.prepare_threads),
        } | {option: value for option, value in options.items() if value is not None}
        workers = []
        for device in devices:
            inside, environment = _environment(device)
            fraction = {"kv_cache_fraction": default_fraction(device) / devices.count(device)}
            patience = stall_seconds or default_stall_seconds(device)
            workers.append((device, {**fraction, **own, "device": inside}, environment, patience))
        return cls(name, workers)

    def read(
        self,
        inputs: Inputs,
        *,
        params: SamplingParams | None = None,
        dpi: float | None = None,
        resolution: Resolution = "auto",
        crop: bool = False,
        draft_text: Callable[[npt.NDArray[np.uint8]], str] | None = None,
        skip: Container[tuple[str, int]] = (),
        salt: str = "",
    ) -> Iterator[PageResult]:
        """Read pages as `Engine.read` does, with the same results, whichever engine reads which page.

        Two things are each engine's own: exact duplicates are answered without the model where both came to the
        same engine, and drafts come from the pages that this engine has read. `draft_text` is called in the engines'
        processes: it must be a function that can be imported there by name.

        A page that ends processes gives a result with status "error". Raises what `Engine.read` raises, at once; and
        DeviceError, while reading, when no engine is left: the pages not yielded by then were not read.
        """
        how = {
            "params": params,
            "dpi": dpi,
            "resolution": resolution,
            "crop": crop,
            "draft_text": draft_text,
            "salt": salt,
        }
        try:
            pickled = pickle.dumps(how)
        except Exception as error:  # pickle raises nearly anything
            raise ConfigError(
                f"the engines' processes cannot be sent what they should do ({sentence(error)})"
            ) from None
        pages = find_pages(inputs, skip, self.model)
        with self._lock:
            self._calls += 1
            reading = self._readings[self._calls] = _Reading(self._calls, pickled, pages)
        try:
            while not reading.accepted:
                with self._lock:
                    self._check()
                    if (worker := next((w for w in self._workers if w.ready), None)) is not None:
                        _open(worker, reading)
                if isinstance(event := reading.events.get(), Exception):
                    raise event
        except BaseException:
            self._cancel(reading)
            raise
        return self._results(reading)

    def _results(self, reading: _Reading) -> Iterator[PageResult]:
        try:
            while True:
                self._hand_out(reading)
                with self._lock:
                    if reading.events.empty():
                        if reading.exhausted and not (reading.fresh or reading.again or reading.held):
                            break
                        self._check()
                event = reading.events.get()
                if isinstance(event, PageResult):
                    yield event
            yield from reading.convicted
        finally:
            self._cancel(reading)

    def describe(self) -> dict[str, Any]:
        """What the engines are (`Engine.describe`): places and memory added up, and each process by its device."""
        with self._lock:
            facts = [worker.facts for worker in self._workers]
            processes = [{"device": worker.device, "pid": worker.pid} for worker in self._workers]
        both = dict(facts[0])
        both |= {name: sum(each[name] for each in facts) for name in _SUMMED}
        both["device"] = ",".join(worker.device for worker in self._workers)
        both["load_seconds"] = max(each["load_seconds"] for each in facts)
        return {**both, "processes": processes}

    def stats(self, *, restart_peak: bool = False) -> EngineStats:
        """What the engines have done, added up (`pagemill.stats.total`). One begun anew counts from then on."""
        answers: list[queue.SimpleQueue[EngineStats | None]] = []
        with self._lock:
            for worker in self._workers:
                if worker.ready:
                    worker.asked.append(queue.SimpleQueue())
                    answers.append(worker.asked[-1])
                    worker.send("stats", restart_peak)
        return total([stats for answer in answers if (stats := answer.get()) is not None])

    def close(self) -> None:
        """Cancel what runs and end the engines' processes."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                _hang_up(worker)
        for keeper in self._keepers:
            if keeper.ident is not None:
                keeper.join()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The callers' threads.

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise RequestError("a fleet does not survive a fork; make one in each process")
        if self._closed:
            raise RequestError("the engines are closed")
        if not any(worker.alive for worker in self._workers):
            why = "; ".join(f"{worker.device}: {worker.failure}" for worker in self._workers)
            raise DeviceError(f"no engine is left ({why}); the pages that were not finished were not read")

    def _hand_out(self, reading: _Reading) -> None:
        """Give pages to whoever has room, but no more ahead of the caller than all engines hold."""
        most = sum(worker.room for worker in self._workers)
        while len(reading.held) + reading.events.qsize() < most:
            if reading.fresh is None and not reading.exhausted:
                reading.fresh = next(reading.pages, None)
                reading.exhausted = reading.fresh is None
            if isinstance(reading.fresh, PageResult):  # it cannot be listed
                reading.events.put(reading.fresh)
                reading.fresh = None
                continue
            with self._lock:
                if not self._hand(reading):
                    return

    def _hand(self, reading: _Reading) -> bool:
        """Give one page to the worker that holds fewest and may take it; False where there is no such worker or page."""
        holds = Counter(worker for worker, _ in reading.held.values())
        strikes = Counter[_Worker]()
        for worker, held in reading.held.values():
            strikes[worker] = max(strikes[worker], held.strikes)
        ready = [w for w in self._workers if w.ready and holds[w] < w.room]
        for worker in sorted(ready, key=holds.__getitem__):
            page = next((p for p in reading.again if strikes[worker] + p.strikes <= 2), None)
            if page is not None:
                reading.again.remove(page)
            elif isinstance(reading.fresh, PageRef):
                page, reading.fresh = _Page(reading.fresh), None
            else:
                continue
            _open(worker, reading)
            reading.tickets += 1
            reading.held[reading.tickets] = worker, page
            worker.send("page", reading.number, reading.tickets, page.ref)
            return True
        return False

    def _cancel(self, reading: _Reading) -> None:
        with self._lock:
            self._readings.pop(reading.number, None)
            for worker in reading.opened:
                worker.send("cancel", reading.number)

    # One thread for each worker: begins its process, listens to it, and begins it anew.

    def _keep(self, worker: _Worker) -> None:
        while worker.alive:
            try:
                failure = self._live(worker)
            except Exception as error:  # no more processes or descriptors
                failure, worker.alive = DeviceError(sentence(error)), False
            if not worker.facts:
                named = str(failure) if worker.device in str(failure) else f"{worker.device}: {failure}"
                self._started.put(type(failure)(named))
            self._end(worker, str(failure))

    def _live(self, worker: _Worker) -> PagemillError:
        """Run one process from its beginning to its end; return how it ended, or why it could not begin or go on."""
        ours, theirs = socket.socketpair()
        with ours, theirs, Connection(os.dup(ours.fileno())) as pipe:
            process = subprocess.Popen(
                [sys.executable, "-c", _WORKER, str(theirs.fileno()), *sys.path],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # standard output is for records
                env=worker.environment,
                start_new_session=True,
            )
            theirs.close()
            refused: PagemillError | None = None
            try:
                with self._lock:
                    worker.pid, worker.socket, worker.pipe, worker.finished = process.pid, ours, pipe, 0
                    worker.turn, worker.proven = time.monotonic() if worker.facts else None, False
                    if self._closed:
                        _hang_up(worker)
                worker.send(self.model, worker.options)
                while refused is None:
                    if pipe.poll(max(0.0, min(worker.patience, _LONGEST_POLL))):
                        refused = self._hear(worker, *pipe.recv())
                    elif worker.patience <= 0:
                        refused = DeviceError(_how_it_hung(worker))
            except (EOFError, OSError):  # also in the middle of a message
                pass
            finally:
                with self._lock:
                    _hang_up(worker)
                    worker.socket = worker.pipe = None
                    was_ready = worker.ready
                    worker.alive = was_ready and not self._closed
                    worker.ready = False
                try:  # one that is still loading has nothing to wind up, and may be long in hearing of it
                    process.wait(_SECONDS_TO_END if was_ready else 0)
                except subprocess.TimeoutExpired:
                    process.kill()
                    try:
                        process.wait(_SECONDS_TO_END)
                    except subprocess.TimeoutExpired:  # the driver does not let go of it, nor of the device
                        worker.alive = False
                        why = f" ({refused})" if refused else ""
                        refused = DeviceError(f"the engine's process {process.pid} cannot be ended{why}")
        return refused or DeviceError(_how_it_ended(process.returncode))

    def _hear(self, worker: _Worker, kind: str, *message: Any) -> PagemillError | None:
        """Take one message; return why the engine cannot start or go on, if it says so."""
        with self._lock:
            if kind == "failed":
                return message[0]  # type: ignore[no-any-return]
            if kind == "ready":
                if not worker.facts:
                    self._started.put(None)
                worker.facts, worker.ready, worker.turn = message[0], True, time.monotonic()
                for call in self._readings.values():
                    call.events.put(None)
            elif kind == "turn":
                worker.turn = time.monotonic()
            elif kind == "stats":
                worker.asked.popleft().put(message[0])
            elif message[0] not in self._readings:
                pass  # the caller has left
            elif kind == "opened":
                reading = self._readings[message[0]]
                reading.accepted = reading.accepted or message[1] is None
                reading.events.put(message[1])
            else:
                reading = self._readings[message[0]]
                del reading.held[message[1]]
                worker.finished += 1
                worker.proven = worker.proven or message[2].tokens.output > 0
                for result in (message[2], *reading.convicted):
                    reading.events.put(result)
                reading.convicted.clear()
        return None

    def _end(self, worker: _Worker, failure: str) -> None:
        """Take back what a dead worker held, and decide whether it is begun anew."""
        with self._lock:
            worker.fruitless = 0 if worker.finished else worker.fruitless + 1
            worker.alive = worker.alive and worker.fruitless < _FRUITLESS_LIVES
            worker.failure = failure
            while worker.asked:
                worker.asked.popleft().put(None)
            for call in self._readings.values():
                call.opened.discard(worker)
                tickets = [ticket for ticket, (holder, _) in call.held.items() if holder is worker]
                pages = [call.held.pop(ticket)[1] for ticket in tickets]
                struck = [page for page in pages if page.strikes]
                for page in pages:
                    if page.strikes and len(struck) == 1:
                        error = f"the engine's process died with this page again and again ({failure})"
                        call.convicted.append(failed_page(page.ref.source, page.ref.page, error, self.model))
                    else:
                        page.strikes = min(page.strikes + 1, 2)
                        call.again.append(page)
                call.events.put(None)


def _open(worker: _Worker, reading: _Reading) -> None:
    if worker not in reading.opened:
        reading.opened.add(worker)
        worker.send("open", reading.number, reading.how)


def _hang_up(worker: _Worker) -> None:
    if worker.socket is not None:
        with suppress(OSError):  # it has done so itself
            worker.socket.shutdown(socket.SHUT_RDWR)


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"the engine's process ended with exit code {code}"
    with suppress(ValueError):
        name = signal.Signals(-code).name
        memory = ", as when memory runs out" if name == "SIGKILL" else ""
        return f"the engine's process was ended by {name}{memory}"
    return f"the engine's process was ended by signal {-code}"


def _how_it_hung(worker: _Worker) -> str:
    if not worker.ready:
        return f"the engine's process did not load the model within {worker.stall_seconds * _SLOW_START:g} seconds"
    seconds = time.monotonic() - (worker.turn or 0.0)
    return f"the engine hung: it ended no step in {seconds:.0f} seconds"


def _environment(device: str) -> tuple[str, dict[str, str]]:
    """Return the device's name in its own process, and that process's environment: it sees no GPU but its own."""
    # Torch's OpenMP threads would otherwise spin on the cores of the native kernels; read once, when torch is loaded.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    kind, _, number = device.partition(":")
    if kind != "cuda" or not (number or "0").isdecimal():
        return device, environment
    index = int(number or 0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(index + 1)]
    if index >= len(names):
        raise ConfigError(f"there is no device {device}: CUDA_VISIBLE_DEVICES names {len(names)} of them")
    if visible != "":
        environment["CUDA_VISIBLE_DEVICES"] = names[index].strip()
    return "cuda:0", environment


# The worker.


def serve(descriptor: int) -> None:
    """Be a worker at the other end of a socket: load the model, read pages; end with the socket. Never returns."""
    pipe = Connection(descriptor)
    commands: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
    replies: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
    threading.Thread(target=_or_exit, args=(lambda: commands.put(pipe.recv()),), daemon=True).start()
    threading.Thread(target=_or_exit, args=(lambda: pipe.send(replies.get()),), daemon=True).start()
    model, options = commands.get()
    try:
        engine = Engine.from_pretrained(model, **options)
    except Exception as error:
        replies.put(("failed", _portable(error)))
        threading.Event().wait()  # until the parent hangs up
        raise
    replies.put(("ready", engine.describe()))
    engine.on_turn = _report_turns(replies)
    readings = {}
    while True:
        kind, *rest = commands.get()
        if kind == "stats":
            replies.put(("stats", engine.stats(restart_peak=rest[0])))
            continue
        number = rest[0]
        if kind == "open":
            refused = None
            try:
                readings[number] = engine.reading(**pickle.loads(rest[1]))
            except Exception as error:
                refused = _portable(error)
            replies.put(("opened", number, refused))
        elif kind == "page":
            start, _ = readings[number]
            start(rest[2], partial(_deliver, replies, number, rest[1]))
        elif number in readings:
            _, cancel = readings.pop(number)
            cancel()


def _deliver(
    replies: queue.SimpleQueue[tuple[Any, ...]], number: int, ticket: int, result: PageResult | DeviceError
) -> None:
    if isinstance(
        result, DeviceError
    ):  # the parent hangs up, and so ends this process: its pages are read by another
        replies.put(("failed", result))
    else:
        replies.put(("page", number, ticket, result))


def _report_turns(replies: queue.SimpleQueue[tuple[Any, ...]]) -> Callable[[], None]:
    """Return what tells the parent that the engine's thread has come round, not more often than it needs to know."""
    last = 0.0

    def report() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_TURNS:
            last = now
            replies.put(("turn",))

    return report


def _or_exit(step: Callable[[], None]) -> None:
    """Repeat `step` until the parent is gone, and then end the process, whatever its other threads do."""
    try:
        while True:
            step()
    except (EOFError, OSError):
        os._exit(0)


def _portable(error: Exception) -> PagemillError:
    return error if isinstance(error, PagemillError) else DeviceError(sentence(error))
