"""Measured launch configurations: chosen by a made-up clock, kept on disk, and used before the table."""

import json
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest

from pagemill.kernels.gpu import configs, tuned
from pagemill.kernels.gpu.configs import AttentionTile, Card, MatmulTile
from pagemill.kernels.gpu.tune import (
    ROWS,
    attention_candidates,
    matmul_candidates,
    rows_of,
    tune,
)
from pagemill.kernels.gpu.tuned import ATTENTION, Product, Tuned, load, path_of, save

CARD = Card("Card 1 (80 GB)", 80, 108)
PLAIN, PAIR = Product("plain", False, 2048, 2048), Product("int4", True, 11008, 2048)
TILE, KEYS = MatmulTile(32, 64, 64, 2, 4, 3), AttentionTile(16, 128, 4, 2)
CODES = AttentionTile(64, 32, 8, 2)


@pytest.fixture(autouse=True)
def _a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PAGEMILL_CACHE_DIR", str(tmp_path))
    load.cache_clear()
    yield
    load.cache_clear()


def never(product: Product) -> float:
    """Seconds of unpacking where nothing is to be unpacked."""
    raise AssertionError(product)


def table(product: Product, rows: int) -> MatmulTile:
    return configs.matmul(CARD, product.form, product.gated, rows, product.features, product.inputs)


@pytest.mark.parametrize("product", [PLAIN, PAIR, Product("fp8", False, 151936, 2048)])
def test_candidates(product: Product) -> None:
    for rows in rows_of(product):
        tiles = matmul_candidates(CARD, product, rows)
        assert tiles[0] == table(product, rows)
        assert len(set(tiles)) == len(tiles) > 5
        assert all(tile.splits == 1 or product.inputs // tile.splits >= tile.inputs for tile in tiles)
        assert all(tile.stages >= 1 for tile in tiles)
    assert rows_of(PLAIN) == list(ROWS)
    assert max(rows_of(Product("plain", False, 151936, 2048))) < 1024
    for kind in ATTENTION:
        assert len(set(attention_candidates(CARD, kind))) == len(attention_candidates(CARD, kind)) > 5


@pytest.mark.parametrize("arch", [80, 90])
def test_the_table_stands_first_for_every_kind_of_attention(arch: int) -> None:
    card = Card("", arch, 100)
    paged = [
        configs.paged(card, decoding=decoding, quantised=quantised)
        for quantised in (False, True)
        for decoding in (True, False)
    ]
    assert len(set(paged)) > 2  # quantised or not is not the same
    wanted = [*paged, *configs.VARLEN[arch]]
    assert [attention_candidates(card, kind)[0] for kind in ATTENTION] == wanted


@pytest.mark.parametrize(
    ("arch", "form", "rows", "loads"),
    [
        (80, "plain", 4096, {"pointers"}),
        (90, "plain", 4096, {"pointers", "descriptors"}),
        (90, "plain", 8, {"pointers"}),
        (100, "int8", 4096, {"pointers", "descriptors", "specialised"}),
        (100, "int4", 4096, {"pointers"}),
    ],
)
def test_operands_are_loaded_as_the_architecture_can(
    arch: int, form: str, rows: int, loads: set[str]
) -> None:
    found = matmul_candidates(Card("", arch, 100), Product(form, False, 2048, 2048), rows)
    assert {tile.loads for tile in found} == loads


def test_the_fastest_is_taken_and_the_table_where_it_is_close() -> None:
    wanted = replace(matmul_candidates(CARD, PLAIN, 8)[3])

    def seconds(product: Product, rows: int, tile: MatmulTile) -> float:
        if rows == 8:
            return 0.5 if tile == wanted else 1.0
        if rows == 16:
            return 0.98 if tile != table(product, rows) else 1.0  # within the spread
        return 1.0 if tile == table(product, rows) else inf  # does not fit

    said: list[str] = []
    found = tune(
        CARD, [PLAIN, PLAIN], seconds, lambda kind, tile: tile.keys * tile.stages, never, said.append
    )
    chosen = dict(found.matmul[PLAIN])
    assert chosen[8] == wanted
    assert all(chosen[rows] == table(PLAIN, rows) for rows in ROWS if rows != 8)
    assert all(tile.keys == 32 and tile.stages == 2 for tile in found.attention.values())
    assert found.wide_rows is None
    assert len(said) == 1 + len(ATTENTION)
    with pytest.raises(ValueError, match=r"no configuration of .* runs on this GPU"):
        tune(CARD, [PLAIN], lambda *_: inf, lambda *_: 1.0, never)


@pytest.mark.parametrize(("crossing", "wide"), [(64, 64), (1, 1), (10**6, 2 * max(ROWS)), (100, 128)])
def test_int8_begins_where_it_takes_less_time_for_all_layers(crossing: int, wide: int) -> None:
    pairs = [PAIR, replace(PAIR, form="int8"), PLAIN]

    def seconds(product: Product, rows: int, tile: MatmulTile) -> float:
        return 2.0 if (product.form == "int8") == (rows < crossing) else 1.0

    found = tune(CARD, pairs, seconds, lambda *_: 1.0, never)
    assert (found.wide_rows, found.plain_rows) == (wide, None)


@pytest.mark.parametrize(("unpack", "plain"), [(0.0, 1), (1.5, 256), (30.0, 4096), (100.0, 2 * max(ROWS))])
def test_int4_becomes_plain_where_that_takes_less_time_with_the_unpacking(unpack: float, plain: int) -> None:
    """A row takes 0.01 s of the plain product, 0.02 s of int4; PLAIN has no int4 form that would count."""
    pairs = [PAIR, replace(PAIR, form="plain"), PLAIN]
    asked: list[Product] = []

    def seconds(product: Product, rows: int, tile: MatmulTile) -> float:
        return rows * (0.02 if product.form == "int4" else 0.01)

    found = tune(CARD, pairs, seconds, lambda *_: 1.0, lambda product: asked.append(product) or unpack)
    assert (found.plain_rows, found.wide_rows, asked) == (plain, None, [PAIR])


def test_what_was_measured_goes_before_the_table() -> None:
    assert load(CARD.name) is None
    assert tuned.matmul(CARD, "plain", False, 8, 2048, 2048) == table(PLAIN, 8)
    load.cache_clear()
    other = replace(TILE, stages=2)
    attention = {"decode": KEYS, "images": KEYS, "prefill_quantised": CODES}
    path = save(CARD.name, Tuned({PLAIN: ((16, TILE), (64, other))}, attention, 96, 700))
    assert path == path_of(CARD.name)
    assert [tuned.matmul(CARD, "plain", False, m, 2048, 2048) for m in (1, 16, 17, 9999)] == [
        TILE,
        TILE,
        other,
        other,
    ]
    assert tuned.matmul(CARD, "plain", False, 8, 2048, 1024) == configs.matmul(
        CARD, "plain", False, 8, 2048, 1024
    )
    assert tuned.paged(CARD, decoding=True) == tuned.varlen(CARD, 4096, 1) == KEYS
    assert tuned.paged(CARD, decoding=False) == configs.paged(CARD, decoding=False)
    for decoding, tile in ((True, configs.paged(CARD, decoding=True, quantised=True)), (False, CODES)):
        assert tuned.paged(CARD, decoding=decoding, quantised=True) == tile
    assert tuned.varlen(CARD, 64, 1) == configs.varlen(CARD, 64, 1)
    assert (tuned.wide_rows(CARD), tuned.plain_rows(CARD)) == (96, 700)
    another = replace(CARD, name="Card 2")
    assert tuned.wide_rows(another) == configs.wide_rows(another)
    assert tuned.plain_rows(another) == configs.plain_rows(another)


def test_kept_as_it_was() -> None:
    kept = Tuned({PLAIN: ((16, TILE),), PAIR: ((1, TILE), (4096, TILE))}, dict.fromkeys(ATTENTION, KEYS))
    save(CARD.name, kept)
    assert load(CARD.name) == kept


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: text.replace(CARD.name, "Card 2"),
        lambda text: text.replace('"rows": 32', '"rows": 33'),
        lambda text: text.replace('"warps": 4', '"warps": 1e9'),
        lambda text: text.replace('"warps": 4', '"wraps": 4'),
        lambda text: text.replace('"pointers"', '"wishes"'),
        lambda text: text.replace('"most_rows": 16', '"most_rows": 0'),
        lambda text: text.replace('"most_rows": 16', '"most_rows": 64'),
        lambda text: text.replace('"wide_rows": 96', '"wide_rows": true'),
        lambda text: text.replace('"plain_rows": null', '"plain_rows": 0'),
        lambda text: json.dumps({**json.loads(text), "kernels": "of another day"}),
        lambda text: "[" * 100_000,
        lambda text: text + " " * (1 << 22),
    ],
)
def test_files_of_others_are_ignored_with_a_warning(damage) -> None:
    path = save(CARD.name, Tuned({PLAIN: ((16, TILE), (64, TILE))}, {"decode": KEYS}, 96))
    path.write_text(damage(path.read_text()))
    with pytest.warns(UserWarning, match="is ignored, for it is not what pagemill tune writes"):
        assert tuned.wide_rows(CARD) == configs.wide_rows(CARD)
    assert tuned.paged(CARD, decoding=True) == configs.paged(CARD, decoding=True)
