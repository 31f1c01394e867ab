"""What others published, as points of the same chart: a benchmark_score and a price per page, each with its source.

Scores are those of the DharmaOCR benchmark, prices those of `devices.reference()`; `_PRICED` says which belong together. Services
that sell tokens are put at `INPUT_TOKENS` and `OUTPUT_TOKENS` a page, which gives the 12.48 dollars per 1,000 pages that olmOCR's
authors measured for GPT-4o (tests/cost/test_report.py).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from pagemill.cost.devices import ApiPrice, reference

INPUT_TOKENS, OUTPUT_TOKENS = 1600, 850

_PRICED = {
    "Claude Opus 4.6": ("anthropic", "Claude Opus 4.6"),
    "Gemini 3.1 Pro": ("google", "Gemini 3.1 Pro Preview"),
    "GPT-5.4": ("openai", "GPT-5.4"),
    "GPT-4o": ("openai", "GPT-4o"),
    "Google Vision": ("google", "Cloud Vision document text detection"),
    "Google Document AI": ("google", "Document AI Enterprise Document OCR"),
    "Amazon Textract": ("aws", "Textract DetectDocumentText"),
    "Mistral OCR 3": ("mistral", "Mistral OCR 3"),
    "Mistral OCR 4": ("mistral", "Mistral OCR 4 / 4.1"),
}
"""Model of a score → provider and product of its price."""
_RELATIVE = {"DharmaOCR Lite (3B)": ("DharmaOCR 3B against Claude Opus 4.6", "Claude Opus 4.6")}
"""Model of a score → start of the name of a published ratio, and the model whose price it multiplies."""


@dataclass(frozen=True)
class Published:
    """A model or service as its makers or others describe it. Money in US dollars; None: not published."""

    label: str
    score: float | None
    degeneration_rate: float | None
    score_source: str
    """Empty if there is no score."""
    usd_per_million: float | None
    """Pages, at the list price of the first page."""
    batch_usd_per_million: float | None
    basis: str
    """How the price came about."""
    price_source: str
    tiers: tuple[tuple[float, float], ...] = ()
    """(up to this many pages a month, dollars a page), if the price falls with volume."""

    def usd(self, pages: float) -> float | None:
        """Dollars for that many pages in a month."""
        if self.usd_per_million is None:
            return None
        if not self.tiers:
            return pages / 1e6 * self.usd_per_million
        total, begin = 0.0, 0.0
        for end, per_page in self.tiers:
            total += max(0.0, min(pages, end) - begin) * per_page
            begin = end
        return total


@lru_cache(maxsize=1)
def published() -> tuple[Published, ...]:
    """Return scores and prices, first what has both, the best score first."""
    data = reference()
    prices = {(price.provider, price.product): price for price in data.api_prices}
    rows = []
    for score in data.scores:
        price = prices.pop(_PRICED[score.model], None) if score.model in _PRICED else None
        rows.append(
            _row(score.model, price, score.benchmark_score, score.degeneration_rate, _checked(score))
            if score.model not in _RELATIVE
            else _relative(score.model, score.benchmark_score, score.degeneration_rate, _checked(score))
        )
    rows += [_row(f"{provider}: {product}", price) for (provider, product), price in prices.items()]
    rows.sort(key=lambda row: (row.score is None, row.usd_per_million is None, -(row.score or 0)))
    return tuple(rows)


def _row(
    label: str,
    price: ApiPrice | None,
    score: float | None = None,
    degeneration_rate: float | None = None,
    score_source: str = "",
) -> Published:
    if price is None:
        return Published(label, score, degeneration_rate, score_source, None, None, "", "")
    per_page = price.usd_per_page(INPUT_TOKENS, OUTPUT_TOKENS)
    batch = price.usd_per_page(INPUT_TOKENS, OUTPUT_TOKENS, batch=True)
    by_token = price.usd_per_1k_pages is None
    return Published(
        label,
        score,
        degeneration_rate,
        score_source,
        None if per_page is None else per_page * 1e6,
        None if batch is None else batch * 1e6,
        f"list price of tokens, {INPUT_TOKENS:,} in and {OUTPUT_TOKENS:,} out a page"
        if by_token
        else "list price of a page",
        f"{price.product}, {price.date}: {_checked(price)}",
        tuple(
            (math.inf if (end := tier["up_to_pages_per_month"]) is None else end, dollars / 1000)
            for tier in price.tiers
            if (dollars := tier["usd_per_1k_pages"]) is not None
        ),
    )


def _relative(label: str, score: float, degeneration_rate: float | None, score_source: str) -> Published:
    begin, other = _RELATIVE[label]
    data = json.loads((files("pagemill.cost") / "data" / "reference-numbers.json").read_text("utf-8"))
    ratio = next(row for row in data["published_ratios"] if row["name"].startswith(begin))
    price = next(p for p in reference().api_prices if (p.provider, p.product) == _PRICED[other])
    per_page = price.usd_per_page(INPUT_TOKENS, OUTPUT_TOKENS)
    return Published(
        label,
        score,
        degeneration_rate,
        score_source,
        None if per_page is None else per_page * 1e6 * ratio["value"],
        None,
        f"published ratio: {ratio['value']} × {other}, on its makers' own servers",
        ratio["source"],
    )


def _checked(row: object) -> str:
    """Return a row's source, and how well it was checked if it was not read itself."""
    source, verification = str(getattr(row, "source", "")), str(getattr(row, "verification", ""))
    return source if verification == "read" else f"{source} ({verification})"
