"""Encoders: the same bytes from all, where text can be cut, what is refused, and how much memory they take."""

import functools
import json
import random
import re
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers

from megalite.data import encoders
from megalite.data.encoders import GPT2, LLAMA3, QWEN2, open_encoder
from megalite.data.tokenizer import Tokenizer
from megalite.errors import UserError

U16, I32 = np.dtype("<u2"), np.dtype("<i4")
FAST = ["memo", "gigatoken"]
TEXT = (
    "The quick brown fox doesn't jump; it's 1234 naïve 日本語 foxes' jumps.\n\n    def f(x):\n\treturn x  # don't\r\n"
    * 20
)
NASTY = [
    *"aZ'ſslLtTdDrevm19½٣é中!._-\x00\x1c\x1f\x85\xa0\u2028\u3000\u200d\u0301\U0001f469\U00020000",
    *"  \n\r\t",
    "\r\n",
]


def byte_level(use_regex):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split_by(regex):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), byte_level(False)])


PRE_TOKENIZERS = {
    "gpt2": (GPT2, byte_level(True)),
    "llama3": (LLAMA3, split_by(LLAMA3)),
    "qwen2": (QWEN2, split_by(QWEN2)),
}


def trained(pre_tokenizer):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    settings = json.loads(backend.to_str())
    # Merges of these with every byte, on either side: hardly a word can begin or end elsewhere without other tokens.
    vocab, merges = settings["model"]["vocab"], settings["model"]["merges"]
    for (
        one
    ) in "a1.'\u0120\u010a\u0109":  # the last three: space, line end and tab, as byte-level vocabularies spell them
        for byte in pre_tokenizers.ByteLevel.alphabet():
            for pair in ([one, byte], [byte, one]):
                if "".join(pair) not in vocab:
                    vocab["".join(pair)] = len(vocab)
                    merges.append(pair)
    return settings


def saved(settings, folder):
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    return Tokenizer(folder)


@pytest.fixture(scope="module", params=PRE_TOKENIZERS)
def known(request, tmp_path_factory):
    """A tokenizer of a known form, and its regex."""
    regex, pre_tokenizer = PRE_TOKENIZERS[request.param]
    return saved(trained(pre_tokenizer), tmp_path_factory.mktemp(request.param)), regex


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return saved(trained(byte_level(True)), tmp_path_factory.mktemp("gpt2"))


opened = functools.cache(open_encoder)


def nasty_texts(count, seed, longest=60):
    rng = random.Random(seed)
    ranges = [(0, 0x80), (0x80, 0x3000), (0x3000, 0xD800), (0xE000, 0x20000), (0x20000, 0x110000)]
    words = ["don't", "<|endoftext|>", "<|user|>", "I'LL", "12345", "日本語", "fox", " fox", "   ", "\n\n"]
    for _ in range(count):
        random_characters = [chr(rng.randrange(*rng.choice(ranges))) for _ in range(4)]
        yield "".join(rng.choices([*NASTY, *words, *random_characters], k=rng.randrange(longest)))


def whole(tokenizer, texts, dtype=U16):
    """What each text gives encoded alone, by the library."""
    return [np.array(tokenizer.encode(text), dtype=dtype).tobytes() for text in texts]


@pytest.mark.parametrize("name", ["tokenizers", *FAST])
def test_encoders_give_what_the_library_gives(known, name):
    tokenizer, _ = known
    encoder = opened(tokenizer, name, U16)
    assert encoder.name == name
    texts = [*nasty_texts(400, seed=5), "", TEXT, "<|endoftext|>", "a" * 300 + "1" * 300]
    assert encoder.encode(texts) == whole(tokenizer, texts)
    assert encoder.encode([]) == []
    assert tokenizer.eod_id not in np.frombuffer(encoder.encode(["<|endoftext|>"])[0], dtype=U16)


@pytest.mark.parametrize("name", ["tokenizers", *FAST])
def test_large_vocabularies_take_four_bytes(gpt2, name):
    assert open_encoder(gpt2, name, I32).encode([TEXT, "日本"]) == whole(gpt2, [TEXT, "日本"], I32)


@pytest.mark.parametrize("name", ["tokenizers", *FAST])
def test_pieces_batches_and_forgetting_change_nothing(known, name, monkeypatch):
    tokenizer, _ = known
    encoder = opened(tokenizer, name, U16)
    for each in (encoders.Encoder, encoders.MemoEncoder, encoders.GigatokenEncoder):
        monkeypatch.setattr(each, "piece_size", 8)
        monkeypatch.setattr(each, "batch_size", 32)
    for constant, value in {"MEMO_BYTES": 3000, "MEMO_WORD": 3, "GIGATOKEN_RENEWAL": 200}.items():
        monkeypatch.setattr(encoders, constant, value)
    texts = [*nasty_texts(20, seed=6, longest=400), TEXT, "x" * 100]
    assert encoder.encode(texts) == whole(tokenizer, texts)
    if name == "memo":
        assert encoder.memo_bytes <= 3000
        assert sum(map(sys.getsizeof, encoder.memo)) < 3000
        assert max(map(len, encoder.memo), default=0) <= 3


def test_text_can_be_cut_where_it_says(known):
    tokenizer, regex = known
    cut = encoders.Words(regex).cut
    places = [(text, cut(text[:end])) for text in nasty_texts(150, seed=7, longest=40) for end in range(len(text) + 1)]
    places = sorted({(text, place) for text, place in places if place})
    assert len(places) > 300
    cut_up = zip(
        whole(tokenizer, [text[:place] for text, place in places]),
        whole(tokenizer, [text[place:] for text, place in places]),
        strict=True,
    )
    assert [a + b for a, b in cut_up] == whole(tokenizer, [text for text, _ in places])


@pytest.mark.parametrize(
    ("text", "gpt2", "llama3"),
    [
        ("", 0, 0),
        ("ab", 0, 0),
        (" ab", 0, 0),
        ("a b", 1, 1),
        ("a. b ", 4, 4),
        ("a  ", 1, 1),
        ("a\n\nb", 1, 3),
        ("a.\nb", 2, 3),
        ("a.\n", 2, 0),
        ("a.\r\n x", 2, 0),
        ("1\n", 1, 1),
        ("1\u3000", 1, 1),
        ("x\x1cy", 0, 0),
        ("x\x1c y", 2, 2),
        ("a b" + "c" * 5000, 1, 1),
        ("a b" + "c" * encoders.CUT_REACH, 0, 0),  # too far away
    ],
)
def test_the_last_place_is_found(text, gpt2, llama3):
    assert [encoders.Words(regex).cut(text) for regex in (GPT2, LLAMA3)] == [gpt2, llama3]


def test_pieces_are_no_longer_than_they_must_be():
    cut = encoders.Words(GPT2).cut
    text = "ab " * 50 + "x" * 100 + " y" * 50
    found = list(encoders.pieces(text, 10, cut))
    assert "".join(found) == text
    assert sorted(map(len, found))[-2:] == [10, 159]  # where the first 20, 40 and 80 hold no place
    assert list(encoders.pieces(text, 10, None)) == [text]


@pytest.mark.parametrize("form", ["gpt2", "llama3"])
def test_every_code_point_is_in_the_librarys_class(form):
    """Words of text in which each code point shows whether it is a letter, a number, a space or none of these."""
    regex, pre_tokenizer = PRE_TOKENIZERS[form]
    words = encoders.Words(regex)
    ranges = [(0, 0x3000), (0xA000, 0xAC00), (0xF900, 0x10000)]
    if form == "llama3":  # the rest is slow; one form will do
        ranges = [(0, 0xD800), (0xE000, 0x10000), (0x10000, 0x33500), (0xE0000, 0xE0200)]
    for first, last in ranges:
        text = "".join(f".{c}a1{c}" for c in map(chr, range(first, last)))
        ends = [end for _, (_, end) in pre_tokenizer.pre_tokenize_str(text)]
        assert np.array_equal(np.cumsum([*map(len, words.split(text))]), ends)
    above = "".join(map(chr, range(0x33500, 0x110000)))
    assert normalizers.Replace(Regex(r"[^\p{L}\p{N}\s]+"), "").normalize_str(above) == ""


def test_letters_newer_than_pythons_tables_are_encoded_as_the_library_does(known):
    """Python 3.11 has Unicode 14, gigatoken 0.10 has 16, and tokenizers 0.23 has 17."""
    tokenizer, _ = known
    points = [point for runs in encoders.char_ranges().values() for a, b in runs for point in range(a, b + 1)]
    new = [chr(point) for point in points if unicodedata.category(chr(point)) == "Cn"][::7]
    assert new
    texts = [f"a{c}a1{c}1.{c}.{c}'t {c}\n{c}\t'{c}{c}" for c in new]
    expected = whole(tokenizer, texts)
    assert all(opened(tokenizer, name, U16).encode(texts) == expected for name in FAST)


def test_contractions_ignore_case_as_in_the_library():
    contraction = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    text = " ".join(f"'{c} 'l{c} 'r{c} 'v{c}" for c in map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    assert re.sub(contraction, "", text) == normalizers.Replace(Regex(contraction), "").normalize_str(text)


NEW_REGEX = {"type": "Split", "pattern": {"Regex": r"\S+|\s+"}, "behavior": "Isolated", "invert": False}
LLAMA3_SPLIT = NEW_REGEX | {"pattern": {"Regex": LLAMA3}}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalizer": {"type": "NFC"}}, "has a normalizer"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}}, "has a normalizer"),
        ({"pre_tokenizer": None}, "pre-tokenizer"),
        ({"pre_tokenizer": BYTES}, "pre-tokenizer"),
        ({"pre_tokenizer": BYTES | {"use_regex": True, "add_prefix_space": True}}, "pre-tokenizer"),
        ({"pre_tokenizer": sequence(NEW_REGEX, BYTES)}, "pre-tokenizer"),
        ({"pre_tokenizer": sequence(LLAMA3_SPLIT, BYTES | {"use_regex": True})}, "pre-tokenizer"),
        ({"pre_tokenizer": sequence(LLAMA3_SPLIT | {"behavior": "Removed"}, BYTES)}, "pre-tokenizer"),
        ({"pre_tokenizer": sequence(LLAMA3_SPLIT | {"invert": True}, BYTES)}, "pre-tokenizer"),
        ({"pre_tokenizer": sequence(LLAMA3_SPLIT, LLAMA3_SPLIT, BYTES)}, "pre-tokenizer"),
        ({"model": {"dropout": 1e-9}}, "dropout"),
    ],
)
def test_what_else_a_tokenizer_does_is_refused(gpt2, tmp_path, change, reason):
    settings = json.loads(gpt2.backend.to_str())
    changed = settings | change
    changed["model"] = settings["model"] | change.get("model", {})
    tokenizer = saved(changed, tmp_path)
    with pytest.raises(UserError, match=f"--encoder memo can't be used: it does not suit .*{reason}"):
        open_encoder(tokenizer, "memo", U16)
    plain = open_encoder(tokenizer, "tokenizers", U16)
    assert plain.cut is None
    auto = open_encoder(tokenizer, "auto", U16)
    assert auto.cut is None
    assert auto.name in ("tokenizers", "gigatoken")
    texts = [*nasty_texts(100, seed=8), TEXT]
    if "dropout" not in reason:  # with it, no two encodings are the same
        assert plain.encode(texts) == auto.encode(texts) == whole(tokenizer, texts)
    else:
        assert auto.name == "tokenizers"


def test_another_model_or_added_token_is_refused(gpt2, tmp_path):
    tokenizer = saved(json.loads(gpt2.backend.to_str()), tmp_path)
    tokenizer.backend.add_tokens([AddedToken("x y", normalized=False)])
    with pytest.raises(UserError, match="added token 'x y' is not special"):
        open_encoder(tokenizer, "memo", U16)
    texts = ["a x y b", *nasty_texts(100, seed=9)]
    assert open_encoder(tokenizer, "auto", U16).encode(texts) == whole(tokenizer, texts)
    tokenizer.backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    assert open_encoder(tokenizer, "auto", U16).name == "tokenizers"
    for name, reason in (
        ("memo", "its model is WordPiece"),
        ("gigatoken", "it does not take this tokenizer: .*WordPiece"),
    ):
        with pytest.raises(UserError, match=reason) as caught:
            open_encoder(tokenizer, name, U16)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": sequence(NEW_REGEX | {"pattern": {"Regex": GPT2}}, BYTES)},
        {"normalizer": {"type": "Sequence", "normalizers": []}},
        {"model": {"dropout": 0.0}},
        {"model": {"ignore_merges": True}},
        {"model": {"unk_token": "<|user|>", "fuse_unk": True}},
        {"model": {"end_of_word_suffix": "e"}},
        {"model": {"continuing_subword_prefix": "a", "merges": []}},
        {"post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
    ],
)
def test_options_that_act_on_single_words_are_fine(gpt2, tmp_path, change):
    settings = json.loads(gpt2.backend.to_str())
    changed = settings | change
    changed["model"] = settings["model"] | change.get("model", {})
    tokenizer = saved(changed, tmp_path)
    texts = [*nasty_texts(100, seed=10), TEXT]
    assert open_encoder(tokenizer, "memo", U16).encode(texts) == whole(tokenizer, texts)
    if "end_of_word_suffix" in str(change):  # gigatoken takes no notice of it, which the check notices
        assert open_encoder(tokenizer, "auto", U16).name == "memo"


def test_auto_takes_the_fastest_that_there_is(gpt2, monkeypatch):
    assert open_encoder(gpt2, "auto", U16).name == "gigatoken"
    monkeypatch.setitem(sys.modules, "gigatoken", None)  # as if it were not installed
    assert open_encoder(gpt2, "auto", U16).name == "memo"
    with pytest.raises(UserError, match=r'gigatoken can\'t be used: it needs .* pip install "megalite\[fast\]"'):
        open_encoder(gpt2, "gigatoken", U16)
    with pytest.raises(UserError, match='encoder "fast" is none of auto, tokenizers, memo, gigatoken'):
        open_encoder(gpt2, "fast", U16)


def test_an_encoder_that_errs_is_not_used(gpt2, monkeypatch):
    encode = encoders.GigatokenEncoder._encode_piece
    with monkeypatch.context() as patch:
        patch.setattr(
            encoders.GigatokenEncoder, "_encode_piece", lambda self, text: encode(self, text.replace("\u3000", " "))
        )
        with pytest.raises(UserError, match=r"gigatoken can't be used: its tokens are not those .* text '.*\\u3000"):
            open_encoder(gpt2, "gigatoken", U16)
        assert open_encoder(gpt2, "auto", U16).name == "memo"
    ranges = encoders.char_ranges()  # now with Python's \s, which takes one character more for white space
    monkeypatch.setattr(encoders, "char_ranges", lambda: ranges | {r"\s": [*ranges[r"\s"], (0x1C, 0x1C)]})
    monkeypatch.setitem(encoders.CUT_PLACES, GPT2, "a(?= )")
    with pytest.raises(UserError, match=r"memo can't be used: its tokens are not those .* text ['\"].*\\x1c"):
        open_encoder(gpt2, "memo", U16)
    assert open_encoder(gpt2, "auto", U16).name == "gigatoken"
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert open_encoder(gpt2, "auto", U16).name == "tokenizers"


def test_a_wrong_place_to_cut_is_noticed(gpt2, monkeypatch):
    monkeypatch.setitem(encoders.CUT_PLACES, GPT2, r"\s(?=\S)")
    with pytest.raises(
        UserError, match="memo can't be used: it does not suit this tokenizer: its tokens are not those"
    ):
        open_encoder(gpt2, "memo", U16)
    assert open_encoder(gpt2, "tokenizers", U16).cut is None


@pytest.mark.parametrize(("name", "size"), [("tokenizers", 2_000_000), ("memo", 9_500_000)])
def test_a_long_document_needs_little_memory(gpt2, name, size):
    program = f"""if True:
        import random
        from pathlib import Path
        import numpy as np
        from megalite.data.encoders import open_encoder
        from megalite.data.tokenizer import Tokenizer
        encoder = open_encoder(Tokenizer({gpt2.folder!r}), {name!r}, np.dtype("<u2"))

        def peak():  # of this program: resource's maximum is also of the one that started it
            return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

        before = peak()
        rng = random.Random(1)
        text = " ".join("".join(rng.choices("abcdefgh", k=rng.randrange(1, 9))) for _ in range(20000))
        text *= {size} // len(text)
        assert len(encoder.encode([text])[0]) > {size}
        print(peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < 100 * 1024  # KiB; uncut, 2 MB would take 200 MiB
