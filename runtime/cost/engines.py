"""Engines that can be compared, behind one small interface: pages in, answers out.

    NAME=pagemill-tiny                            pagemill itself: a model's name, a folder, or a Hugging Face id
    NAME=openai:http://host:8000/v1#model         an OpenAI-compatible endpoint, such as a vLLM server
    NAME=openai:https://host/v1?key_env=VAR#model the same with a key, from the environment variable VAR
    NAME=command:tesseract {image} - -l por       a program that prints a page's text, given the path of a PNG
    NAME=python:module:function                   a callable: RGB pixels uint8 [H, W, 3] to text

Engines in this process read a page or two before they are measured, so that loading does not count; a program's start does.
A page's failure is its own and becomes an answer with `error`. What no page can be read without (an endpoint that is not there, a
program that is missing) is an `EngineError`, and costs the engine alone. Nothing that an engine says is trusted: answers are
bounded in size and time.
"""

from __future__ import annotations

import base64
import http.client
import importlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol
from urllib.parse import SplitResult, parse_qs, urlsplit

import numpy as np
from PIL import Image

from pagemill.cost.bench import drive, measure, percentiles
from pagemill.cost.workload import Settings, Workload
from pagemill.decode.page import parse_page
from pagemill.engine import Engine
from pagemill.errors import ConfigError, PagemillError, printable
from pagemill.model.prompt import page_messages, read_profile
from pagemill.pages.source import PageRef, load_page
from pagemill.results import PageResult

_WARMUP = 2  # pages that pagemill reads before it is measured
_CONNECT_TIMEOUT = 10.0  # seconds: a connection is there by then, or never
MAX_ANSWER_BYTES = 16_000_000
"""More is no page's text."""
_RETRIES = 3
_LONGEST_WAIT = 60.0
_MAX_LOST = 5  # pages in a row that an endpoint could not be reached for
_BUSY = (408, 409, 429, 500, 502, 503, 504)
_REFUSED = (401, 402, 403, 404, 405)  # the same for every page
_NAMED = re.compile(r"([^=:/{}]{1,60})=(.+)", re.DOTALL)


class EngineError(PagemillError):
    """An engine cannot read any page, or no more of them; says why."""


class _PageFailed(PagemillError):
    """One page cannot be read; says why."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine made of one page. Times are seconds from the start of its run."""

    source: str
    page: int
    started: float
    finished: float
    raw: str | None = None
    """What the engine wrote; None where it failed."""
    record: PageResult | None = None
    """Where the engine is pagemill."""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    error: str | None = None
    """One sentence."""


@dataclass(frozen=True)
class ReadOptions:
    """How every engine reads."""

    concurrency: int | None = None
    """Pages in an engine at a time; None: 32 for pagemill, 8 for an endpoint, one a core for a program, 1 for a callable."""
    max_new_tokens: int | None = None
    """None takes what the model's profile says."""
    dpi: float = 150.0
    """Of PDF pages, for all engines but pagemill, which knows what its models like."""
    timeout: float = 300.0
    """Seconds for one page of an endpoint or a program."""
    device: str = "cpu"
    dtype: str = "auto"
    quantize: str = "none"
    """Of pagemill's engines, as `device` and `dtype`."""
    backoff: float = 1.0
    """Seconds before an endpoint that is busy is asked again; doubled every time."""


@dataclass(frozen=True)
class Outcome:
    """What came of reading pages."""

    answers: list[Answer]
    """One for every page, in order of completion."""
    numbers: dict[str, Any]
    """Of the run, as in a result file of `pagemill bench`; what is not known of an engine is missing."""
    error: str | None = None
    """Why the engine was given up before the last page."""


class Reader(Protocol):
    """One engine, opened; a context manager. Opening raises `PagemillError` where it cannot work."""

    kind: str

    def describe(self) -> dict[str, Any]:
        """What the engine is, for the file of results."""

    def run(self, pages: Sequence[PageRef], on_page: Callable[[], None]) -> Outcome:
        """Read pages, calling `on_page` after each. Raises `PagemillError` if the engine can read none of them."""

    def __enter__(self) -> Reader: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True)
class EngineSpec:
    """One engine as the user names it; its parts are checked, whether it is there is not."""

    name: str
    spec: str
    open: Callable[[ReadOptions], Reader] = field(compare=False)


def parse_engine(given: str) -> EngineSpec:
    """Parse `NAME=SPEC`, or `SPEC` alone. Raises `ConfigError` for what can be no engine."""
    named = _NAMED.fullmatch(given.strip())
    name, spec = (named[1].strip(), named[2].strip()) if named else (given.strip(), given.strip())
    name = printable(name)
    kind, _, rest = spec.partition(":")
    if not name or not spec:
        raise ConfigError("--engine should be NAME=SPEC, as in tiny=pagemill-tiny")
    if kind == "openai":
        endpoint = _endpoint(rest, given)
        return EngineSpec(name, spec, lambda options: Endpoint(endpoint, options))
    if kind == "command":
        try:
            arguments = shlex.split(rest)
        except ValueError as error:
            raise ConfigError(f"--engine {printable(given)}: {error}") from None
        if not arguments or not any("{image}" in argument for argument in arguments[1:]):
            raise ConfigError(
                f"--engine {printable(given)}: the command should take the page's file, as {{image}}"
            )
        return EngineSpec(name, spec, lambda options: Command(arguments, options))
    if kind == "python":
        module, _, function = rest.partition(":")
        if not all(part.isidentifier() for part in [*module.split("."), *function.split(".")]):
            raise ConfigError(f"--engine {printable(given)}: a callable is python:MODULE:FUNCTION")
        return EngineSpec(name, spec, lambda options: Function(module, function, options))
    return EngineSpec(name, spec, lambda options: Pagemill(spec, options))


class _Deadline:
    """Calls `end` once `seconds` are over, or when its engine is closed before; `late` tells that it did."""

    def __init__(self, live: set[_Deadline], seconds: float, end: Callable[[], None]) -> None:
        self.late = False
        self._live, self._end = live, end
        self._timer = threading.Timer(seconds, self.expire)
        self._timer.daemon = True

    def expire(self) -> None:
        self.late = True
        self._end()

    def __enter__(self) -> _Deadline:
        self._live.add(self)
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._live.discard(self)


class _Base:
    """Closing ends what runs."""

    def __init__(self) -> None:
        self._live: set[_Deadline] = set()

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for deadline in list(self._live):
            deadline.expire()


class Pagemill(_Base):
    """This engine, with one model; measured as `pagemill bench` does."""

    kind = "pagemill"

    def __init__(self, model: str, options: ReadOptions) -> None:
        super().__init__()
        self.settings = Settings(
            model=model,
            dtype=options.dtype,
            quantize=options.quantize,
            device=options.device,
            concurrency=options.concurrency or Settings.concurrency,
            max_new_tokens=options.max_new_tokens,
        )
        self.engine = Engine.from_pretrained(model, **self.settings.engine_options())

    def describe(self) -> dict[str, Any]:
        """See `Reader`."""
        return self.engine.describe()

    def run(self, pages: Sequence[PageRef], on_page: Callable[[], None]) -> Outcome:
        """See `Reader`."""
        load = Workload([], list(pages), len(pages))
        drive(self.engine, replace(load, pages=min(_WARMUP, len(pages))), self.settings, "warm")
        numbers, seen = measure(self.engine, load, self.settings, "compare", lambda _: on_page())
        answers = [
            Answer(
                page.result.source,
                page.result.page,
                page.arrived,
                page.finished,
                raw=None if page.result.error else page.result.raw,
                record=page.result,
                finish_reason=page.result.finish_reason,
                prompt_tokens=page.result.tokens.prompt,
                output_tokens=page.result.tokens.output,
                error=page.result.error,
            )
            for page in seen
        ]
        return Outcome(answers, numbers)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.engine.close()


class Function(_Base):
    """A Python callable. It cannot be stopped: one that never returns holds the comparison up."""

    kind = "python"

    def __init__(self, module: str, function: str, options: ReadOptions) -> None:
        super().__init__()
        self._name, self._options = f"{module}:{function}", options
        if (here := os.getcwd()) not in sys.path:
            sys.path.append(here)
        try:
            found: Any = importlib.import_module(module)
            for part in function.split("."):
                found = getattr(found, part)
        except Exception as error:  # a module is a program and can fail like one
            raise EngineError(f"{self._name} cannot be imported ({_brief(error)})") from None
        if not callable(found):
            raise EngineError(f"{self._name} is no callable")
        self._function = found

    def describe(self) -> dict[str, Any]:
        """See `Reader`."""
        return {"callable": self._name}

    def run(self, pages: Sequence[PageRef], on_page: Callable[[], None]) -> Outcome:
        """See `Reader`."""
        with suppress(Exception):  # it may load its model now; the page will say what is wrong
            self._ask(pages[0])
        return _one_by_one(self._ask, pages, self._options.concurrency or 1, on_page)

    def _ask(self, page: PageRef) -> Answer:
        rgb = load_page(page, self._options.dpi)
        text = self._function(rgb)
        if not isinstance(text, str):
            raise _PageFailed(f"{self._name} should return text, not {type(text).__name__}")
        return Answer(page.source, page.page, 0.0, 0.0, raw=_bounded(text))


class Command(_Base):
    """A program, run once a page without a shell; what it prints is the page's text."""

    kind = "command"

    def __init__(self, arguments: Sequence[str], options: ReadOptions) -> None:
        super().__init__()
        self._arguments, self._options = list(arguments), options
        if shutil.which(self._arguments[0]) is None:
            raise EngineError(f"there is no program {printable(self._arguments[0])} on this machine")
        self._folder = tempfile.TemporaryDirectory(prefix="pagemill-compare-", ignore_cleanup_errors=True)

    def describe(self) -> dict[str, Any]:
        """See `Reader`."""
        return {"command": shlex.join(self._arguments), "timeout_s": self._options.timeout}

    def run(self, pages: Sequence[PageRef], on_page: Callable[[], None]) -> Outcome:
        """See `Reader`."""
        return _one_by_one(
            self._ask, pages, self._options.concurrency or len(os.sched_getaffinity(0)), on_page
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._folder.cleanup()

    def _ask(self, page: PageRef) -> Answer:
        with tempfile.TemporaryDirectory(dir=self._folder.name) as folder:
            image = os.path.join(folder, "page.png")
            Path(image).write_bytes(_png(page, self._options.dpi))
            arguments = [argument.replace("{image}", image) for argument in self._arguments]
            with open(os.path.join(folder, "errors"), "w+b") as errors:
                text, code = self._run(arguments, errors)
                errors.seek(0, os.SEEK_END)
                errors.seek(max(errors.tell() - 2000, 0))
                said = errors.read().decode("utf-8", "replace").strip().splitlines()
        if code:
            why = f": {printable(said[-1])[:300]}" if said else ""
            raise _PageFailed(f"{printable(arguments[0])} ended with exit code {code}{why}")
        return Answer(page.source, page.page, 0.0, 0.0, raw=text.strip())

    def _run(self, arguments: list[str], errors: io.BufferedRandom) -> tuple[str, int]:
        try:
            process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # so that what it starts ends with it
            )
        except OSError as error:
            raise EngineError(f"{printable(arguments[0])} cannot be run: {error.strerror or error}") from None

        def end() -> None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

        assert process.stdout is not None
        with process.stdout, _Deadline(self._live, self._options.timeout, end) as deadline:
            data = process.stdout.read(MAX_ANSWER_BYTES + 1)
            if len(data) > MAX_ANSWER_BYTES:
                end()
            code = process.wait()
        if deadline.late:
            raise _PageFailed(f"{printable(arguments[0])} took longer than {self._options.timeout:g} s")
        return _bounded(data.decode("utf-8", "replace"), len(data)), code


@dataclass(frozen=True)
class _Address:
    url: SplitResult
    model: str
    key: str | None


def _endpoint(rest: str, given: str) -> _Address:
    """Check an endpoint's address, and take its key from the environment."""

    def refuse(why: str) -> NoReturn:
        raise ConfigError(f"--engine {printable(given)}: {why}") from None

    try:
        url = urlsplit(rest)
        host, _ = url.hostname, url.port
    except ValueError as error:
        refuse(str(error))
    if url.scheme not in ("http", "https") or not host:
        refuse("an endpoint is openai:http://HOST:PORT/v1#MODEL")
    if url.username or url.password:
        refuse("a key should come from an environment variable, as ?key_env=VARIABLE before the #")
    if not url.fragment:
        refuse("the model's name is missing: end the address with #MODEL")
    query = parse_qs(url.query)
    if unknown := sorted(set(query) - {"key_env"}):
        refuse(f"{unknown[0]} is not known; key_env is")
    key = None
    if "key_env" in query:
        variable = query["key_env"][-1]
        if not (key := os.environ.get(variable, "").strip()):
            refuse(f"the environment has no {variable}, which should hold the key")
        if not key.isascii() or not key.isprintable():
            refuse(f"what {variable} holds is no key")
    return _Address(url._replace(query="", fragment=""), url.fragment, key)


class Endpoint(_Base):
    """An OpenAI-compatible chat endpoint; the page goes as a data URI, the prompt is the one known for the model."""

    kind = "openai"

    def __init__(self, address: _Address, options: ReadOptions) -> None:
        super().__init__()
        self._address, self._options = address, options
        self._profile = read_profile(Path(address.model), address.model)
        self._lock = threading.Lock()
        self._reached = False
        self._lost = 0

    def describe(self) -> dict[str, Any]:
        """See `Reader`."""
        return {
            "endpoint": self._address.url.geturl(),
            "model": self._address.model,
            "max_new_tokens": self._options.max_new_tokens or self._profile.max_new_tokens,
            "timeout_s": self._options.timeout,
        }

    def run(self, pages: Sequence[PageRef], on_page: Callable[[], None]) -> Outcome:
        """See `Reader`."""
        return _one_by_one(self._ask, pages, self._options.concurrency or 8, on_page)

    def _ask(self, page: PageRef) -> Answer:
        body = json.dumps(self._question(page)).encode()
        for attempt in range(_RETRIES + 1):
            last = attempt == _RETRIES
            pause = min(self._options.backoff * 2**attempt, _LONGEST_WAIT)
            try:
                status, reason, retry_after, data = self._post(body)
            except _Unreachable as error:
                with self._lock:
                    self._lost += last
                    if not self._reached or self._lost >= _MAX_LOST:
                        raise EngineError(f"{self._where} cannot be reached ({error})") from None
                if last:
                    raise _PageFailed(f"{self._where} cannot be reached ({error})") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                if last:
                    raise _PageFailed(f"{self._where} broke off the connection ({_brief(error)})") from None
            else:
                with self._lock:
                    self._reached, self._lost = True, 0
                if status == 200:
                    return self._answer(page, data)
                said = f"{self._where} answers {status} {printable(reason)[:60]}{_message(data)}"
                if status in _REFUSED:
                    raise EngineError(said)
                if status not in _BUSY or last:
                    raise _PageFailed(said)
                if retry_after is not None:
                    pause = min(retry_after, _LONGEST_WAIT)
            time.sleep(pause)
        raise AssertionError

    @property
    def _where(self) -> str:
        return printable(self._address.url.geturl())

    def _question(self, page: PageRef) -> dict[str, Any]:
        image = base64.b64encode(_png(page, self._options.dpi)).decode()
        part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}
        messages = page_messages(self._profile)
        for message in messages:
            if isinstance(content := message["content"], list):
                message["content"] = [part if item["type"] == "image" else item for item in content]
        return {
            "model": self._address.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": self._options.max_new_tokens or self._profile.max_new_tokens,
        }

    def _post(self, body: bytes) -> tuple[int, str, float | None, bytes]:
        """Send one request; returns status, reason, seconds to wait if the server says so, and the body.

        A timer ends the connection at the deadline, whatever part of an answer drips in. Redirects are not followed: they
        would take the key elsewhere.
        """
        url, timeout = self._address.url, self._options.timeout
        connection = _connection(url, min(timeout, _CONNECT_TIMEOUT))
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._address.key is not None:
            headers["Authorization"] = f"Bearer {self._address.key}"
        try:
            connection.connect()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise _Unreachable(_brief(error)) from None
        sock = connection.sock  # the connection forgets it before the answer is read
        sock.settimeout(timeout)

        def end() -> None:
            with suppress(OSError):  # past the TLS layer, which another thread is using
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

        with closing(connection), _Deadline(self._live, timeout, end) as deadline:
            try:
                connection.request("POST", f"{url.path.rstrip('/')}/chat/completions", body, headers)
                response = connection.getresponse()
                data = response.read(MAX_ANSWER_BYTES + 1)
                if response.length and len(data) <= MAX_ANSWER_BYTES:
                    raise http.client.IncompleteRead(data, response.length)
            except (OSError, http.client.HTTPException, ValueError) as error:
                if not deadline.late and not isinstance(error, TimeoutError):
                    raise
                deadline.late = True
        if deadline.late:  # the end of the connection may have looked like the end of the answer
            raise _PageFailed(f"{self._where} took longer than {timeout:g} s")
        wait = response.getheader("Retry-After", "")
        seconds = float(wait) if wait.isdecimal() and len(wait) < 6 else None
        return response.status, response.reason, seconds, data

    def _answer(self, page: PageRef, data: bytes) -> Answer:
        _bounded("", len(data))
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            raise _PageFailed(f"{self._where} answers what is not JSON") from None
        choice = _at(value, "choices", 0)
        content = _at(choice, "message", "content")
        if isinstance(content, list):  # parts
            texts = [_at(part, "text") for part in content]
            content = "".join(text for text in texts if isinstance(text, str))
        if not isinstance(content, str):
            raise _PageFailed(f"{self._where} answers without a text{_message(data)}")
        reason = _at(choice, "finish_reason")
        return Answer(
            page.source,
            page.page,
            0.0,
            0.0,
            raw=content,
            finish_reason=reason if isinstance(reason, str) else None,
            prompt_tokens=_count(_at(value, "usage", "prompt_tokens")),
            output_tokens=_count(_at(value, "usage", "completion_tokens")),
        )


class _Unreachable(Exception):
    """No connection could be made."""


def _connection(url: SplitResult, timeout: float) -> http.client.HTTPConnection:
    """A connection to an address, through the proxy that the environment names for https."""
    host = url.hostname or ""
    if url.scheme == "http":
        return http.client.HTTPConnection(host, url.port, timeout=timeout)
    proxy = urlsplit(urllib.request.getproxies().get("https", ""))
    if not proxy.hostname or urllib.request.proxy_bypass(host):
        return http.client.HTTPSConnection(host, url.port, timeout=timeout)
    connection = http.client.HTTPSConnection(proxy.hostname, proxy.port, timeout=timeout)
    connection.set_tunnel(host, url.port or 443)
    return connection


def _at(value: Any, *path: str | int) -> Any:
    """Follow a path into JSON; None where it leads nowhere."""
    for step in path:
        if isinstance(value, dict) and isinstance(step, str):
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and len(value) > step:
            value = value[step]
        else:
            return None
    return value


def _message(data: bytes) -> str:
    """The reason that a server gives in its answer."""
    try:
        value = json.loads(data[:100_000])
    except (ValueError, RecursionError):
        return ""
    found = _at(value, "error", "message") or _at(value, "message") or _at(value, "error")
    return f": {' '.join(printable(found).split())[:300]}" if isinstance(found, str) else ""


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 40 else None


def _bounded(text: str, num_bytes: int | None = None) -> str:
    if (len(text) if num_bytes is None else num_bytes) > MAX_ANSWER_BYTES:
        raise _PageFailed(f"the answer is larger than {MAX_ANSWER_BYTES // 1_000_000} MB: no page's text")
    return text


def _png(page: PageRef, dpi: float) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(load_page(page, dpi))).save(data, "PNG", compress_level=1)
    return data.getvalue()


def _brief(error: BaseException) -> str:
    text = str(error.strerror if isinstance(error, OSError) and error.strerror else error)
    return printable(" ".join(f"{type(error).__name__}: {text}".split()))[:300]


def _one_by_one(
    ask: Callable[[PageRef], Answer], pages: Sequence[PageRef], concurrency: int, on_page: Callable[[], None]
) -> Outcome:
    """Read pages with an engine that takes one at a time, and count."""
    answers: list[Answer] = []
    given_up: str | None = None
    try:
        for answer in _each(ask, pages, concurrency):
            answers.append(answer)
            on_page()
    except EngineError as error:
        if not any(answer.error is None for answer in answers):
            raise
        given_up = str(error)
        known = {(answer.source, answer.page) for answer in answers}
        last = max(answer.finished for answer in answers)
        left = [page for page in pages if (page.source, page.page) not in known]
        answers += [Answer(page.source, page.page, last, last, error=given_up) for page in left]
    return Outcome(answers, _count_up(answers), given_up)


def _count_up(answers: Sequence[Answer]) -> dict[str, Any]:
    """The numbers of a run that can be told from its answers."""
    good = [answer for answer in answers if answer.error is None]
    seconds = max((answer.finished for answer in answers), default=0.0)
    tokens = {kind: [getattr(answer, f"{kind}_tokens") for answer in good] for kind in ("prompt", "output")}
    return {
        "pages": len(good),
        "failed": len(answers) - len(good),
        "seconds": seconds,
        "pages_per_s": len(good) / seconds if seconds else 0.0,
        "tokens_per_s": {
            kind: sum(counts) / seconds for kind, counts in tokens.items() if counts and None not in counts
        },
        "latency_s": {"page": percentiles([answer.finished - answer.started for answer in good])},
        "timeline": [
            {
                "source": answer.source,
                "page": answer.page,
                "status": "ok" if answer.error is None else "error",
                "arrived": round(answer.started, 4),
                "scheduled": round(answer.started, 4),
                "first_token": None,
                "finished": round(answer.finished, 4),
                "loops": 0,
            }
            for answer in sorted(answers, key=lambda answer: answer.started)
        ],
    }


def _each(ask: Callable[[PageRef], Answer], pages: Sequence[PageRef], concurrency: int) -> Iterator[Answer]:
    """Ask for pages one at a time, several side by side; yields in order of completion."""
    begun = time.perf_counter()
    stop = threading.Event()
    why: list[EngineError] = []  # pages end in any order: the first to fail knows the reason

    def one(page: PageRef) -> Answer:
        started = time.perf_counter() - begun
        if stop.is_set():
            raise EngineError("it was given up")
        try:
            answer = ask(page)
        except EngineError as error:
            why.append(error)
            stop.set()
            raise
        except Exception as error:  # one page's surprise must not cost another
            sentence = str(error) if isinstance(error, PagemillError) else _brief(error)
            answer = Answer(page.source, page.page, 0.0, 0.0, error=sentence)
        return replace(answer, started=started, finished=time.perf_counter() - begun)

    left = iter(pages)
    pending: set[Future[Answer]] = set()
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="pagemill-compare")
    try:
        while True:
            while len(pending) < concurrency and (page := next(left, None)) is not None:
                pending.add(pool.submit(one, page))
            if not pending:
                return
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done if not isinstance(future.exception(), EngineError))
            if why:
                raise why[0]
    finally:
        stop.set()
        pool.shutdown(wait=not pending, cancel_futures=True)  # closing the engine ends what still runs


def fields_of(answer: Answer) -> dict[str, str | None]:
    """The page's fields, tolerantly: those of a page's JSON, else all of it is text."""
    record = answer.record
    if record is not None:
        return {
            "header": record.header,
            "margin": record.margin,
            "footer": record.footer,
            "text": record.text,
        }
    return parse_page(answer.raw or "")._asdict()
