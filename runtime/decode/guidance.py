"""Output that conforms to a grammar: the page's JSON, a user's JSON schema, or a regular expression.

Token masks come from llguidance: an Earley parser over a lexer of regular-expression derivatives, which walks the trie of the
vocabulary (github.com/guidance-ai/llguidance). White space between JSON tokens is fixed, because free white space is a known
way into endless loops. A second matcher of the same grammar, over single bytes instead of tokens, finds how an output that was
cut ends properly: breadth first for the shortest text, then depth first with the bytes that close things tried first.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from heapq import heappop, heappush
from typing import Any, Literal

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pagemill.errors import ConfigError, RequestError, printable

MAX_GUIDANCE_CHARS = 1 << 18
"""Longest JSON schema (as compact JSON) or regular expression that is accepted."""

# A grammar that needs more is refused, or ends its page with an error: at most some ten milliseconds a mask and some ten
# megabytes a sequence. The page's own grammar stays far below.
_LIMITS: dict[str, Any] = dict(
    initial_lexer_fuel=1_000_000, step_lexer_fuel=200_000, step_max_items=50_000, max_items_in_row=2_000,
    max_lexer_states=50_000, max_grammar_size=200_000, verbose_errors=False,
)  # fmt: skip
_MAX_CACHED = 64
_MAX_LOCATED = 256  # subschemas compiled to find the place of an error
_BREADTH, _DEPTH = 10_000, 20_000  # most bytes tried by each of the two searches for an ending

# Escapes as JSON has them, except that halves of surrogate pairs come only in pairs: every output can be written as UTF-8.
_CHAR = (
    r'[^"\\\x00-\x1f]|\\(["\\\/bfnrt]|u([0-9a-cefA-CEF][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2}'
    r"|[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}))"
)
_SEPARATOR = re.compile(r"[ \t\n\r]*[,:][ \t\n\r]*")
_PIECE = re.compile(rb'[{}\[\]:,]|"(?:[^"\\]|\\.)*+("?)', re.DOTALL)
_CLOSED = re.compile(rb'"(?:[^"\\]|\\(?:[^u]|u[0-9a-fA-F]{4}))*+"', re.DOTALL)
_SUBSCHEMAS = ("items", "additionalProperties", "contains", "not", "if", "then", "else", "propertyNames")
_SUBSCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SUBSCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


@dataclass(frozen=True)
class PageFormat:
    """How one model writes a page's JSON (a per-model setting). Raises `ConfigError` on what is not JSON."""

    keys: tuple[str, ...] = ("header", "margin", "footer", "text")
    order: Literal["fixed", "any"] = "any"
    """fixed: in the order of `keys`."""
    optional: bool = True
    """Whether keys may be missing. `text` never may, if it is a key; else at least one key is there."""
    item_separator: str = ", "
    key_separator: str = ": "

    def __post_init__(self) -> None:
        if not 0 < len(self.keys) <= 32 or len(set(self.keys)) < len(self.keys) or not all(self.keys):
            raise ConfigError(f"PageFormat: keys should be 1 to 32 different names, got {self.keys!r}")
        if self.order not in ("fixed", "any"):
            raise ConfigError(f"PageFormat: order should be 'fixed' or 'any', got {self.order!r}")
        for name, sign in (("item_separator", ","), ("key_separator", ":")):
            value = getattr(self, name)
            if not _SEPARATOR.fullmatch(value) or sign not in value:
                raise ConfigError(
                    f"PageFormat: {name} should be {sign!r} with white space around it, got {value!r}"
                )


@dataclass(frozen=True)
class Regex:
    """A regular expression that the whole output matches (syntax of Rust's regex crate, without look-around)."""

    pattern: str


Guidance = Literal["page"] | Mapping[str, Any] | Regex
"""What an output conforms to: the page's schema, a JSON schema (draft 2020-12), or a regular expression."""


class Grammar:
    """A compiled guidance, to start guides from. Shared by threads."""

    def __init__(
        self, source: str, matcher: LLMatcher, by_bytes: Callable[[], LLMatcher], is_json: bool
    ) -> None:
        self.source, self.is_json = source, is_json
        self._matcher, self._make_bytes = matcher, by_bytes
        self._bytes: LLMatcher | None = None
        self._lock = threading.Lock()

    def matcher(self) -> LLMatcher:
        """Return a matcher over tokens, at the beginning."""
        with self._lock:
            return self._matcher.deep_copy()

    def byte_matcher(self) -> LLMatcher:
        """Return a matcher whose tokens are the 256 bytes, at the beginning."""
        with self._lock:
            if self._bytes is None:
                self._bytes = self._make_bytes()
            return self._bytes.deep_copy()


class GuideFactory:
    """Compiles guidance for one tokenizer and model; one per engine, shared by its threads.

    `vocab_size` is the width of the model's logits; ids without a token, and special tokens other than `stop_ids`, are
    never allowed. Raises `ConfigError` if the tokenizer has more tokens than the model.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int], page: PageFormat
    ) -> None:
        if not stop_ids or not all(0 <= i < vocab_size for i in stop_ids):
            raise ConfigError(f"stop ids {sorted(stop_ids)} are not all in a vocabulary of {vocab_size}")
        highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if highest >= vocab_size:
            raise ConfigError(f"the tokenizer has token {highest}, the model only {vocab_size} logits")
        self.vocab_size, self.num_words, self.page = vocab_size, -(-vocab_size // 32), page
        self.stop_ids = tuple(sorted(stop_ids, reverse=True))
        """Highest first: the first one is what ends an output that is complete."""
        description = tokenizer.to_str()
        if tokenizer.truncation or tokenizer.padding:
            description = json.dumps({**json.loads(description), "truncation": None, "padding": None})
        self.tokenizer = LLTokenizer(
            description, vocab_size, list(self.stop_ids), slices=LLTokenizer.json_slices()
        )
        self._limits = LLParserLimits(**_LIMITS)
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[str, int | None], Grammar] = OrderedDict()

    def compile(self, guidance: Guidance, max_chars: int | None = None) -> Grammar:
        """Compile `guidance`, or find it compiled.

        `max_chars` bounds each string value of the page, and in a schema the strings without pattern, format, enum or
        constant; regular expressions have their own bounds. A bound makes the masks of large vocabularies slower
        (bench/results/guidance.md), so bounds that are far away are better left to the token budget. Raises `RequestError`
        that names the place of what is wrong.
        """
        if max_chars is not None and max_chars < 1:
            raise RequestError(f"guidance: max_chars should be at least 1, got {max_chars}")
        source = _source(guidance)
        with self._lock:
            found = self._cache.get((source, max_chars))
            if found is not None:
                self._cache.move_to_end((source, max_chars))
                return found
        grammar = self._compile(guidance, source, max_chars)
        with self._lock:
            self._cache[source, max_chars] = grammar
            while len(self._cache) > _MAX_CACHED:
                self._cache.popitem(last=False)
        return grammar

    def start(self, grammar: Grammar) -> Guide:
        """Begin one sequence."""
        return Guide(self, grammar)

    def _compile(self, guidance: Guidance, source: str, max_chars: int | None) -> Grammar:
        if isinstance(guidance, Regex):
            text = LLMatcher.grammar_from_regex(guidance.pattern)
        elif isinstance(guidance, Mapping):
            text = self._schema_grammar(json.loads(source), max_chars)
        else:
            text = LLMatcher.grammar_from_lark(_page_grammar(self.page, max_chars))
        matcher = LLMatcher(self.tokenizer, text, log_level=0, limits=self._limits)
        if matcher.is_error():
            error = matcher.get_error()
            if isinstance(guidance, Mapping):
                raise RequestError(f"JSON schema{self._place(json.loads(source), error)}: {_sentence(error)}")
            raise RequestError(
                f"regular expression {_shown(source)}{_column(source, error)}: {_sentence(error)}"
            )
        trial = matcher.deep_copy()
        if not any(trial.compute_bitmask()) or trial.is_error():
            raise RequestError(
                f"guidance: {_shown(source)} matches no output at all, or is too complex to begin"
            )
        limits = self._limits
        return Grammar(
            source,
            matcher,
            lambda: LLMatcher(_byte_tokenizer(), text, log_level=0, limits=limits),
            is_json=not isinstance(guidance, Regex),
        )

    def _schema_grammar(self, schema: dict[str, Any], max_chars: int | None) -> str:
        if max_chars is not None:
            for _, part in _subschemas(schema):
                types = part.get("type")
                is_string = types == "string" or (isinstance(types, list) and "string" in types)
                if is_string and not part.keys() & {"pattern", "format", "enum", "const"}:
                    lengths = [part.get(name) for name in ("minLength", "maxLength")]
                    least, most = (n if isinstance(n, int) else None for n in lengths)
                    part["maxLength"] = max(least or 0, min(max_chars, max_chars if most is None else most))
        options: Any = dict(
            whitespace_flexible=False,
            item_separator=self.page.item_separator,
            key_separator=self.page.key_separator,
        )
        schema = {name: value for name, value in schema.items() if name != "x-guidance"}
        try:
            return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
        except ValueError as error:
            raise RequestError(f"JSON schema: {_sentence(str(error))}") from None

    def _place(self, schema: dict[str, Any], error: str) -> str:
        """Say where in `schema` the error is: the deepest part that alone fails in the same way."""
        shared: dict[str, Any] = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
        place = ""
        for count, (pointer, part) in enumerate(_subschemas(schema)):
            if count > _MAX_LOCATED:
                break
            if pointer.startswith(place + "/"):
                alone = self._schema_grammar({**shared, **part}, None)
                matcher = LLMatcher(self.tokenizer, alone, log_level=0, limits=self._limits)
                if matcher.get_error() == error:
                    place = pointer
        return f" at {printable(place)}" if place else ""


class Guide:
    """One sequence's state in its grammar. One thread at a time."""

    def __init__(self, factory: GuideFactory, grammar: Grammar) -> None:
        self._factory, self._grammar = factory, grammar
        self._matcher = grammar.matcher()
        self._tokens: list[int] = []
        self._stopped = False  # the last token is a stop token; the matcher never sees it

    @property
    def ended(self) -> bool:
        """Whether the output is complete and nothing but the end token may follow, or it has followed."""
        return self._stopped or (self._matcher.is_stopped() and not self._matcher.is_error())

    @property
    def output(self) -> bytes:
        """The bytes of the tokens so far, the end token left out."""
        return self._factory.tokenizer.decode_bytes(self._tokens[: len(self._tokens) - self._stopped])

    @property
    def text(self) -> str:
        """The output so far without an incomplete last character: what `closing` completes."""
        return self.output.decode(errors="ignore")

    def masks(self, draft: Sequence[int], out: NDArray[np.int32]) -> int:
        """Fill `out[0]` with the tokens allowed now and `out[i]` with those allowed after `draft[:i]`.

        `out` is int32 `[1 + len(draft), num_words]`, C-contiguous; bit t % 32 of word t // 32 is token t. Returns how many rows
        are filled: no row follows a draft token that is not allowed or ends the output. The state is unchanged. Releases the
        interpreter lock while it computes. Raises `RequestError` if the grammar exceeds its limits here.
        """
        rows, words = 1 + len(draft), self._factory.num_words
        if out.dtype != np.int32 or out.shape != (rows, words) or not out.flags.c_contiguous:
            raise ValueError(f"masks are int32 [{rows}, {words}], got {out.dtype} {list(out.shape)}")
        if self._stopped:
            raise AssertionError("masks asked for after the end token")
        matcher, address = self._matcher, out.ctypes.data
        matcher.unsafe_compute_mask_ptr(address, 4 * words)
        filled = 1
        for token in draft:
            if token in self._factory.stop_ids or not matcher.try_consume_tokens([token]):
                break
            matcher.unsafe_compute_mask_ptr(address + 4 * words * filled, 4 * words)
            filled += 1
        if filled > 1:
            matcher.rollback(filled - 1)
        self._check()
        return filled

    def open_draft(self, draft: Sequence[int]) -> int:
        """Return how many tokens of `draft` may be verified at once: all are allowed, and after none of them anything is forced.

        A forced token is not the model's to choose, so none may come of a draft. The state is unchanged. Raises `RequestError`
        if the grammar exceeds its limits here.
        """
        if self._stopped:
            return 0
        matcher, taken, forces = self._matcher, 0, False
        for token in draft:
            if token in self._factory.stop_ids or not matcher.try_consume_tokens([token]):
                break
            taken += 1
            forces = matcher.is_stopped() or bool(matcher.compute_ff_tokens())
            if forces:
                break
        self._check()
        if taken:
            matcher.rollback(taken)
        return taken - forces

    def accept(self, token_ids: Sequence[int]) -> None:
        """Go on by tokens that the masks allow. Raises `AssertionError` for others, and then accepts none."""
        tokens = list(token_ids)
        stops = bool(tokens) and tokens[-1] in self._factory.stop_ids
        inner = tokens[: len(tokens) - stops]
        taken = 0 if self._stopped else self._matcher.try_consume_tokens(inner)
        self._check()
        if tokens and (self._stopped or taken < len(inner) or (stops and not self._matcher.is_accepting())):
            self._matcher.rollback(taken)
            raise AssertionError(f"token {tokens[taken]} at {taken} of {len(tokens)} is not allowed here")
        self._tokens += tokens
        self._stopped = stops

    def forced(self) -> list[int]:
        """Return the tokens that must follow now, as the tokenizer writes their text; the end token once nothing else may.

        Tokens whose writing depends on what comes after the forced text are left out.
        """
        if self._stopped:
            return []
        if self.ended:
            return [self._factory.stop_ids[0]]
        tokens = self._matcher.compute_ff_tokens()
        # A tokenizer that normalises may write other text than what is forced.
        return tokens if not tokens or self._matcher.validate_tokens(tokens) == len(tokens) else []

    def rollback(self, num_tokens: int) -> None:
        """Undo the last `num_tokens` accepted tokens."""
        if not 0 <= num_tokens <= len(self._tokens):
            raise AssertionError(f"cannot undo {num_tokens} of {len(self._tokens)} tokens")
        if num_tokens:
            self._matcher.rollback(num_tokens - self._stopped)
            del self._tokens[len(self._tokens) - num_tokens :]
            self._stopped = False

    def end_string(self) -> list[int]:
        """Return tokens that properly end the JSON string value being written now, its closing quote included.

        `[]` when not inside a string value, or where the grammar does not let it end (a minimum length, a pattern).
        """
        output = self.output
        start = _open_value(output) if self._grammar.is_json and not self._stopped else None
        if start is None:
            return []
        ending = _search(
            self._at(output), True, lambda _, more: _CLOSED.fullmatch(output[start:] + more) is not None
        )
        if not ending:
            return []
        tokens = self._factory.tokenizer.tokenize_bytes(ending)
        return tokens if self._matcher.validate_tokens(tokens) == len(tokens) else []

    def closing(self) -> str | None:
        """Return the shortest text found that makes the output so far complete and valid, "" if it is already.

        It follows `text`: an incomplete last character counts as not written. None if no ending was found within bounds (10,000
        bytes tried breadth first, then 20,000 depth first), which cannot happen for the page.
        """
        if self._stopped or (self._matcher.is_accepting() and not self._matcher.is_error()):
            return ""
        ending = _search(
            self._at(self.text.encode()), self._grammar.is_json, lambda matcher, _: matcher.is_accepting()
        )
        return None if ending is None else ending.decode()

    def _at(self, output: bytes) -> LLMatcher:
        matcher = self._grammar.byte_matcher()
        matcher.consume_tokens(list(output))
        return matcher

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(
                f"guidance: {_shown(self._grammar.source)} is too complex to follow after "
                f"{len(self._tokens)} tokens: {_sentence(self._matcher.get_error())}"
            )


def _page_grammar(page: PageFormat, max_chars: int | None) -> str:
    """Write the page as a Lark grammar with a parameter: the set of keys already written, one bit a key."""
    count = "*" if max_chars is None else f"{{0,{max_chars}}}"
    number = len(page.keys)
    text = page.keys.index("text") if "text" in page.keys else None

    def member(i: int) -> str:
        key = json.dumps(
            json.dumps(page.keys[i], ensure_ascii=False) + page.key_separator, ensure_ascii=False
        )
        allowed = f"bit_clear({i})"
        if page.order == "fixed":
            allowed = f"is_zeros([{i}:{number}])"
            if i and not page.optional:
                allowed = f"and({allowed}, is_ones([0:{i}]))"
            elif text is not None and i > text:
                allowed = f"and({allowed}, bit_set({text}))"
        return f"{key} VALUE more::set_bit({i}) %if {allowed}"

    complete = f"is_ones([0:{number}])"
    if page.optional:
        complete = "bit_count_ge(_, 1)" if text is None else f"bit_set({text})"
    separator = json.dumps(page.item_separator)
    members = [member(i) for i in range(number)]
    return "\n".join(
        [
            'start: "{" first::0x0 "}"',
            "first::_: " + "\n | ".join(members),
            "more::_: " + "\n | ".join([f'"" %if {complete}', *(f"{separator} {m}" for m in members)]),
            f'VALUE: /"({_CHAR}){count}"|null/',
        ]
    )


def _source(guidance: Guidance) -> str:
    """Return what tells `guidance` from others, checked for type and size."""
    if isinstance(guidance, Regex):
        text = guidance.pattern
    elif isinstance(guidance, Mapping):
        try:
            text = json.dumps(guidance, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(
                f"JSON schema: it cannot be written as JSON, {printable(str(error))}"
            ) from None
    elif guidance == "page":
        return guidance
    else:
        raise RequestError(
            f"guidance should be 'page', a JSON schema or a Regex, got {_shown(repr(guidance))}"
        )
    if len(text) > MAX_GUIDANCE_CHARS:
        raise RequestError(f"guidance of {len(text)} characters; {MAX_GUIDANCE_CHARS} are the limit")
    return text


def _shown(source: str) -> str:
    text = printable(source)
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _sentence(error: str) -> str:
    """Return what a message of llguidance says, on one line."""
    lines = error.strip().splitlines() or ["unknown error"]
    said = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return printable(re.sub(r"^at \d+\(\d+\): (invalid regex .*? \(in regex\): )?", "", said))[:300]


def _column(pattern: str, error: str) -> str:
    """Say at which character of `pattern` the error is; nothing where the message quotes the pattern changed."""
    marks = re.search(rf"\n    {re.escape(pattern)}\n    ( *)\^", error)
    return f" at character {len(marks[1]) + 1}" if marks else ""


def _subschemas(schema: object, pointer: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every subschema with its JSON pointer, outer before inner."""
    stack = [(pointer, schema)]
    while stack:
        pointer, part = stack.pop()
        if not isinstance(part, dict):
            continue
        yield pointer, part
        inner = [(f"{pointer}/{name}", part[name]) for name in _SUBSCHEMAS if name in part]
        for name in _SUBSCHEMA_LISTS:
            if isinstance(part.get(name), list):
                inner += [(f"{pointer}/{name}/{i}", value) for i, value in enumerate(part[name])]
        for name in _SUBSCHEMA_MAPS:
            if isinstance(part.get(name), dict):
                keys = {key: key.replace("~", "~0").replace("/", "~1") for key in part[name]}
                inner += [(f"{pointer}/{name}/{keys[key]}", value) for key, value in part[name].items()]
        stack += reversed(inner)


def _open_value(output: bytes) -> int | None:
    """Return where the JSON string value starts that `output` ends in, None if it ends elsewhere."""
    within: list[
        str
    ] = []  # every open bracket: "key" or "value" for what comes next in an object, "item" in an array
    for piece in _PIECE.finditer(output):
        sign = piece[0][:1]
        if sign == b'"':
            if not piece[1]:
                return None if within and within[-1] == "key" else piece.start()
        elif sign in b"{[":
            within.append("key" if sign == b"{" else "item")
        elif sign in b"}]":
            within.pop()
        elif within[-1] != "item":
            within[-1] = "value" if sign == b":" else "key"
    return None


def _search(matcher: LLMatcher, is_json: bool, found: Callable[[LLMatcher, bytes], bool]) -> bytes | None:
    """Return bytes after which `found(matcher, bytes)` holds; `matcher` works on bytes. None within the bounds."""
    here = b""

    def go(there: bytes) -> None:
        nonlocal here
        same, end = 0, min(len(here), len(there))
        while same < end:  # bisect the common beginning
            middle = (same + end + 1) // 2
            same, end = (middle, end) if here[:middle] == there[:middle] else (same, middle - 1)
        if same < len(here):
            matcher.rollback(len(here) - same)
        matcher.consume_tokens(list(there[same:]))
        here = there

    if found(matcher, b""):
        return b""
    visits, seen = 0, set[tuple[int, int, bytes, bytes]]()
    heap = [(0, 0, b"")]  # least length after what must follow, least choice, the bytes
    while heap and visits < _BREADTH:
        _, _, at = heappop(heap)
        go(at)
        for byte in _candidates(matcher.compute_bitmask(), narrow=is_json):
            go(at + byte)
            if found(matcher, here):
                return here
            visits += 1
            mask, forced = matcher.compute_bitmask(), matcher.compute_ff_bytes()
            # Texts of one length, with as many brackets and quotation marks, that may go on alike: one stands for all.
            state = (len(here), sum(map(here.count, b'"{[]}')) - here.count(b'\\"'), mask, forced)
            if state not in seen:
                seen.add(state)
                heappush(heap, (len(here) + len(forced), int.from_bytes(mask, "little").bit_count(), here))
    go(b"")
    path, branches = bytearray(), [iter(_candidates(matcher.compute_bitmask()))]
    for _ in range(_DEPTH):
        byte = next(branches[-1], b"")
        if byte:
            path += byte
            matcher.consume_token(byte[0])
            if found(matcher, bytes(path)):
                return bytes(path)
            branches.append(iter(_candidates(matcher.compute_bitmask())))
        else:
            branches.pop()
            if not branches:
                return None
            matcher.rollback(1)
            path.pop()
    return None


def _candidates(mask: bytes, narrow: bool = False) -> list[bytes]:
    """Return the bytes that a mask over bytes allows, those that lead to an end first; others than ASCII only if they must be.

    `narrow` leaves only the quotation mark and the space within strings of JSON, where all text is alike.
    """
    bits = int.from_bytes(mask, "little")
    allowed = [i for i in _ORDER if bits >> i & 1] or [i for i in range(128, 256) if bits >> i & 1]
    if bits >> 0x5D & 1 and bits >> 0x7D & 1:  # either bracket may follow: text of a string
        within = [i for i in b'" ' if bits >> i & 1]
        allowed = within if narrow else within + [i for i in allowed if i not in within]
    return [_BYTE[i] for i in allowed]


_BYTE = [bytes([i]) for i in range(256)]
_ORDER = [*b'}]",: nft0[{', *(i for i in range(128) if i not in b'}]",: nft0[{')]


class _ByteTokens:
    """The vocabulary of the 256 bytes and an end token, as llguidance asks for it."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, (256,)
    tokens = (*_BYTE, b"<end>")

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@cache
def _byte_tokenizer() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_ByteTokens()), slices=[])
