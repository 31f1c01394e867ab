"""The labelled set of repetition loops and of legitimate repetition: `bench/data/loops.jsonl.gz`.

    python bench/loop_set.py read FOLDER      # what pagemill-tiny and its stages write: FOLDER/real.jsonl
    python bench/loop_set.py build FOLDER     # labels that, constructs the rest, writes the set

Real outputs: the embedded model and its earlier stages, whole and with the decoder's weights rounded to 4 and 3 bits, greedy and
drawn at temperature 0.3, 0.6 and 1.0, on the hard and stress pages and some clean ones; the weakest stage also on damaged copies
of them and continuing an answer that has already begun to loop. At most 1,536 new tokens.

How real outputs are labelled, without the detector: by brute force, for every period up to 600 bytes, the stretches of at least
100 bytes and three periods that equal the text one period before. The longest of them makes the output a

loop        if the model repeats at least 200 tokens in it, or runs into the token cap with it, or if the published rule calls
            the output degenerate; the loop begins where the first such stretch does
brief       if it does none of that: a stumble that ended by itself. Such outputs are kept apart, and so are those that follow
            a page which itself holds four such bodies in a row (`page`)
legitimate  if there is no such stretch

Constructed: loops from bodies of 1 to 400 tokens after the beginning of a real page, until 8,192 tokens; and pages that repeat
themselves as documents do. Held out are the families in HELD_OUT_FAMILIES and every third other row, by a hash of its tokens.

Each row: `label` (loop, legitimate, brief, page), `kind`, `source`, `held_out`, `tokens` (ids of pagemill-tiny), `start` (where
the second instance of a loop begins, else null), `page_tokens` (tokens of the page's true answer).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from stages import STAGES, stage_folder
from tokenizers import Tokenizer

from pagemill.decode.loops import token_pieces
from pagemill.decode.page import is_degenerate

PAGES = Path(__file__).parent / "pages"
SET = Path(__file__).parent / "data" / "loops.jsonl.gz"
CAP = 8192
LONGEST_PERIOD = 600
HELD_OUT_FAMILIES = {
    "litany", "vouchers", "seat map", "timetable", "answer sheet",
    "html cells", "roman counter", "stanza", "json fields",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One output, see above."""

    label: str
    kind: str
    source: str
    held_out: bool
    tokens: list[int]
    start: int | None
    page_tokens: int


def load() -> list[Row]:
    """Return the committed set."""
    with gzip.open(SET, "rt") as file:
        return [Row(**json.loads(line)) for line in file]


def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(files("pagemill") / "assets" / "pagemill-tiny" / "tokenizer.json"))


def truths() -> dict[str, dict[str, Any]]:
    """Return the true answers of the sample pages, by path below `bench/pages`."""
    found = {}
    for name, below in (("truth.jsonl", ""), ("stress/truth.jsonl", "stress/")):
        for line in (PAGES / name).read_text().splitlines():
            record = json.loads(line)
            found[below + record["file"]] = record["truth"]
    return found


def as_json(fields: dict[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False)


def escaped(text: str) -> str:
    """Return `text` as it stands within a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


# Real outputs


def rounded(folder: Path, bits: int, target: Path) -> Path:
    """Make a checkpoint whose decoder matrices are rounded to nearest, `bits` bits a weight, one scale a row."""
    from safetensors.torch import load_file, save_file

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            (target / file.name).symlink_to(file.resolve())
    weights = load_file(str(folder / "model.safetensors"))
    for name, weight in weights.items():
        if weight.ndim == 2 and "embed" not in name and "visual" not in name:
            values = weight.float()
            scale = values.abs().amax(1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
            weights[name] = ((values / scale).round() * scale).to(weight.dtype)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, target / "model.safetensors")
    return target


def damaged(path: Path) -> Iterator[tuple[str, Any]]:
    from PIL import Image, ImageFilter, ImageOps

    image = Image.open(path).convert("RGB")
    width, height = image.size
    yield "inverted", ImageOps.invert(image)
    yield "upside down", image.rotate(180)
    yield "blurred", image.filter(ImageFilter.GaussianBlur(2.5))
    yield "half", image.resize((width // 2, height // 2))
    yield "stretched", image.resize((min(width * 3 // 2, 1008), min(height, 1008)))


def begun(truth: dict[str, Any], rng: random.Random) -> tuple[str, str] | None:
    """Return the beginning of an answer that already repeats itself, and what it repeats; None if the page has no lines."""
    lines = [line for line in (truth["text"] or "").split("\n") if len(line) > 12]
    if not lines:
        return None
    kind = rng.choice(["line", "line", "two lines", "word", "counter", "zeros", "counter"])
    line = rng.choice(lines)
    answer = as_json(truth)
    head = answer[: answer.find('"text": "') + 9]
    if kind == "counter":
        return kind, head + "".join(escaped(f"{i}. {line}\n") for i in range(1, 9))
    body = {
        "line": line + "\n",
        "two lines": line + "\n" + rng.choice(lines) + "\n",
        "word": rng.choice(line.split()) + " ",
        "zeros": "0,00 ",
    }[kind]
    return kind, head + escaped(body) * (14 if kind == "word" else 8)


def read(folder: Path) -> None:
    """Write FOLDER/real.jsonl: every output with its stage, page, way of damage, finish reason and tokens."""
    from pagemill import Engine, Request, SamplingParams

    truth, tiny, rng = truths(), tokenizer(), random.Random(5)
    hard = sorted(name for name in truth if name.startswith(("hard", "stress")))
    clean = sorted(name for name in truth if not name.startswith(("hard", "stress")))
    plans: list[tuple[str, int | None, float]] = []
    for stage in STAGES:
        plans += [(stage, None, 0.0), (stage, 4, 0.0), (stage, 3, 0.0)]
        plans += [(stage, None, temperature) for temperature in (0.3, 0.6, 1.0)]
    with open(folder / "real.jsonl", "w") as out:
        for stage, bits, temperature in plans:
            checkpoint = stage_folder(stage, folder)
            if bits:
                checkpoint = rounded(checkpoint, bits, folder / f"{stage}-{bits}bit")
            with Engine.from_pretrained(
                str(checkpoint), dtype="bfloat16", max_num_seqs=16, num_threads=1
            ) as engine:
                asked: list[tuple[str, str, str, Any]] = [
                    (name, "", "", str(PAGES / name))
                    for name in [*hard, *clean[:: 3 if not temperature else 9]]
                ]
                if stage == "stage1" and not temperature and bits != 4:
                    asked += [
                        (name, damage, "", np.asarray(image))
                        for name in hard
                        for damage, image in damaged(PAGES / name)
                        if rng.random() < 0.25
                    ]
                    for name in rng.sample(clean, 14):
                        if (beginning := begun(truth[name], rng)) is not None:
                            asked.append((name, f"begun: {beginning[0]}", beginning[1], str(PAGES / name)))
                requests = [
                    Request(
                        engine.page_prompt + prefix,
                        images=[image],
                        params=SamplingParams(max_new_tokens=1536, temperature=temperature, seed=i),
                    )
                    for i, (_, _, prefix, image) in enumerate(asked)
                ]
                for (name, damage, prefix, _), output in zip(asked, engine.generate(requests), strict=True):
                    if output.error is not None:
                        raise RuntimeError(f"{name}: {output.error}")
                    before = tiny.encode(prefix, add_special_tokens=False).ids
                    record = dict(
                        stage=stage, bits=bits, temperature=temperature, page=name, damage=damage,
                        finish=output.finish_reason, tokens=before + list(output.token_ids),
                        begun=len(before), text=prefix + output.text,
                    )  # fmt: skip
                    out.write(json.dumps(record, ensure_ascii=False) + "\n")
            print(stage, bits, temperature, flush=True)


def repetitions(raw: bytes) -> list[tuple[int, int, int]]:
    """Return (length, -period, begin) of every stretch of at least 100 bytes and three periods that equals what stands one
    period before it. The first three instances of a longer period are among those of its multiples.
    """
    codes = np.frombuffer(raw, np.uint8)
    found = []
    for period in range(1, min(LONGEST_PERIOD, len(codes) // 2) + 1):
        equal = np.concatenate(([0], (codes[period:] == codes[:-period]).view(np.int8), [0]))
        edges = np.diff(equal)
        begins, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        long = ends - begins >= max(3 * period, 100)
        found += [
            (int(e - b), -period, int(b) + period) for b, e in zip(begins[long], ends[long], strict=True)
        ]
    return found


def label(record: dict[str, Any], truth: str, tiny: Tokenizer, pieces: Sequence[bytes]) -> Row:
    """Label a real output by the criterion above."""
    tokens = record["tokens"]
    raw = b"".join(pieces[token] for token in tokens)
    begins = np.cumsum([0, *(len(pieces[token]) for token in tokens)])

    def token_at(offset: int) -> int:
        return int(np.searchsorted(begins, offset))

    found, kind, start = "legitimate", "real", None
    if stretches := repetitions(raw):
        length, period, begin = max(stretches)
        body = raw[begin : begin - period]
        own = token_at(begin + length) - max(token_at(begin), record["begun"])
        to_cap = record["finish"] == "length" and begin + length > len(raw) + 2 * period - 15
        if body * 4 in truth.encode():
            found = "page"
        elif own >= 200 or to_cap or is_degenerate(raw.decode(errors="replace"), record["finish"]):
            found, start = "loop", token_at(min(begin for _, _, begin in stretches))
            kind = "run" if len(set(tokens[token_at(begin) : token_at(begin + length)])) == 1 else "period"
        else:
            found = "brief"
    name = "real " + "/".join(str(record[k]) for k in ("stage", "bits", "temperature", "page", "damage"))
    return row(found, kind, name, tokens, start, len(tiny.encode(truth).ids))


def row(label: str, kind: str, source: str, tokens: list[int], start: int | None, page_tokens: int) -> Row:
    digest = hashlib.blake2b(json.dumps(tokens).encode(), digest_size=2).digest()
    held_out = kind in HELD_OUT_FAMILIES or int.from_bytes(digest, "little") % 3 == 0
    return Row(label, kind, source, held_out, tokens, start, page_tokens)


# Constructed loops


def constructed_loops(tiny: Tokenizer, rng: random.Random) -> Iterator[Row]:
    answers = [as_json(truth) for name, truth in truths().items() if not name.startswith("stress")]
    lines = [line for a in answers for line in json.loads(a)["text"].split("\n") if len(line) > 12]
    words = sorted({word for line in lines for word in line.split() if word.isalpha() and len(word) > 2})

    def encode(text: str) -> list[int]:
        return list(tiny.encode(text, add_special_tokens=False).ids)

    def start_of_page() -> tuple[list[int], int]:
        tokens = encode(rng.choice(answers))
        return tokens[: rng.randint(20, len(tokens) - 5)], len(tokens)

    def prose(tokens: int) -> list[int]:
        """A body of about `tokens` tokens of running text."""
        text = ""
        while len(ids := encode(escaped(text))) < tokens:
            text += rng.choice(lines) + rng.choice([" ", "\n"])
        return ids[:tokens]

    def loop(kind: str, instances: Callable[[int], list[int]], source: str) -> Row:
        before, page_tokens = start_of_page()
        tokens = before + instances(0)
        start = len(tokens)
        i = 1
        while len(tokens) < CAP:
            tokens += instances(i)
            i += 1
        return row("loop", kind, f"constructed {source}", tokens[:CAP], start, page_tokens)

    def repeated(kind: str, body: list[int], source: str) -> Row:
        return loop(kind, lambda _: body, source)

    for text in [".", "_", "-", "0", " ", "\\n", "=", "*", "a", "1", ",", "|", " e", " de", "ção", " a"]:
        yield repeated("run", encode(text)[-1:], repr(text))
    for token in rng.sample(range(300, 2034), 12):
        yield repeated("run", [token], f"token {token}")
    yield repeated("run", [2040], "special token")

    for _ in range(70):
        size = round(2 ** rng.uniform(1, 8.65))
        yield repeated("period", prose(size), f"{size} tokens")
    for _ in range(12):
        line = rng.choice(lines)
        yield repeated("period", encode(escaped(line + "\n")), f"line {line!r}")
    for text in [
        "0,00 ",
        "0,00 0,00 0,00 ",
        "0 ",
        "- ",
        "12,50 ",
        "R$ 0,00 ",
        "| 0,00 ",
        "|  ",
        "X ",
        "sim ",
        "... ",
        "n/a; ",
    ]:
        yield repeated("cells", encode(text), repr(text))
    for columns in (2, 3, 4, 6, 9, 13):
        cell = rng.choice(["0,00", "0", "-", "1.234,56", "____"])
        yield repeated("rows", encode(escaped(" ".join([cell] * columns) + "\n")), f"{columns} x {cell!r}")
    for text in ["<td></td>", "<td>0,00</td>", "<tr><td></td><td></td></tr>", "<td>-</td><td>0</td>"]:
        yield repeated("html cells", encode(text), text)
    for _ in range(5):
        field = escaped(rng.choice(lines))
        yield repeated("json fields", encode(f'"footer": "{field}", "text": "{field}", '), "fields")
    for _ in range(6):
        verse = "".join(rng.choice(lines) + "\n" for _ in range(4)) + "\n"
        yield repeated("stanza", encode(escaped(verse)), "four lines")

    def counter(kind: str, form: Callable[[int], str], source: str) -> Row:
        return loop(kind, lambda i: encode(escaped(form(i))), source)

    for _ in range(8):
        line, first, step = rng.choice(lines), rng.randint(1, 40), rng.choice([1, 1, 1, 2, 10])
        end = rng.choice(["\n", "\n", " "])
        yield counter(
            "counter", lambda i, a=line, f=first, s=step, e=end: f"{f + s * i}. {a}{e}", "numbered line"
        )
    for _ in range(5):
        line = rng.choice(lines)
        yield counter("counter", lambda i, a=line: f"Art. {i + 1}º {a}\n§ {i + 2}º {a}\n", "articles")
    for _ in range(5):
        line = " ".join(rng.sample(words, 4))
        yield counter(
            "counter", lambda i, a=line: f"{i % 28 + 1:02d}/{i // 28 % 12 + 1:02d}/2024 {a}\n", "dates"
        )
    for _ in range(5):
        line = " ".join(rng.sample(words, 3))
        yield counter("counter", lambda i, a=line: f"{a} R$ {(i + 1) * 50},00\n", "amounts")
    for _ in range(3):
        line = rng.choice(lines)
        yield counter("counter", lambda i, a=line: f"{chr(97 + i % 26)}) {a}\n", "letters")
    yield counter("counter", lambda i: f"{i + 1}, ", "numbers alone")
    yield counter("counter", lambda i: f"{i + 1}\n", "numbers alone, one a line")
    yield counter("counter", lambda i: f"Página {i + 1} de 900 ", "page numbers")

    def roman(n: int) -> str:
        values = [
            (100, "C"),
            (90, "XC"),
            (50, "L"),
            (40, "XL"),
            (10, "X"),
            (9, "IX"),
            (5, "V"),
            (4, "IV"),
            (1, "I"),
        ]
        text = ""
        for value, sign in values:
            text, n = text + sign * (n // value), n % value
        return text

    for _ in range(4):
        line = rng.choice(lines)
        yield counter("roman counter", lambda i, a=line: f"{roman(i + 1)} - {a};\n", "items")

    def split_anew(text: str) -> list[int]:
        """The same text in other tokens: encoded in pieces."""
        tokens, at = [], 0
        while at < len(text):
            size = rng.randint(1, 12)
            tokens += encode(text[at : at + size])
            at += size
        return tokens

    for _ in range(20):
        text = escaped("".join(rng.choice(lines) + rng.choice([" ", "\n"]) for _ in range(rng.randint(1, 4))))
        yield loop("retokenised", lambda _, a=text: split_anew(a), f"{len(text)} characters")
    for _ in range(25):
        body = prose(rng.randint(12, 200))

        def noisy(_: int, a: list[int] = body) -> list[int]:
            return [rng.randrange(300, 2034) if rng.random() < 0.02 else token for token in a]

        yield loop("noisy", noisy, f"{len(body)} tokens, 1 in 50 changed")


# Constructed pages that repeat themselves as documents do

FIRST = [
    "Ana",
    "Bruno",
    "Carla",
    "Diego",
    "Elisa",
    "Fábio",
    "Gilda",
    "Hugo",
    "Íris",
    "João",
    "Karina",
    "Luís",
    "Marta",
    "Nilo",
    "Olga",
    "Paulo",
    "Rita",
    "Saulo",
    "Tânia",
    "Vítor",
]
LAST = [
    "Almeida",
    "Barros",
    "Cardoso",
    "Dias",
    "Esteves",
    "Farias",
    "Gomes",
    "Lopes",
    "Moraes",
    "Nunes",
    "Oliveira",
    "Prado",
    "Queiroz",
    "Ramos",
    "Souza",
    "Teixeira",
]


def legitimate_pages(rng: random.Random, lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (kind, text)."""

    def name() -> str:
        return f"{rng.choice(FIRST)} {rng.choice(LAST)} {rng.choice(LAST)}"

    def amount() -> str:
        return f"{rng.randint(1, 9)}.{rng.randint(0, 999):03d},{rng.randint(0, 99):02d}"

    def rows(of: Callable[[int], str], least: int, most: int) -> str:
        return "\n".join(of(i) for i in range(rng.randint(least, most)))

    def surrounded(text: str) -> str:
        before = "\n".join(rng.sample(lines, rng.randint(0, 3)))
        after = "\n".join(rng.sample(lines, rng.randint(0, 2)))
        return "\n".join(part for part in (before, text, after) if part)

    cells = ["0,00", "0", "-", "0,00%", "R$ 0,00", "1.234,56", "sim", "n/a", "X", "....", "____"]
    months = [
        "Janeiro",
        "Fevereiro",
        "Março",
        "Abril",
        "Maio",
        "Junho",
        "Julho",
        "Agosto",
        "Setembro",
        "Outubro",
        "Novembro",
        "Dezembro",
    ]
    for _ in range(26):
        cell, columns = rng.choice(cells), rng.randint(3, 13)
        yield "table of one cell", surrounded(rows(lambda _, c=cell, n=columns: " ".join([c] * n), 8, 55))
    yield "table of one cell", "\n".join([" ".join(["0,00"] * 13)] * 50)
    yield "table of one cell", "\n".join([" ".join(["0,00"] * 18)] * 60)
    for _ in range(8):
        yield (
            "table with labels",
            surrounded(rows(lambda i: months[i % 12] + " " + " ".join("0,00" for _ in range(6)), 12, 48)),
        )
    for _ in range(8):
        yield (
            "sparse table",
            surrounded(
                rows(lambda _: " ".join(amount() if rng.random() < 0.1 else "0,00" for _ in range(8)), 15, 50)
            ),
        )
    for _ in range(8):
        yield "table of numbers", surrounded(rows(lambda _: " ".join(amount() for _ in range(7)), 10, 45))
    for _ in range(6):
        columns = rng.randint(3, 9)
        head = "| " + " | ".join(rng.sample(months, columns)) + " |\n|" + " --- |" * columns + "\n"
        yield "markdown table", head + rows(lambda _, n=columns: "|" + "   |" * n, 10, 45)
    for _ in range(6):
        cell, columns = rng.choice(["", "0,00", "-"]), rng.randint(4, 31)
        yield (
            "html table",
            (
                "<table>"
                + "".join(f"<tr>{f'<td>{cell}</td>' * columns}</tr>" for _ in range(rng.randint(5, 40)))
                + "</table>"
            ),
        )
    for _ in range(10):
        yield (
            "contents",
            surrounded(
                rows(
                    lambda i: f"{i + 1}. {rng.choice(lines)} {'.' * rng.randint(10, 90)} {3 * i + 5}", 10, 45
                )
            ),
        )
    for _ in range(4):
        yield "contents", surrounded(rows(lambda i: f"Capítulo {i + 1} {'. ' * 40}{7 * i + 5}", 8, 40))
    for _ in range(6):
        yield "signatures", surrounded(rows(lambda _: "_" * 45 + "\n" + name(), 2, 14))
    for _ in range(6):
        yield "rules", surrounded(rows(lambda _: rng.choice("-_=.") * rng.randint(40, 120), 1, 30))
    for _ in range(10):
        label = rng.choice(["Nome: ______________ CPF: ______________ Assinatura: ______________",
                            "Nome:\nEndereço:\nTelefone:\n", "Data: __/__/____  Hora: __:__  Visto: ______",
                            "Assinatura: ______________________", "( ) Sim ( ) Não"])  # fmt: skip
        yield "form labels", surrounded(rows(lambda _, a=label: a, 4, 100 // (3 * label.count("\n") + 2)))
    for _ in range(8):
        yield (
            "list to be signed",
            surrounded(
                rows(
                    lambda i: f"{i + 1} Nome: ____________________ RG: ____________ Assinatura: __________",
                    8,
                    35,
                )
            ),
        )
    for _ in range(8):
        yield "numbered list", surrounded(rows(lambda i: f"{i + 1}. {rng.choice(lines)}", 8, 45))
    for _ in range(8):
        yield "index", rows(
            lambda _: f"{rng.choice(LAST)}, {', '.join(str(rng.randint(3, 400)) for _ in range(rng.randint(1, 9)))}",
            20, 60,
        )  # fmt: skip
    for _ in range(10):
        chorus = "\n".join(rng.sample(lines, rng.randint(1, 4)))
        verses = ["\n".join(rng.sample(lines, 4)) for _ in range(rng.randint(2, 5))]
        ending = "\n".join([chorus] * rng.randint(1, 3))
        yield "song", f"\n{chorus}\n".join(verses) + "\n" + ending
    for _ in range(6):
        refrain = rng.choice(["Aleluia, aleluia", "Ó minha terra", "Glória, glória, glória"])
        yield "song", surrounded("\n".join([refrain] * rng.randint(3, 10)))
    for _ in range(10):
        value, first = amount(), rng.randint(1, 12)
        months_ = rng.randint(10, 48)
        yield "instalments", surrounded("\n".join(
            f"Parcela {i + 1:02d}/{months_} {10:02d}/{(first + i - 1) % 12 + 1:02d}/{2020 + (first + i - 1) // 12} R$ {value}"
            for i in range(months_)
        ))  # fmt: skip
    for _ in range(8):
        what = rng.choice(
            [
                "TARIFA MENSALIDADE PACOTE SERVIÇOS",
                "PAGAMENTO DE TÍTULO BANCO DO BRASIL AGÊNCIA CENTRAL",
                "PIX RECEBIDO",
            ]
        )
        yield (
            "statement",
            surrounded(
                rows(lambda i, w=what: f"{i % 28 + 1:02d}/{rng.randint(1, 12):02d} {w} {amount()} D", 8, 40)
            ),
        )
    for _ in range(6):
        yield "codes", surrounded(rows(lambda _: "".join(rng.choice("0123456789") for _ in range(47)), 1, 30))
    for _ in range(4):
        yield "number grid", rows(lambda i: " ".join(str(10 * i + j) for j in range(1, 11)), 10, 40)
    for _ in range(4):
        yield "citations", " ".join(f"{rng.choice(lines)} (fls. {rng.randint(2, 900)})" for _ in range(30))
    for _ in range(5):
        yield "blank lines", "\n\n\n".join(rng.sample(lines, rng.randint(4, 12))) + "\n" * rng.randint(2, 20)
    for _ in range(8):
        saints = [f"São {first}, rogai por nós." for first in FIRST] + [
            f"Santa {first}, rogai por nós." for first in FIRST
        ]
        yield "litany", "\n".join(rng.sample(saints, rng.randint(10, 40)))
    for _ in range(6):
        slip = "\n".join(rng.sample(lines, rng.randint(4, 8)))
        yield "vouchers", "\n".join([slip + "\n" + "-" * 60] * rng.randint(2, 4))
    for _ in range(5):
        yield "seat map", rows(lambda i: " ".join(f"{chr(65 + i % 26)}{j:02d}" for j in range(1, 17)), 8, 26)
    for _ in range(6):
        yield (
            "timetable",
            surrounded(
                rows(lambda i: f"{7 + i // 2:02d}:{30 * (i % 2):02d} Livre Livre Livre Livre Livre", 10, 30)
            ),
        )
    for _ in range(8):
        yield "answer sheet", surrounded(rows(lambda i: f"{i + 1:02d} ( ) A ( ) B ( ) C ( ) D ( ) E", 20, 70))


def build(folder: Path) -> None:
    """Label FOLDER/real.jsonl, construct the rest, and write the set."""
    tiny, rng, truth = tokenizer(), random.Random(20), truths()
    pieces = token_pieces(tiny, 2048)
    rows: dict[str, Row] = {}

    def add(new: Row) -> None:
        rows.setdefault(hashlib.blake2b(json.dumps(new.tokens).encode()).hexdigest(), new)

    real = [json.loads(line) for line in (folder / "real.jsonl").read_text().splitlines()]
    labelled = [label(record, as_json(truth[record["page"]]), tiny, pieces) for record in real]
    legitimate = [r for r in labelled if r.label == "legitimate"]
    keep = set(map(id, rng.sample(legitimate, min(len(legitimate), 200))))
    for r in labelled:
        if r.label != "legitimate" or id(r) in keep:
            add(r)
    for new in constructed_loops(tiny, rng):
        add(new)
    for name, fields in truth.items():
        tokens = list(tiny.encode(as_json(fields), add_special_tokens=False).ids)
        add(row("legitimate", "true answer", f"truth {name}", tokens, None, len(tokens)))
    lines = sorted({line for fields in truth.values() for line in fields["text"].split("\n") if 12 < len(line) < 80
                    and not line.startswith(("0,00", "....", "___", "- -", "a a", "sim sim", "1.234"))})  # fmt: skip
    for kind, text in legitimate_pages(rng, lines):
        written = (
            text
            if rng.random() < 0.25
            else as_json({"header": None, "margin": None, "footer": None, "text": text})
        )
        tokens = list(tiny.encode(written, add_special_tokens=False).ids)
        add(row("legitimate", kind, "constructed page", tokens, None, len(tokens)))
    SET.parent.mkdir(exist_ok=True)
    with open(SET, "wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as out:
        for r in rows.values():
            out.write((json.dumps(asdict(r), separators=(",", ":")) + "\n").encode())
    for name in ("loop", "legitimate", "brief", "page"):
        chosen = [r for r in rows.values() if r.label == name]
        print(name, len(chosen), "real:", sum(r.source.startswith("real") for r in chosen))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("read", "build"))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    (read if args.task == "read" else build)(args.folder)


if __name__ == "__main__":
    main()
