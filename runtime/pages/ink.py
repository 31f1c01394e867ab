"""What lies on a page before any model looks: ink, lines, the height of its text.

1. The page is thinned to about two million grey samples, by stride: no average, so a large scan is not read whole.
2. Ink is what differs from the paper of its surroundings. Paper is the closing of tile maxima (the opening of tile minima
   where the dark majority is the ground), so tint, shadows and white type on dark boxes need no special case; how much must
   differ follows from the noise of the quietest tiles and from the contrast around.
3. Ink becomes one bit a sample, 64 samples a machine word. Lone samples, long vertical rules, dark scan borders and specks
   without the extent of a glyph are taken out by word-wide shifts and ANDs.
4. Text is where rows cross many strokes: in every strip of one word's width, the ink runs of each row are counted, and the
   rows with at least half of the busiest row's make the body of a line. All heights are statistics over many such bodies,
   which a photo or a stamp among them does not move.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Tiles = npt.NDArray[Any]  # signed integers, one a tile
Words = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]
Counts = npt.NDArray[np.int32]

_SAMPLES = 2_400_000  # A4 at 150 dpi is looked at whole
_TILE = 16  # samples a side, about 3 mm
_BAND = 64  # rows turned grey at once
_WORD = 64  # samples in a machine word, and a strip's width: narrow, so that a tilted line stays level inside
_LEAST_CONTRAST = 22  # of 255: below lies what shines through from the back of a sheet
_SURE_NOISE = 60  # more could be faint type all over the page
_MOST_NOISE = 150
_GLYPH = 4  # samples that a glyph extends at least, up or across: 7-point type at 72 dpi
_GLYPH_SHARE = 0.003  # and of the page's height: 0.9 mm of A4
_ALIGNED = 4  # ink runs in one row of one strip that chance does not put there
_EDGE = 48  # samples of an edge that letters cut by it do not fill
_DASH = 12  # a level run of ink is a rule from here
_DASHES = (8.0, 16.0)  # least and most width of a typed one
_RULE = 96  # longest upright stroke of a glyph, in samples
_LETTERS = 8  # a strip is at least as wide as this many bodies are high
_UPRIGHT = 0.75  # most width of a stroke for its height
_HAIR = 0.05  # and least
_SMALL = 0.1
_LEVEL = 0.3  # share of strokes that must agree on a height
_STROKES = 1.9  # ink runs that a row crosses in one character of running text, mean


@dataclass(frozen=True, slots=True)
class PageInk:
    """Statistics of one page; lengths in pixels of the page as it was given."""

    coverage: float
    """Share of the page that is ink, without dark scan borders and specks."""
    ink_pixels: int
    """The same in pixels."""
    box: tuple[int, int, int, int] | None
    """Top, left, bottom, right (exclusive) of what is printed; None for a blank page."""
    text_height: float | None
    """Median height of the bodies of text lines: the rows of a line that cross at least half as many strokes as its busiest
    one. That is the x-height of lower-case type and the height of capitals and digits in lines of those. None without text."""
    small_height: float | None
    """The same for the smallest type: a tenth of the text is no higher. Where lower case and capitals mix it is the x-height."""
    num_lines: int
    """Pieces of text lines: a line counts anew after a gap of more than about 64 samples."""
    num_glyphs: int
    """Estimated characters, without spaces."""
    num_rule_glyphs: int
    """Twice the characters (_ - .) that the page's level rules would be if they were typed: an upper bound."""
    blank: bool
    """Nothing is printed: paper, noise, specks, shadows and scan borders at most."""


_BLANK = PageInk(0.0, 0, None, None, None, 0, 0, 0, True)


def measure_ink(rgb: Bytes) -> PageInk:
    """Measure a page, uint8 [H, W, 3], RGB.

    Text turned by 90 degrees is measured across its own lines, like any other. Text tilted by a few degrees is, too. The
    smallest type whose height is measured has bodies of about 3 samples.
    """
    height, width = rgb.shape[:2]
    if height < 2 * _GLYPH or width < 2 * _GLYPH:
        return _BLANK
    rows_each, columns_each = _strides(height, width)
    grey = _grey(rgb[::rows_each, ::columns_each])
    sampled_height, sampled_width = -(-height // rows_each), -(-width // columns_each)
    mask = _ink(grey)
    mask[sampled_height:] = mask[:, sampled_width:] = False
    _drop_edges(mask[:sampled_height, :sampled_width])
    ink = _content(_words(mask), glyph=max(_GLYPH, round(_GLYPH_SHARE * sampled_height)))
    if not ink.any():
        return _BLANK

    rows = np.flatnonzero(ink.any(axis=1))
    columns = np.flatnonzero(np.unpackbits(_octets(np.bitwise_or.reduce(ink, axis=0)[None])[0]))
    box = (
        int(rows[0]) * rows_each,
        int(columns[0]) * columns_each,
        min(int(rows[-1] + 1) * rows_each, height),
        min(int(columns[-1] + 1) * columns_each, width),
    )
    inked = int(_count(ink).sum())

    text, unit = _lines(_without_rules(ink)), rows_each
    if text.level < 0.6:
        turned = _lines(_without_rules(_turn(ink)))
        if turned.level > 1.3 * max(text.level, _LEVEL):
            text, unit = turned, columns_each
    wide = _wide(ink, _DASH)
    rules = int(_count(wide & ~_down(wide)).sum())
    return PageInk(
        coverage=inked / (sampled_height * sampled_width),
        ink_pixels=inked * rows_each * columns_each,
        box=box,
        text_height=text.height * unit if text.height else None,
        small_height=text.small * unit if text.small else None,
        num_lines=text.pieces,
        num_glyphs=round(text.strokes / _STROKES),
        num_rule_glyphs=round(2 * rules / min(max(text.height or 0.0, _DASHES[0]), _DASHES[1])),
        blank=False,
    )


def plausible_output_chars(ink: PageInk) -> int:
    """Return a generous upper bound of the characters that a page with this ink holds."""
    bound = 400 + 4 * ink.num_glyphs + ink.num_rule_glyphs
    if ink.text_height is None:  # letters too small or blurred to be told apart, or a photo
        bound += ink.ink_pixels // 4
    return bound


def _strides(height: int, width: int) -> tuple[int, int]:
    """Return every how many-th row and column to look at: rows first stay, since heights are measured along them."""
    rows = max(1, round((height * width / _SAMPLES) ** 0.5))
    return rows, max(1, -(-height * width // (_SAMPLES * rows)))


def _grey(rgb: Bytes) -> Bytes:
    """Return (R + 2 G + B) / 4, padded by its last row and column to whole tiles and words."""
    height, width = rgb.shape[:2]
    grey = np.empty((-(-height // _TILE) * _TILE, -(-width // _WORD) * _WORD), np.uint8)
    for top in range(0, height, _BAND):  # band by band, so that the page comes into the cache once
        part = rgb[top : top + _BAND]
        band = grey[top : top + len(part), :width]
        band[...] = part[..., 1]
        band >>= 1
        for channel in (0, 2):
            plane = part[..., channel].copy()
            plane >>= 2
            band += plane
    grey[:height, width:] = grey[:height, width - 1 : width]
    grey[height:] = grey[height - 1]
    return grey


def _ink(grey: Bytes) -> npt.NDArray[np.bool_]:
    """Tell ink from paper, bool of the shape of `grey`."""
    height, width = grey.shape
    bands = grey.reshape(height // _TILE, _TILE, width)
    per_tile = (height // _TILE, width // _TILE, _TILE)
    top = bands.max(axis=1).reshape(per_tile).max(axis=2).astype(np.int16)
    low = bands.min(axis=1).reshape(per_tile).min(axis=2).astype(np.int16)
    mean = bands.sum(axis=1, dtype=np.uint16).reshape(per_tile).sum(axis=2, dtype=np.int32) // _TILE**2

    noise = _noise(top, mean, low)
    above, below = _around(top, np.maximum), _around(low, np.minimum)
    light, dark = _around(above, np.minimum), _around(below, np.maximum)
    contrast = above - below
    threshold = np.maximum(max(_LEAST_CONTRAST, noise), contrast * 2 // 5)
    # Beyond the page lies paper, so that a thin dark border at an edge is ink and not the ground.
    ground = _around(mean, np.add, outside=int(np.median(mean)))
    on_dark = ground * 2 < 9 * (above + below) - 9 * contrast // 8
    floor = np.where(on_dark, 0, light - threshold).clip(0, 255).astype(np.uint8)
    is_ink = bands < np.repeat(floor, _TILE, axis=1)[:, None]
    if on_dark.any():
        ceiling = np.where(on_dark, dark + threshold, 255).clip(0, 255).astype(np.uint8)
        is_ink |= bands > np.repeat(ceiling, _TILE, axis=1)[:, None]
    _drop_borders(is_ink, top, mean)
    return is_ink.reshape(height, width)


def _noise(top: Tiles, mean: Tiles, low: Tiles) -> int:
    """Return how far below the lightest sample of a tile noise reaches."""
    quiet = int(np.percentile(top - low, 5)) * 4 // 3
    # Noise lies on both sides of a tile's mean, letters on one. JPEG takes it out of some tiles and leaves it in others.
    even = 2 * np.minimum(top - mean, mean - low)
    least, usual = (int(value) for value in np.percentile(even, (10, 40)))
    if quiet > _SURE_NOISE:
        return max(_SURE_NOISE, min(least * 4 // 3, quiet, _MOST_NOISE))
    return max(quiet, min(2 * usual, _SURE_NOISE))


def _around(tiles: Tiles, take: np.ufunc, outside: int | None = None) -> Tiles:
    """Combine every tile with its eight neighbours; beyond the page lies `outside`, or the edge once more."""
    if outside is None:
        padded = np.pad(tiles, 1, mode="edge")
    else:
        padded = np.pad(tiles, 1, constant_values=outside)
    rows = take(take(padded[:-2], padded[1:-1]), padded[2:])
    return np.asarray(take(take(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:]))


def _drop_borders(bands: npt.NDArray[np.bool_], top: Tiles, mean: Tiles) -> None:
    """Clear the ink of dark borders: solid dark tiles in line with the edge of a light page, and those beside them."""
    paper = int(np.median(top))
    solid = (top < paper - 60) & (mean > top - 40)
    if paper < 120 or not solid.any():
        return
    border = np.zeros_like(solid)
    for axis in (0, 1):
        border |= np.logical_and.accumulate(solid, axis=axis)
        border |= np.flip(np.logical_and.accumulate(np.flip(solid, axis), axis=axis), axis)
    border = _around(border.astype(np.int8), np.maximum).astype(np.bool_)
    bands &= ~np.repeat(border, _TILE, axis=1)[:, None]


def _drop_edges(mask: npt.NDArray[np.bool_]) -> None:
    """Clear borders thinner than a tile, and their fringe: what reaches straight in from a long stretch of an edge."""
    for side in (mask, mask[::-1], mask.T, mask.T[::-1]):
        starts, ends = _spans(np.pad(side[0], 1))
        for start, end in zip((starts - 1).tolist(), (ends - 1).tolist(), strict=True):
            if end - start >= _EDGE:
                reach = np.logical_and.accumulate(side[: 2 * _TILE, start:end], axis=0)
                reach[2:] |= reach[:-2].copy()
                first, last = max(0, start - 2), min(side.shape[1], end + 2)
                around = np.pad(reach, ((0, 0), (start - first, last - end)), mode="edge")
                side[: 2 * _TILE, first:last] &= ~around


def _words(mask: npt.NDArray[np.bool_]) -> Words:
    """Pack a mask into words [H, W / 64], the leftmost sample in the highest bit."""
    return np.packbits(mask, axis=1).view(">u8").astype(np.uint64)


def _octets(words: Words) -> Bytes:
    return words.astype(">u8").view(np.uint8)


def _left(words: Words, by: int = 1) -> Words:
    """Move every sample left: each place holds what was `by` places right of it."""
    moved = words << np.uint64(by)
    moved[:, :-1] |= words[:, 1:] >> np.uint64(_WORD - by)
    return moved


def _right(words: Words, by: int = 1) -> Words:
    moved = words >> np.uint64(by)
    moved[:, 1:] |= words[:, :-1] << np.uint64(_WORD - by)
    return moved


def _up(words: Words, by: int = 1) -> Words:
    moved = np.zeros_like(words)
    moved[:-by] = words[by:]
    return moved


def _down(words: Words, by: int = 1) -> Words:
    moved = np.zeros_like(words)
    moved[by:] = words[:-by]
    return moved


def _tall(words: Words, length: int) -> Words:
    """Keep the top of every upright run of at least `length` samples (a power of two, or half as much again)."""
    run, reach = words, 1
    while reach < length:
        step = min(reach, length - reach)
        run, reach = run & _up(run, step), reach + step
    return run


def _wide(words: Words, length: int) -> Words:
    run, reach = words, 1
    while reach < length:
        step = min(reach, length - reach)
        run, reach = run & _left(run, step), reach + step
    return run


def _content(ink: Words, glyph: int) -> Words:
    """Take out lone samples, and whatever is not near something of a glyph's extent."""
    ink = ink & (_left(ink) | _right(ink) | _up(ink) | _down(ink))
    grown = ink | _up(ink) | _down(ink) | _left(ink) | _right(ink)
    seeds = _tall(grown, glyph + 2) | _wide(grown, glyph + 2)
    tiles = seeds.shape[0] // _TILE
    # A row of points is print, though no point alone is.
    seeds[_count(ink & ~_right(ink)) >= _ALIGNED] = ~np.uint64(0)
    seeded = np.bitwise_or.reduce(seeds.reshape(tiles, _TILE, -1), axis=1).astype(">u8").view(">u2") != 0
    near = _around(seeded.astype(np.int8), np.maximum)
    keep = (near.astype(np.uint16) * np.uint16(0xFFFF)).astype(">u2").view(">u8")
    ink = ink & np.repeat(keep.astype(np.uint64), _TILE, axis=0)
    return ink


def _without_rules(ink: Words) -> Words:
    """Take out upright runs too long for a letter, and the samples beside them."""
    rule = run = _tall(ink, _RULE)
    if not run.any():
        return ink
    reach = 1
    while reach < _RULE:
        step = min(reach, _RULE - reach)
        rule, reach = rule | _down(rule, step), reach + step
    return ink & ~(rule | _left(rule) | _right(rule))


def _turn(ink: Words) -> Words:
    """Turn the page by 90 degrees."""
    mask = np.unpackbits(_octets(ink), axis=1)
    turned = np.zeros((mask.shape[1], -(-mask.shape[0] // _WORD) * _WORD), np.uint8)
    turned[:, : mask.shape[0]] = mask.T
    return _words(turned.view(np.bool_))


def _count(words: Words) -> Counts:
    """Return the number of samples in each word (numpy has no population count before 2.0)."""
    pairs, fours, bytes_ = np.uint64(0x5555 * 0x1000100010001), np.uint64(0x3333 * 0x1000100010001), 0x0F0F
    sums = words - ((words >> np.uint64(1)) & pairs)
    sums = (sums & fours) + ((sums >> np.uint64(2)) & fours)
    sums = (sums + (sums >> np.uint64(4))) & np.uint64(bytes_ * 0x1000100010001)
    sums *= np.uint64(0x0101010101010101)
    return np.asarray(sums >> np.uint64(56), np.int32)


@dataclass(frozen=True, slots=True)
class _Text:
    """What the strips of a page have in common; lengths in samples."""

    height: float | None = None
    small: float | None = None
    pieces: int = 0
    strokes: float = 0.0
    level: float = 0.0
    """Share of all strokes crossed that lie in bodies of about the median height: 0.4 to 1 for level lines."""


def _lines(ink: Words) -> _Text:
    """Find the text lines in strips as wide as their letters need: several to a strip, yet narrow."""
    runs, filled = _count(ink & ~_right(ink)), _count(ink)
    text, words = _bodies(runs, filled), 1
    while words < runs.shape[1] and (text.height is None or text.height * _LETTERS > _WORD * words):
        words *= 2
        first = np.arange(0, runs.shape[1], words)
        wider = _bodies(np.add.reduceat(runs, first, axis=1), np.add.reduceat(filled, first, axis=1))
        if wider.level < text.level:
            break
        text = wider
    return text


def _bodies(runs: Counts, filled: Counts) -> _Text:
    """Measure lines by the number of ink runs and of ink samples in each row of each strip, [H, strips]."""
    height, strips = runs.shape
    stride = height + 2
    profile, ink = np.zeros((2, strips, stride), np.int32)  # strip after strip, apart by empty rows
    profile[:, 1:-1], ink[:, 1:-1] = runs.T, filled.T
    profile, ink = profile.reshape(-1), ink.reshape(-1)
    starts, ends = _spans(profile > 0)
    if not len(starts):
        return _Text()
    busiest = np.repeat(np.maximum.reduceat(profile, starts), ends - starts)
    body = np.zeros(len(profile), np.bool_)
    inked = profile > 0
    body[inked] = (2 * profile[inked] >= busiest) & (busiest >= _ALIGNED - 1)
    starts, ends = _spans(body)
    size = ends - starts
    fits = (size >= 2) & (size <= _RULE)
    starts, ends, size = starts[fits], ends[fits], size[fits]
    if not len(starts):
        return _Text()

    crossed, covered = (np.add.reduceat(counts, _pairs(starts, ends))[::2] for counts in (profile, ink))
    strokes = crossed / size
    before = np.zeros(len(profile) + 1, np.int64)
    before[starts + 1] = 1
    before = before.cumsum()
    # A piece of a line begins where the strip to the left has no body in these rows.
    left = before[np.maximum(ends - stride, 0)] - before[np.maximum(starts - stride - size, 0)]
    pieces = int((left == 0).sum())

    upright = (
        covered < _UPRIGHT * size * crossed
    )  # letters are made of strokes taller than wide; dashes and blobs are not
    if not upright.any():
        return _Text(None, None, pieces, float(strokes.sum()))
    heights, weights, mass = size[upright], strokes[upright], crossed[upright]
    order = np.argsort(heights)
    heights, weights, mass = heights[order], weights[order], mass[order]
    reached = weights.cumsum() / weights.sum()

    def height_at(share: float) -> float:
        at = int(heights[np.searchsorted(reached, share)])
        near = np.abs(heights - at) <= max(1.0, 0.15 * at)  # the mean around it tells fractions of a sample
        return float(np.average(heights[near], weights=weights[near]))

    median = height_at(0.5)
    level = float(mass[np.abs(heights - median) <= max(1.0, 0.3 * median)].sum() / profile.sum())
    if level < _LEVEL:
        return _Text(None, None, pieces, float(strokes.sum()), level)
    return _Text(median, min(height_at(_SMALL), median), pieces, float(strokes.sum()), level)


def _pairs(starts: Ints, ends: Ints) -> Ints:
    return np.stack([starts, ends], axis=1).reshape(-1)


def _spans(mask: npt.NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """Return where the runs of true start, and where they end (exclusive); the mask starts and ends false."""
    edges = np.flatnonzero(mask[1:] != mask[:-1]) + 1
    return edges[::2], edges[1::2]
