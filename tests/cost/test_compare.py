"""Engines side by side: nothing that one of them says or does costs more than its own page, or itself."""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
import time
from concurrent.futures import wait
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from pagemill.cli import app
from pagemill.cost import engines
from pagemill.cost.compare import Pages, compare, parse_prices, select_pages, show
from pagemill.cost.engines import EngineError, ReadOptions, parse_engine
from pagemill.errors import ConfigError, PageError, PagemillError
from pagemill.pages.source import PageRef
from pagemill.score import ScoreError

SAMPLES = Path(__file__).parents[2] / "bench" / "pages"
QUICK = ReadOptions(timeout=1.0, backoff=0.01)
TEXTS = ["primeira página do livro", "segunda página do livro", "terceira e última página"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pages, of one gray each, and their truth."""
    with open(tmp_path / "truth.jsonl", "w", encoding="utf-8") as truth:
        for i, text in enumerate(TEXTS):
            Image.new("RGB", (40, 20), (i, i, i)).save(tmp_path / f"p{i}.png")
            print(json.dumps({"file": f"p{i}.png", "truth": {"header": None, "text": text}}), file=truth)
    return tmp_path


@pytest.fixture
def pages(folder: Path) -> Pages:
    return select_pages([str(folder)], str(folder / "truth.jsonl"))


def which(rgb: np.ndarray) -> int:
    return int(rgb[0, 0, 0])


def right(rgb: np.ndarray) -> str:
    return TEXTS[which(rgb)]


def looks_at_shape(rgb: np.ndarray) -> str:
    assert rgb.shape == (20, 40, 3)
    assert rgb.dtype == np.uint8
    return json.dumps({"header": None, "text": TEXTS[which(rgb)]})


def fails_on_one(rgb: np.ndarray) -> str:
    if which(rgb) == 1:
        raise RuntimeError("a\nsurprise")
    return right(rgb)


def returns_bytes(rgb: np.ndarray) -> bytes:
    return b"text"


def python(name: str) -> engines.EngineSpec:
    return parse_engine(f"{name}=python:{__name__}:{name}")


# Scores and prices.


def test_engines_side_by_side(pages: Pages) -> None:
    prices = parse_prices(["right=0.002/page", "3600"], ["right", "fails_on_one"])
    specs = [python("right"), python("fails_on_one")]
    seen: list[int] = []
    result = compare(pages, specs, QUICK, prices=prices, on_page=lambda: seen.append(1))
    good, bad = result["runs"]
    assert len(seen) == 6
    assert (good["quality"]["benchmark_score"], good["pages"], good["failed"]) == (1.0, 3, 0)
    assert good["usd_per_million_pages"] == pytest.approx(2000)
    assert good["error"] is None
    # A page that failed counts as an empty one, and says why.
    assert bad["quality"]["benchmark_score"] == pytest.approx(2 / 3)
    assert bad["quality"]["failed"] == pytest.approx(1 / 3)
    assert [page["error"] for page in bad["by_page"]] == [None, "RuntimeError: a surprise", None]
    assert bad["usd_per_page"] == pytest.approx(bad["seconds"] / 2)
    assert result["kind"] == "compare"
    json.dumps(result, allow_nan=False)


def test_the_result_file_can_be_reported(pages: Pages, tmp_path: Path) -> None:
    resultfile = pytest.importorskip("pagemill.cost.resultfile")
    specs = [python("right"), parse_engine("gone=command:/no/such/program {image}")]
    result = compare(pages, specs, QUICK, prices=parse_prices(["0.002/page"], ["right", "gone"]))
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    (file,) = resultfile.load([str(path)])
    assert [(run.name, run.score, run.usd_per_million) for run in file.runs] == [
        ("right", 1.0, pytest.approx(2000)),
        ("gone", None, None),
    ]
    assert len(file.runs[0].timeline) == 3


def test_fields_and_plain_text_are_on_equal_terms(pages: Pages) -> None:
    runs = compare(pages, [python("looks_at_shape"), python("right")], QUICK)["runs"]
    assert [run["quality"]["benchmark_score"] for run in runs] == [1.0, 1.0]


def test_the_first_reason_is_told_whatever_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(page: PageRef) -> engines.Answer:
        raise EngineError("the reason")

    monkeypatch.setattr(engines, "wait", lambda pending, return_when: wait(pending))  # all end at once
    with pytest.raises(EngineError, match="the reason"):
        list(engines._each(ask, [PageRef(f"p{i}.png", 1) for i in range(64)], 64))


def test_an_engine_that_cannot_be_used_costs_itself_alone(pages: Pages) -> None:
    given = [
        "endpoint=openai:http://127.0.0.1:9/v1#model",
        "program=command:/no/such/program {image}",
        "module=python:no_such_module:read",
        "name=python:json:no_such_name",
        "number=python:sys:maxsize",
        "model=./no/such/model",
    ]
    specs = [parse_engine(text) for text in given] + [python("right")]
    result = compare(pages, specs, QUICK)
    *broken, good = result["runs"]
    assert good["quality"]["benchmark_score"] == 1.0
    for run in broken:
        assert run["quality"] is None
        assert run["error"]
        assert "\n" not in run["error"]
        assert run["failed"] == 3
    assert "127.0.0.1:9/v1 cannot be reached" in broken[0]["error"]
    show(result)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "NAME=SPEC"),
        ("x=openai:ftp://host#m", "openai:http"),
        ("x=openai:http://host:port/v1#m", "ort"),
        ("x=openai:http://host/v1", "#MODEL"),
        ("x=openai:http://me:secret@host/v1#m", "environment variable"),
        ("x=openai:http://host/v1?key=abc#m", "key is not known"),
        ("x=openai:http://host/v1?key_env=NO_SUCH_VARIABLE#m", "no NO_SUCH_VARIABLE"),
        ("x=command:tesseract page.png -", "{image}"),
        ("x=command:{image}", "{image}"),
        ("x=command:cat '{image}", "quotation"),
        ("x=python:module", "python:MODULE:FUNCTION"),
        ("x=python:a b:c", "python:MODULE:FUNCTION"),
    ],
)
def test_specs_that_cannot_be_meant(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_engine(text)


def test_names_of_engines() -> None:
    names = ["pagemill-tiny", "a b=./x=y", "command:cat -o a=b {image}", "é=openai:http://h/v1#a=b"]
    parsed = [parse_engine(text) for text in names]
    assert [(spec.name, spec.spec) for spec in parsed] == [
        ("pagemill-tiny", "pagemill-tiny"),
        ("a b", "./x=y"),
        ("command:cat -o a=b {image}", "command:cat -o a=b {image}"),
        ("é", "openai:http://h/v1#a=b"),
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("b=1", "no engine is called b"),
        ("a=x/page", "USD/page"),
        ("a=-1/page", "USD/page"),
        ("a=nan/page", "USD/page"),
        ("a=1/Mtoken", "INPUT"),
        ("a=-3", "zero or more"),
        ("a=inf", "zero or more"),
    ],
)
def test_prices_that_cannot_be_meant(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_prices([text], ["a"])
    with pytest.raises(ConfigError, match="already"):
        parse_prices(["a=1", "a=2"], ["a"])


def test_pages_without_a_truth_are_not_read(folder: Path) -> None:
    Image.new("RGB", (9, 9)).save(folder / "stranger.png")
    (folder / "p0.png").write_bytes(b"not an image")
    pages = select_pages([str(folder)], str(folder / "truth.jsonl"))
    assert [Path(ref.source).name for ref in pages.refs] == ["p0.png", "p1.png", "p2.png"]
    assert pages.unknown == 1
    (run,) = compare(pages, [python("right")], QUICK)["runs"]
    assert run["failed"] == 1
    assert "p0.png" in run["by_page"][0]["error"]
    with pytest.raises(ScoreError, match="knows none of the 1 pages"):
        select_pages([str(folder / "stranger.png")], str(folder / "truth.jsonl"))
    with pytest.raises(PageError):
        select_pages([str(folder / "missing.png")], str(folder / "truth.jsonl"))


# Callables and programs.


def test_a_callable_has_to_return_text(pages: Pages) -> None:
    (run,) = compare(pages, [python("returns_bytes")], QUICK)["runs"]
    assert run["pages"] == 0
    assert "should return text, not bytes" in run["by_page"][0]["error"]


def program(folder: Path, code: str, *arguments: str) -> engines.EngineSpec:
    (folder / "program.py").write_text("import sys, time, subprocess\n" + code)
    return parse_engine(f"p=command:{sys.executable} {folder / 'program.py'} {{image}} {' '.join(arguments)}")


def run_program(pages: Pages, spec: engines.EngineSpec, options: ReadOptions = QUICK) -> list[engines.Answer]:
    with spec.open(options) as reader:
        return reader.run(pages.refs[:1], lambda: None).answers


def test_a_program_gets_a_png_and_prints_the_text(pages: Pages, folder: Path) -> None:
    code = "print(open(sys.argv[1], 'rb').read(4)[1:].decode(), *sys.argv[2:], 'é\\f')"
    options = ReadOptions(timeout=20)
    (answer,) = run_program(pages, program(folder, code, "'$(id)'", "';'", "a=x{image}x"), options)
    assert answer.error is None
    text = str(answer.raw)
    assert text.startswith("PNG $(id) ; a=x/")
    assert text.endswith("page.pngx é")


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("sys.exit('first\\nthe reason')", "exit code 1: the reason"),
        ("time.sleep(60)", "longer than 0.5 s"),
        ("subprocess.run(['sleep', '60'])", "longer than 0.5 s"),
        ("while True: sys.stdout.write('x' * 65536)", "larger than 0 MB"),
        ("import os; os.kill(os.getpid(), 9)", "exit code -9"),
    ],
)
def test_a_program_that_misbehaves(
    pages: Pages, folder: Path, code: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "MAX_ANSWER_BYTES", 300_000)
    started = time.monotonic()
    slow = "60" in code
    (answer,) = run_program(pages, program(folder, code), ReadOptions(timeout=0.5 if slow else 20))
    assert sentence in str(answer.error)
    assert time.monotonic() - started < 15


def test_closing_an_engine_ends_what_it_runs(pages: Pages, folder: Path) -> None:
    spec = program(folder, "time.sleep(60)")
    outcomes: list[engines.Outcome] = []
    with spec.open(ReadOptions(concurrency=1)) as reader:
        run = threading.Thread(target=lambda: outcomes.append(reader.run(pages.refs[:1], lambda: None)))
        run.start()
        while not reader._live:
            time.sleep(0.01)
    run.join(10)
    assert outcomes[0].answers[0].error is not None


# Endpoints.


def answer(text: object, **choice: object) -> bytes:
    message = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    return json.dumps({"choices": [message | choice], "usage": usage}).encode()


class Stub(ThreadingHTTPServer):
    """A server that does what a path asks for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict[str, str], dict]] = []
        self.ending = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, dict(self.headers), body))
        times = sum(path == self.path for path, _, _ in self.server.asked)
        mode = self.path.split("/")[1]
        try:
            getattr(self, mode)(body, times)
        except OSError:  # the client has gone
            self.close_connection = True

    def good(self, body: dict, times: int) -> None:
        url = body["messages"][-1]["content"][0]["image_url"]["url"]
        image = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
        self.reply(answer(TEXTS[image.getpixel((0, 0))[0]]))

    def busy(self, body: dict, times: int) -> None:
        if times == 1:
            return self.reply(b"{}", 429, Retry_After="0")
        if times == 2:
            return self.reply(b"oops", 503)
        if times == 3:  # gone in the middle
            return self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{")
        return self.reply(answer([{"type": "text", "text": "a"}, {"text": "b"}], finish_reason="length"))

    def down(self, body: dict, times: int) -> None:
        self.reply(json.dumps({"error": {"message": "too many\x1b[31m\npages"}}).encode(), 500)

    def forbidden(self, body: dict, times: int) -> None:
        self.reply(json.dumps({"error": {"message": "bad key"}}).encode(), 401)

    def elsewhere(self, body: dict, times: int) -> None:
        self.reply(b"", 302, Location=f"http://127.0.0.1:{self.server.server_port}/good/chat/completions")

    def prose(self, body: dict, times: int) -> None:
        self.reply(b"<html>welcome</html>")

    def deep(self, body: dict, times: int) -> None:
        self.reply(b'{"choices":' + b"[" * 100_000)

    def empty(self, body: dict, times: int) -> None:
        self.reply(answer(None))

    def huge(self, body: dict, times: int) -> None:
        self.send_response(200)
        self.end_headers()
        while not self.server.ending.is_set():
            self.wfile.write(b"x" * 65536)

    def silent(self, body: dict, times: int) -> None:
        self.server.ending.wait(30)

    def drip(self, body: dict, times: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        while not self.server.ending.wait(0.1):
            self.wfile.write(b" ")

    def drip_headers(self, body: dict, times: int) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        while not self.server.ending.wait(0.1):
            self.wfile.write(b"x")

    def garbage(self, body: dict, times: int) -> None:
        self.wfile.write(b"\x00\xff" * 200 + b"\r\n\r\n")


@pytest.fixture
def stub():
    with Stub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.ending.set()
        server.shutdown()
        thread.join()


def endpoint(stub: Stub, mode: str, model: str = "model", query: str = "") -> engines.EngineSpec:
    return parse_engine(f"{mode}=openai:http://127.0.0.1:{stub.server_port}/{mode}{query}#{model}")


def test_an_endpoint_is_asked_as_its_model_wants(
    pages: Pages, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")
    spec = endpoint(stub, "good", "Dharma-AI/Dharma-OCR-LITE", "?key_env=SOME_KEY")
    result = compare(pages, [spec], QUICK, prices=parse_prices(["10+100/Mtoken"], ["good"]))
    (run,) = result["runs"]
    assert run["quality"]["benchmark_score"] == 1.0
    assert run["usd_per_page"] == pytest.approx(100 * 10e-6 + 10 * 100e-6)
    assert run["tokens_per_s"]["output"] == pytest.approx(30 / run["seconds"])
    path, headers, body = stub.asked[0]
    assert path == "/good/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("Dharma-AI/Dharma-OCR-LITE", 0, 8192)
    assert body["messages"][0]["role"] == "system"
    assert "secret" not in json.dumps(result)


def test_a_busy_endpoint_is_asked_again(pages: Pages, stub: Stub) -> None:
    with endpoint(stub, "busy").open(QUICK) as reader:
        (one,) = reader.run(pages.refs[:1], lambda: None).answers
    assert (one.raw, one.finish_reason, one.error) == ("ab", "length", None)
    assert len(stub.asked) == 4


@pytest.mark.parametrize(
    ("mode", "sentence"),
    [
        ("down", r"answers 500 Internal Server Error: too many\x1b[31m\npages"),
        ("elsewhere", "answers 302"),
        ("prose", "not JSON"),
        ("deep", "not JSON"),
        ("empty", "without a text"),
        ("huge", "larger than"),
        ("silent", "longer than 1 s"),
        ("drip", "longer than 1 s"),
        ("drip_headers", "longer than 1 s"),
        ("garbage", "broke off"),
    ],
)
def test_hostile_answers_cost_their_page(
    pages: Pages, stub: Stub, mode: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "MAX_ANSWER_BYTES", 2_000_000)
    with endpoint(stub, mode).open(QUICK) as reader:
        outcome = reader.run(pages.refs[:1], lambda: None)
    assert outcome.error is None
    assert sentence in str(outcome.answers[0].error)
    assert outcome.numbers["seconds"] < 10


def test_a_refusal_is_the_same_for_every_page(pages: Pages, stub: Stub) -> None:
    options = ReadOptions(timeout=1.0, concurrency=1)
    with (
        endpoint(stub, "forbidden").open(options) as reader,
        pytest.raises(EngineError, match="answers 401 Unauthorized: bad key"),
    ):
        reader.run(pages.refs, lambda: None)
    assert len(stub.asked) == 1


def test_an_endpoint_that_dies_is_given_up(folder: Path) -> None:
    """Pages that were read stay; the rest fail at once, without waiting for each."""
    server = Stub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    refs = [PageRef(str(folder / f"p{i % 3}.png"), 1) for i in range(12)]
    done: list[int] = []

    def on_page() -> None:
        done.append(1)
        if len(done) == 2:
            server.shutdown()
            server.server_close()

    options = ReadOptions(timeout=1.0, backoff=0.001, concurrency=1)
    with endpoint(server, "good").open(options) as reader:
        outcome = reader.run(refs, on_page)
    thread.join()
    assert "cannot be reached" in str(outcome.error)
    assert [a.error is None for a in outcome.answers[:2]] == [True, True]
    assert len(done) < len(refs)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "message", "content", "text", "usage", "prompt_tokens", "error", "finish_reason"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(values | st.builds(lambda v: {"choices": [{"message": {"content": v}, "finish_reason": v}]}, values))
def test_any_json_is_an_answer_or_a_sentence(value: object) -> None:
    reader = parse_engine("x=openai:http://127.0.0.1:9/v1#m").open(QUICK)
    with suppress(PagemillError):
        found = reader._answer(PageRef("a", 1), json.dumps(value).encode())
        assert isinstance(found.raw, str)
        assert found.prompt_tokens is None or found.prompt_tokens >= 0


# The whole.


def test_pagemill_with_alignment(tmp_path: Path) -> None:
    sources = [str(SAMPLES / name) for name in ("form_24.png", "hard_36.png")]
    pages = select_pages(sources, str(SAMPLES / "truth.jsonl"))
    spec = parse_engine("tiny=pagemill-tiny")
    result = compare(pages, [spec], ReadOptions(max_new_tokens=16), alignment=True)
    (run,) = result["runs"]
    assert run["pages"] == 2
    assert run["stage_s_per_page"]["vision"] > 0
    easy, hard = (page["bits_per_char"] for page in run["by_page"])
    assert easy < 1 < hard
    bits = run["alignment"]["bits_per_char"]
    assert easy <= bits["low"] <= bits["value"] <= bits["high"] <= hard
    assert run["quality"]["bits_per_char"] == bits["value"]
    assert run["alignment"]["by_field"]["text"]["pages"] == 2
    json.dumps(result, allow_nan=False)
    show(result)


def test_the_command_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    truth = ["--truth", "truth.jsonl"]
    engine = ["-e", f"right=python:{__name__}:right"]
    run = CliRunner().invoke
    done = run(app, ["compare", ".", *truth, *engine, "--price", "1", "-o", "result.json"])
    assert done.exit_code == 0, done.output
    assert "right" in done.output
    assert json.loads((folder / "result.json").read_text())["runs"][0]["quality"]["benchmark_score"] == 1
    for wrong in (
        ["compare", "missing.png", *truth, *engine],
        ["compare", ".", "--truth", "missing.jsonl", *engine],
        ["compare", ".", *truth, *engine, *engine],
        ["compare", ".", *truth, "-e", "x=python:no"],
        ["compare", ".", *truth, *engine, "-o", "no/such/folder.json"],
        ["compare", ".", *truth, *engine, "--price", "cheap"],
        ["compare", ".", *truth],
    ):
        assert run(app, wrong).exit_code == 2, wrong
    assert run(app, ["compare", ".", *truth, *engine, "-e", "x=python:nowhere:f"]).exit_code == 1
