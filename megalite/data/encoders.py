"""From text to token bytes, in three ways that give the same bytes.

`tokenizers`: the library's own batches. `memo`: looks words up in a dict of word -> token bytes, and hands only unknown
ones to the library. `gigatoken`: another implementation, if installed. Whichever is chosen is first held to what the
library gives for a hostile sample. Where it is known how the tokenizer splits text into words, long texts are encoded
in pieces, so that memory does not follow their size.
"""

import functools
import json
import random
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tokenizers import Regex, normalizers

from megalite.data.documents import Cut
from megalite.data.tokenizer import Tokenizer
from megalite.errors import UserError

ENCODERS = ("auto", "tokenizers", "memo", "gigatoken")

CUT_REACH = 2**20  # characters from a text's end in which a cut place is looked for; readers add no more at a time
MEMO_WORD = 64  # characters; a longer word hardly comes twice
MEMO_BYTES = 64_000_000
# gigatoken's own memo grows without bound; in so many characters of random words it came to 160 MB.
GIGATOKEN_RENEWAL = 2**27
PLANES = 0x40000  # code points above hold no letter, number or white space in any version of Unicode

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (  # and OpenAI's cl100k_base as Hugging Face writes it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")

# Neighbours between which text can be cut: no match of the regex holds both, whatever stands around them, and no
# look-ahead gets across: the one there is follows white space, which can't stand before the place, or only as a line
# end in the last two, where line ends are matched without it.
# GPT-2: white space after anything else. The others: the same, but a line end after punctuation belongs to it; and what
# follows a line end and isn't white space.
_LINES_APART = r"\S(?![\r\n])(?=\s)|[\p{L}\p{N}](?=[\r\n])|[\r\n](?=\S)"
CUT_PLACES = {GPT2: r"\S(?=\s)", LLAMA3: _LINES_APART, QWEN2: _LINES_APART}


class _Unfit(Exception):
    """Why an encoder can't be used for this tokenizer."""


# ---------------------------------------------------------------------------------------------------------------- words


@functools.cache
def char_ranges() -> dict[str, list[tuple[int, int]]]:
    r"""First and last code points of the runs in \p{L}, \p{N} and \s, as the library's regex engine has them.

    Python's tables are of another Unicode version, and its \s has \x1c to \x1f.
    """
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, PLANES)]))
    found = {}
    for name, others in ((r"\p{L}", r"\P{L}+"), (r"\p{N}", r"\P{N}+"), (r"\s", r"\S+")):
        members = normalizers.Replace(Regex(others), "").normalize_str(every)
        codes = np.frombuffer(members.encode("utf-32-le"), dtype="<u4").astype(np.int64)
        gaps = np.flatnonzero(np.diff(codes) != 1)
        firsts, lasts = codes[np.r_[0, gaps + 1]], codes[np.r_[gaps, len(codes) - 1]]
        found[name] = list(zip(firsts.tolist(), lasts.tolist(), strict=True))
    return found


def translate(regex: str, limit: int = 0x110000) -> str:
    r"""A regex of the library's as one of Python's `re`, for text of code points below `limit`.

    \p{L}, \p{N}, \s and \S become explicit classes; all else that the regexes above use means the same in both.
    """

    def ranges(match: re.Match) -> str:
        below = [(first, last) for first, last in char_ranges()[match[0]] if first < limit]
        return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in below)

    def outside(match: re.Match) -> str:
        if match[0].startswith("["):
            return re.sub(r"\\p\{[LN]\}|\\s", ranges, match[0])
        inner = re.sub(r"\\p\{[LN]\}|\\s", ranges, match[0].replace(r"\S", r"^\s"))
        return f"[{inner}]"

    return re.sub(r"\[[^\]]+\]|\\p\{[LN]\}|\\[sS]", outside, regex)


class Words:
    """The words that one of the known regexes splits text into, and the places between which text can be cut."""

    def __init__(self, regex: str) -> None:
        # A class with code points above U+FFFF ends in a list that `re` walks through at the end of each word.
        self._low = re.compile(translate(regex, limit=0x10000))
        self._all = re.compile(translate(regex))
        self._place = re.compile(translate(CUT_PLACES[regex]))

    def split(self, text: str) -> list[str]:
        """The words of `text`, one after the other: joined, they are the text."""
        low = text.isascii() or len(text.encode("utf-16-le")) == 2 * len(text)
        return (self._low if low else self._all).findall(text)

    def cut(self, text: str) -> int:
        """The last place, > 0, where cutting leaves the tokens the same, whatever follows `text`; 0: none.

        Looks only at the last `CUT_REACH` characters.
        """
        reach = 64
        while True:
            start = max(0, len(text) - reach)
            place = 0
            for match in self._place.finditer(text, start):
                place = match.end()
            if place or not start or reach >= CUT_REACH:
                return place
            reach = min(reach * 16, CUT_REACH)


def known_regex(settings: dict) -> str:
    """The regex of a tokenizer (its tokenizer.json, parsed) that does nothing but split by one we know, and BPE.

    BPE acts on one word at a time, whatever its options, but for dropout. Raises `_Unfit` with what else there is.
    """
    if (settings.get("normalizer") or {"normalizers": []}).get("normalizers") != []:
        raise _Unfit("it has a normalizer")
    for token in settings.get("added_tokens") or []:
        if not token["special"]:  # those that are special are ordinary text in documents
            raise _Unfit(f"its added token {token['content']!a} is not special, so it is found before words are")
    model = settings["model"]
    if model.get("type") != "BPE":
        raise _Unfit(f"its model is {model.get('type')}, not BPE")
    if model.get("dropout"):
        raise _Unfit("its BPE has dropout")
    first = settings.get("pre_tokenizer") or {"type": "none"}
    steps = first["pretokenizers"] if first["type"] == "Sequence" else [first]
    # trim_offsets is about offsets alone, which nobody asks for here.
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    if steps == [byte_level | {"use_regex": True}]:
        return GPT2
    for regex in CUT_PLACES:
        split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        if steps == [split, byte_level]:
            return regex
    raise _Unfit("its pre-tokenizer is not GPT-2's, Llama 3's or Qwen2's")


def pieces(text: str, size: int, cut: Cut | None) -> Iterator[str]:
    """`text` in pieces of at most `size` characters, longer where it can't be cut; without `cut`, the whole."""
    start, length = 0, size
    while cut is not None and start + length < len(text):
        if place := cut(text[start : start + length]):
            yield text[start : start + place]
            start, length = start + place, size
        else:
            length *= 2
    yield text[start:]


# ------------------------------------------------------------------------------------------------------------- encoders


class Encoder:
    """Encodes texts with the library's own batches.

    `name`, one of `ENCODERS`; `cut`, see `Words.cut`, None where a document must be encoded whole.
    """

    name = "tokenizers"
    # Characters in a piece of a text, and of the pieces that are encoded together. The library takes up to 140 times
    # their bytes in memory; with pieces of 16,384 and 65,536 it took 1.7 and 2.5 times as long, in a heap in disorder.
    piece_size, batch_size = 2**10, 2**18

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype, words: Words | None) -> None:
        self.backend, self.dtype = tokenizer.backend, dtype
        self.cut: Cut | None = None if words is None else words.cut

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Tokens of each text in `dtype`, nothing added. Memory is bounded as long as texts can be cut."""
        parts: list[list[bytes]] = [[] for _ in texts]
        for batch, owners in self._batches(texts):
            for owner, tokens in zip(owners, self.encode_batch(batch), strict=True):
                parts[owner].append(tokens)
        return [b"".join(part) for part in parts]

    def _batches(self, texts: Sequence[str]) -> Iterator[tuple[list[str], list[int]]]:
        """Pieces, and the number of the text that each is of."""
        batch: list[str] = []
        owners: list[int] = []
        size = 0
        for number, text in enumerate(texts):
            for piece in pieces(text, self.piece_size, self.cut) if len(text) > self.piece_size else (text,):
                if batch and size + len(piece) > self.batch_size:
                    yield batch, owners
                    batch, owners, size = [], [], 0
                batch.append(piece)
                owners.append(number)
                size += len(piece)
        if batch:
            yield batch, owners

    def encode_batch(self, batch: list[str]) -> Iterable[bytes]:
        """Tokens of each piece."""
        encodings = self.backend.encode_batch_fast(batch, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype).tobytes() for encoding in encodings]


class MemoEncoder(Encoder):
    """Looks words up, and hands only unknown ones to the library: a word alone has the tokens that it has in text."""

    name = "memo"
    piece_size = batch_size = 2**16  # more words at a time cost memory and save nothing

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype, words: Words) -> None:
        super().__init__(tokenizer, dtype, words)
        self.plain = Encoder(tokenizer, dtype, words)
        self.split = words.split
        self.memo: dict[str, bytes] = {}
        self.memo_bytes = 0

    def encode_batch(self, batch: list[str]) -> Iterable[bytes]:
        memo, split = self.memo, list(map(self.split, batch))
        missing = list(set().union(*split).difference(memo))
        memo.update(zip(missing, self.plain.encode(missing), strict=True))
        encoded = [b"".join(map(memo.__getitem__, words)) for words in split]
        for word in missing:
            if len(word) > MEMO_WORD:
                del memo[word]
            else:  # 100: of the dict
                self.memo_bytes += sys.getsizeof(word) + sys.getsizeof(memo[word]) + 100
        if self.memo_bytes > MEMO_BYTES:
            memo.clear()
            self.memo_bytes = 0
        return encoded


class GigatokenEncoder(Encoder):
    """Encodes with the package gigatoken, in this thread.

    gigatoken 0.10 has Unicode 16, the library 17: 4,657 letters and numbers are news to it. They are so to Python's
    tables too: pieces with a code point that those don't have go to the library.
    Raises `_Unfit` where the package is missing or does not take the tokenizer.
    """

    name = "gigatoken"
    piece_size = batch_size = 2**20

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype, words: Words | None, settings: dict) -> None:
        super().__init__(tokenizer, dtype, words)
        self.plain = Encoder(tokenizer, dtype, words)
        try:
            import gigatoken
        except ImportError as error:
            raise _Unfit('it needs the package gigatoken: pip install "megalite[fast]"') from error
        if settings["model"].get("dropout"):
            raise _Unfit("it knows no dropout")
        # It has no switch for special tokens: leave them out, and their text is ordinary.
        ordinary = [token for token in settings.get("added_tokens") or [] if not token["special"]]
        self._load = functools.partial(gigatoken.Tokenizer.from_json, json.dumps(settings | {"added_tokens": ordinary}))
        try:
            self._tokenizer = self._load()
        except Exception as error:  # its errors have no class of their own
            raise _Unfit(f"it does not take this tokenizer: {str(error).strip().partition(chr(10))[0]}") from error
        self._encoded = 0  # characters since it was loaded
        self._unsure = np.zeros(0x110000, dtype=bool)
        self._unsure[:PLANES] = [unicodedata.category(chr(point)) == "Cn" for point in range(PLANES)]

    def encode_batch(self, batch: list[str]) -> Iterable[bytes]:
        return map(self._encode_piece, batch)

    def _encode_piece(self, piece: str) -> bytes:
        if not piece.isascii() and self._unsure[np.frombuffer(piece.encode("utf-32-le"), dtype="<u4")].any():
            return self.plain.encode([piece])[0]
        self._encoded += len(piece)
        if self._encoded > GIGATOKEN_RENEWAL:
            self._tokenizer, self._encoded = self._load(), 0
        return self._tokenizer.encode(piece).astype(self.dtype).tobytes()


def open_encoder(tokenizer: Tokenizer, choice: str, dtype: np.dtype) -> Encoder:
    """The encoder of this name; "auto": the fastest that gives what `tokenizers` gives, first gigatoken, then memo.

    `dtype`: of the tokens, little-endian. Raises `UserError` for a name that is none of `ENCODERS`, and for an encoder
    asked for by name that is not installed, does not suit the tokenizer or fails the check.
    """
    if choice not in ENCODERS:
        raise UserError(f'encoder "{choice}" is none of {", ".join(ENCODERS)}')
    settings = json.loads(tokenizer.backend.to_str())
    check = Check(tokenizer, dtype, [token["content"] for token in settings.get("added_tokens") or []])
    words, reason = None, ""
    try:
        words = Words(known_regex(settings))
        check.cuts(words.cut)
    except _Unfit as error:
        words, reason = None, f"it does not suit this tokenizer: {error}"

    def checked(name: str) -> Encoder:
        if name == "gigatoken":
            encoder = GigatokenEncoder(tokenizer, dtype, words, settings)
        elif words is None:
            raise _Unfit(reason)
        else:
            encoder = MemoEncoder(tokenizer, dtype, words)
        check.encoder(encoder)
        return encoder

    for name in {"auto": ("gigatoken", "memo"), "tokenizers": ()}.get(choice, (choice,)):
        try:
            return checked(name)
        except _Unfit as error:
            if choice != "auto":
                raise UserError(f"--encoder {choice} can't be used: {error} (or use --encoder auto)") from error
    return Encoder(tokenizer, dtype, words)


# ---------------------------------------------------------------------------------------------------------------- check

# By groups: letters; contractions; numbers; punctuation; symbols; what is none of these, marks and formats among it.
_WORDS = """
the The naïve e\u0301 a\u0308\u0323 日本語 日本 한국어 하\u1161ᆨ العربية שלום ไทย नमस्ते Ελλάδα ŉ ﬁ ǅ ß ſ \u212a İ 𝔘 𠀀
's 't 're 've 'm 'll 'd 'S 'T 'RE 'Ve 'M 'lL 'D 'ſ don't DON'T we'Re it’s 'x ''s l'l l r e v
1 12 123 1234 1234567890123456789012 ½ Ⅷ ٣ ² ၁ 3.14 0x1F 〇 \u24b6
. , ... 。 、 ! ?! — - -- « » _ __init__ a_b foo(bar)[0] { } != // /* */ <!-- \\ " ` @ # $
• © ™ € 👩\u200d👩\u200d👧 👍🏽 🇨🇭 🏳\ufe0f\u200d🌈 ❤\ufe0f 🏴\U000e0067\U000e007f
\0 \x01 \x7f \x80 \xad \u0378 \u0301 \u20dd \u0e33 \u093f \u1885 \u200b \u200e \u2060 \ufeff \ufffd \uffff \ue000
\U00016d63 \U00016d80 \U0003ffff \U000e0080 \U000f0000 \U0010ffff
"""
_SPACES = "      \n\n\n\r\t\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2000\u2003\u200a\u2028\u2029\u202f\u205f\u3000"
_LINES = (
    "",
    "  leading,   inner and trailing   ",
    "a\r\n\r\nb \r\n  c\n \n d\t\te\n\n\n",
    "!!\n\n?\r\n\r\n .\n x\n\u3000y",
    "def f(x):\n    return x**2  # it's\n\n\nclass A:\n\tpass\n",
    "1" * 200 + "a" * 300 + "." * 100 + " " * 70 + "é" * 90,
)


class Check:
    """Holds encoders to what `tokenizers` gives for a hostile sample.

    Fixed texts, random ones, and each code point at an edge of a run of letters, numbers or spaces, where Unicode
    versions differ. It stands before 't, which most vocabularies have as one token, and only letters, numbers and
    spaces leave it one.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype, tokens: Sequence[str]) -> None:
        self.plain = Encoder(tokenizer, dtype, None)
        some = random.Random(2).sample(tokens, min(len(tokens), 20))
        self.words = [*_WORDS.split(), *_SPACES, "\r\n", *some]
        self.tokens = tokens

    @functools.cached_property
    def texts(self) -> list[str]:
        rng = random.Random(1)
        points = {point for runs in char_ranges().values() for a, b in runs for point in (a - 1, a, b, b + 1)}
        edges = map(chr, sorted(points - set(range(0xD800, 0xE000))))
        return [
            *_LINES,
            *self.tokens,
            *("".join(rng.choices(self.words, k=rng.randrange(2, 16))) for _ in range(1000)),
            *(f"a{c}1{c}.{c}'t {c}\n" for c in edges),
        ]

    @functools.cached_property
    def expected(self) -> list[bytes]:
        return self.plain.encode(self.texts)

    def encoder(self, encoder: Encoder) -> None:
        """Raises `_Unfit` with the first text that `encoder` encodes otherwise."""
        self._compare(self.texts, self.expected, encoder.encode(self.texts))

    def cuts(self, cut: Cut) -> None:
        """Raises `_Unfit` with the first text that has other tokens when it is cut."""
        texts = self.texts[: len(_LINES) + len(self.tokens) + 300]
        places = [cut(text) for text in texts]
        before = self.plain.encode([text[:place] for text, place in zip(texts, places, strict=True)])
        after = self.plain.encode([text[place:] for text, place in zip(texts, places, strict=True)])
        self._compare(texts, self.expected[: len(texts)], [a + b for a, b in zip(before, after, strict=True)])

    @staticmethod
    def _compare(texts: list[str], expected: list[bytes], found: list[bytes]) -> None:
        for text, right, other in zip(texts, expected, found, strict=True):
            if right != other:
                raise _Unfit(f"its tokens are not those of tokenizers for the text {ascii(text)[:80]}")
