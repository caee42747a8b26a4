"""Every tokenizer fills the waist, is lossless on any bytes, and agrees with its library on ordinary text."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from jaxtok.protocols import Tokenizer
from jaxtok.tokenizers import HuggingFaceTokenizer, load_tokenizer, token_byte_lengths, train_sentencepiece

TEXT = Path(json.__file__).with_name("decoder.py").read_text() + Path(io.__file__).read_text()
PREFIXED = ["sentencepiece_published", "metaspace", "prepend"]
LIBRARIES = ["sentencepiece_unigram", "sentencepiece_bpe", "byte_level", "byte_level_prefixed", *PREFIXED]
KINDS = ["bytes", "byt5", "characters", *LIBRARIES]
ORDINARY = "Hello, world of 42 tokens (raise ValueError if not self.strict)."
HOSTILE = [
    *("<|endoftext|>", "</s>", "<s>", "<unk>", "[SEP]", "<0x41>", "<|end_of_text|>"),
    *("▁", "▁▁Hello", " ", "  ", "\n", "\r\n", "\t", "\0", "\x7f", "\ufeff", "\u00a0", "\u3000", "\u200d", "\u2585"),
    *("e\u0301", "\u0301", "\u212b", "ﬁ", "Ａ", "가", "\u1100\u1161", "Ġ", "##ing"),
    *("\U0001f469\u200d\U0001f680", "\U0010ffff"),
    *("Hello", "return self", "ß", "İ", "中文，"),
]  # fmt: skip
hostile_text = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=4), max_size=12).map("".join)
any_bytes = st.lists(st.binary(max_size=6) | hostile_text.map(str.encode), max_size=6).map(b"".join)


def train_huggingface(folder, pre_tokenizer, *, normalizer=None, edit=lambda config: None):
    """A small BPE with the 256 bytes spelled both ways in its vocabulary."""
    model = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizer
    if normalizer:
        model.normalizer = normalizer
    specials = ["<unk>", "<s>", "</s>", "<|endoftext|>"]
    byte_level = isinstance(pre_tokenizer, pre_tokenizers.ByteLevel)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=specials + ([] if byte_level else [f"<0x{byte:02X}>" for byte in range(256)]),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if byte_level else [],
        show_progress=False,
    )
    model.train_from_iterator([TEXT], trainer)
    model.decoder = decoders.ByteLevel() if byte_level else decoders.Metaspace()
    model.add_tokens(["    "])
    config = json.loads(model.to_str())
    config["added_tokens"] = [token for token in config["added_tokens"] if "<0x" not in token["content"]]
    edit(config)
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(config))
    return folder


def llama(config):
    config["model"] |= {"byte_fallback": True, "fuse_unk": True}


def llama_prepend(config):
    llama(config)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    config["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]}
    config["pre_tokenizer"] = None


@pytest.fixture(scope="session")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    lines = TEXT.splitlines()
    published = root / "published.model"
    with published.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, vocab_size=500, byte_fallback=True, minloglevel=2
        )  # nmt_nfkc, dummy prefix, extra spaces removed, </s> ends
    byte_level, metaspace = pre_tokenizers.ByteLevel, pre_tokenizers.Metaspace
    nfc = normalizers.NFC()
    return {
        "bytes": "bytes",
        "characters": "characters: abcdeé中",
        "byt5": "byt5",
        "sentencepiece_unigram": train_sentencepiece([TEXT], root / "unigram.model", vocab_size=500),
        "sentencepiece_bpe": train_sentencepiece([TEXT.encode()], root / "b.model", vocab_size=500, model_type="bpe"),
        "sentencepiece_published": published,
        "byte_level": train_huggingface(root / "byte_level", byte_level(add_prefix_space=False), normalizer=nfc),
        "byte_level_prefixed": train_huggingface(root / "prefixed", byte_level(add_prefix_space=True), normalizer=nfc),
        "metaspace": train_huggingface(root / "metaspace", metaspace(prepend_scheme="first"), edit=llama),
        "prepend": train_huggingface(root / "prepend", metaspace(prepend_scheme="never"), edit=llama_prepend),
    }


@pytest.fixture(scope="session")
def loaded(paths):
    return {kind: load_tokenizer(str(path)) for kind, path in paths.items()}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(data=any_bytes)
def test_any_bytes_survive(loaded, kind, data):
    tokenizer = loaded[kind]
    ids = tokenizer.encode(data)
    assert tokenizer.decode(ids) == data
    assert tokenizer.eod_id not in ids
    spelled = b"".join(tokenizer.token_bytes(i) for i in ids)
    assert spelled in (data, b" " + data)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(text=hostile_text)
def test_text_is_its_utf8(loaded, kind, text):
    assert loaded[kind].encode(text) == loaded[kind].encode(text.encode())
    assert loaded[kind].decode(loaded[kind].encode(text)) == text.encode()


@pytest.mark.parametrize("kind", KINDS)
def test_fills_the_waist(loaded, kind):
    tokenizer = loaded[kind]
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.encode("") == []
    assert tokenizer.token_bytes(tokenizer.eod_id) == b""
    assert tokenizer.decode([tokenizer.eod_id, *tokenizer.encode("Hello"), tokenizer.eod_id]) == b"Hello"
    lengths = token_byte_lengths(tokenizer)
    assert lengths.dtype == np.int32 and lengths.shape == (tokenizer.vocab_size,)
    assert lengths[tokenizer.eod_id] == 0 and lengths.max() >= 1
    copy = pickle.loads(pickle.dumps(tokenizer))
    hostile = "".join(HOSTILE)
    assert copy.encode(hostile) == tokenizer.encode(hostile) and copy.eod_id == tokenizer.eod_id


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_have_roles_and_stand_for_no_bytes(loaded, kind):
    tokenizer = loaded[kind]
    special = tokenizer.special
    assert special.eos[0] == tokenizer.eod_id
    for i in (special.bos, *special.eos, special.pad, special.unk):
        assert i is None or (0 <= i < tokenizer.vocab_size and tokenizer.token_bytes(i) == b"")
    if kind in LIBRARIES:
        assert special.unk == 0 and special.bos == (
            1 if kind not in ("sentencepiece_unigram", "sentencepiece_bpe") else None
        )
        spelled = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        assert tokenizer.vocabulary() == spelled
    if kind in ("byte_level", "metaspace"):
        vocabulary = set(tokenizer.vocabulary())
        merges = tokenizer.merges()
        assert len(merges) > 100 and all(first + second in vocabulary for first, second in merges)


def test_a_turn_of_a_chat_ends_a_text_too(paths, tmp_path):
    config = json.loads((paths["byte_level"] / "tokenizer.json").read_text())
    like = config["added_tokens"][0]
    for name in ("<|im_end|>", "<pad>"):
        config["added_tokens"].append(like | {"id": len(config["model"]["vocab"]) + 50, "content": name})
        config["model"]["vocab"][name] = config["added_tokens"][-1]["id"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    vocab = config["model"]["vocab"]
    assert tokenizer.special.eos == (vocab["<|endoftext|>"], vocab["<|im_end|>"])
    assert tokenizer.special.pad == vocab["<pad>"]


def library_ids(path, text):
    if path.suffix == ".model":
        return sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(text)
    return tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", LIBRARIES)
@pytest.mark.parametrize("text", [ORDINARY, ORDINARY * 3, "Hello", "x"])
def test_ordinary_text_is_tokenised_as_published(loaded, paths, kind, text):
    assert loaded[kind].encode(text) == library_ids(paths[kind], text)


@pytest.mark.parametrize("kind", LIBRARIES)
def test_ordinary_text_is_encoded_in_one_call(loaded, kind, monkeypatch):
    calls = []
    encode_text = loaded[kind]._encode_text
    monkeypatch.setattr(loaded[kind], "_encode_text", lambda text: calls.append(text) or encode_text(text))
    loaded[kind].encode(ORDINARY * 100)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", LIBRARIES)
def test_one_hostile_character_costs_few_tokens(loaded, kind):
    usual = len(loaded[kind].encode(ORDINARY * 20))
    assert len(loaded[kind].encode(ORDINARY * 10 + "e\u0301▁\0" + ORDINARY * 10)) < usual + 60


@pytest.mark.parametrize("kind", PREFIXED)
def test_the_prefix_is_dropped_once(loaded, kind):
    tokenizer = loaded[kind]
    assert tokenizer.token_bytes(tokenizer.encode("Hello")[0]).startswith(b" ")
    assert tokenizer.decode(tokenizer.encode(" Hello")) == b" Hello"
    assert len(b"".join(map(tokenizer.token_bytes, tokenizer.encode("a▁b▁c\0d")))) == len("a▁b▁c\0d".encode()) + 1


def test_trained_tokens_compress(loaded):
    for kind in LIBRARIES:
        assert len(loaded[kind].encode(TEXT)) < 0.75 * len(TEXT.encode()), kind


def test_characters_have_their_places_in_the_alphabet():
    tokenizer = load_tokenizer("characters: abé")
    assert tokenizer.encode("aé b") == [1, 3, 0, 2] and tokenizer.vocab_size == 4 + 256 + 1
    assert tokenizer.encode("c") == [4 + ord("c")]
    with pytest.raises(ValueError, match="has 'a' twice"):
        load_tokenizer("characters:aba")


def test_added_tokens_that_are_not_special_are_used(loaded):
    tokenizer = loaded["byte_level"]
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("a    b")] == [b"a", b"    ", b"b"]


def test_a_character_without_a_token_is_named(tmp_path):
    model = tokenizers.Tokenizer(models.BPE({"</s>": 0, **{c: i for i, c in enumerate("helo", 1)}}, []))
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("hello")) == b"hello"
    for text in ("hello hello", "héllo", b"hello\xff"):
        with pytest.raises(ValueError, match="cannot represent the character") as error:
            tokenizer.encode(text)
        assert any(name in str(error.value) for name in ("' '", "'\\xe9'", "'\\udcff'"))


def test_control_characters_without_tokens_are_left_out_as_published(tmp_path):
    vocab = {"</s>": 0, **{c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}}
    whole, lacking = tokenizers.Tokenizer(models.BPE(vocab, [])), dict(vocab)
    del lacking["\u0104"]  # which stands for 0x04
    for name, content in {"whole": whole, "lacking": tokenizers.Tokenizer(models.BPE(lacking, []))}.items():
        content.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        content.save(str(tmp_path / f"{name}.json"))
    tokenizer = load_tokenizer(tmp_path / "lacking.json")
    with pytest.warns(UserWarning, match="lacks control characters"):
        assert tokenizer.decode(tokenizer.encode("a\x04 b\x05")) == b"a b\x05"
    whole = load_tokenizer(tmp_path / "whole.json")
    assert whole.decode(whole.encode("a\x04 b\x05")) == b"a\x04 b\x05"


def test_a_vocabulary_with_an_unknown_token_instead_of_bytes_encodes_as_published(tmp_path):
    model = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "[SEP]": 1, "hel": 2, "##lo": 3}, unk_token="[UNK]"))
    model.normalizer = normalizers.BertNormalizer()
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("Héllo\nhello") == [2, 3, 2, 3]
    with pytest.warns(UserWarning, match="lacks characters of these texts; as published"):
        assert tokenizer.encode("hello zebra") == [2, 3, 0]


def test_the_end_of_document_token_can_be_named(paths):
    assert HuggingFaceTokenizer(paths["byte_level"], eod="<s>").eod_id != load_tokenizer(paths["byte_level"]).eod_id
    with pytest.raises(ValueError, match="none of the tokens <eot>"):
        HuggingFaceTokenizer(paths["byte_level"], eod="<eot>")


def test_load_tokenizer_says_what_is_wrong(paths, tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer 'missing'"):
        load_tokenizer("missing")
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    for name, message in {
        "a.txt": "neither",
        "a.model": "not a SentencePiece",
        "a.json": "not a tokenizer.json",
    }.items():
        (tmp_path / name).write_text("junk")
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path / name)
    (tmp_path / "b.model").write_bytes(paths["sentencepiece_bpe"].read_bytes())
    with pytest.raises(ValueError, match=r"holds 2 \*\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "a.model").unlink()
    assert load_tokenizer(tmp_path).name == "b"


def test_train_sentencepiece_says_what_is_wrong(tmp_path):
    output = tmp_path / "x.model"
    for texts, size, message in [
        ([TEXT[:200]], 2000, "it must be at most"),
        ([TEXT], 200, "it must be more than"),
        ([], 300, "texts are empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            train_sentencepiece(texts, output, vocab_size=size)
    with pytest.raises(ValueError, match="it must be unigram or bpe"):
        train_sentencepiece([TEXT], output, vocab_size=300, model_type="word")
    assert not output.exists()


def test_train_sentencepiece_takes_long_lines_and_invalid_bytes(tmp_path):
    texts = (text for text in [b"\xff\xfe" + b"abracadabra " * 2000, "simsalabim " * 2000])
    tokenizer = load_tokenizer(train_sentencepiece(texts, tmp_path / "sub" / "x.model", vocab_size=290))
    assert len(tokenizer.encode("abracadabra simsalabim ")) < 12
