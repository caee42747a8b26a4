"""Image tokens of a language model: strings and ids, rows and what of them counts, surgery, and the forced grammar."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Case, Operation, text, typed

from jaxtok.decoding import Sampling, generate
from jaxtok.decoding.image_grammar import ImageGrammar
from jaxtok.lm.decoder import Decoder
from jaxtok.lm.llama import LlamaConfig
from jaxtok.multimodal.image_text import (
    QUESTIONS_FROM,
    REQUESTS,
    AddImageTokens,
    ImageTextData,
    ImageTextModeling,
    lora_config,
    write_documents,
)
from jaxtok.multimodal.image_tokens import ImageTextTokenizer, code_name
from jaxtok.nn.lora import find_sites, flat, saved_paths
from jaxtok.tokenizers.bytes import ByteTokenizer
from jaxtok.training.mesh import unboxed

TOKENIZER = ImageTextTokenizer(ByteTokenizer(), codes=16, length=3)
LLAMA = LlamaConfig(num_layers=1, d_model=16, num_heads=8, mlp_dim=32, vocab_size=304, max_length=32)
DATA = ImageTextData(codes=16, image_codes=3, length=16, batch_size=8)


def case() -> Case:
    rng = np.random.default_rng(0)
    rows = [DATA.row({"parts": [chr(97 + n), rng.integers(0, 16, 3).tolist()]}) for n in range(7)]
    return Case(ImageTextModeling(model=LLAMA), DATA, typed(DATA, DATA.batch_of([*rows, None])))


TASKS = {"seed_llama": case}

EVIDENCE = {
    "seed_llama": {"generate, cached": "multimodal/test_image_text.py::test_images_that_are_drawn_are_whole"},
}


def surgery() -> Operation:
    before = text(dataclasses.replace(LLAMA, vocab_size=288))
    no_images = np.zeros_like(before.batch["mask"])
    before = dataclasses.replace(before, batch={**before.batch, "images": no_images})
    to = ImageTextModeling(model=LLAMA)
    refused = ImageTextModeling(model=dataclasses.replace(LLAMA, vocab_size=288))
    return Operation(AddImageTokens(to=to, data=DATA, first=257), before, refused, staged=False)


def surgery_with_lora() -> Operation:
    operation = surgery()
    return dataclasses.replace(operation, surgery=dataclasses.replace(operation.surgery, lora=lora_config()))


def documents(texts, folder):
    for split, count in (("train", 20), ("validation", 13)):
        pairs = [{"parts": [chr(97 + n), [n % 16, 1, 2]]} for n in range(count)]
        write_documents(folder / f"{split}.jsonl", pairs)
    return dataclasses.replace(DATA, path=str(folder), batch_size=4, workers=0)


DATASETS = {"image_text": documents}

SURGERIES = {"image_tokens": surgery, "image_tokens_lora": surgery_with_lora}


# --------------------------------------------------------------------------------------------------------------- tokens


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.binary(max_size=6), st.sampled_from([b"<img>", b"</img>", b"<img_00003>", b"<img_00099>"])))
)
def test_text_with_image_tokens_is_lossless(parts):
    data = b"".join(parts)
    ids = TOKENIZER.encode(data)
    assert TOKENIZER.decode(ids) == data and b"".join(map(TOKENIZER.token_bytes, ids)) == data
    assert max(ids, default=0) < TOKENIZER.vocab_size


def test_an_image_is_a_fixed_number_of_tokens():
    """34 with SEED's 32 codes."""
    seed = ImageTextTokenizer(ByteTokenizer(), codes=8192, length=32)
    codes = np.random.default_rng(0).integers(0, 8192, 32)
    ids = seed.image_ids(codes)
    assert len(ids) == 34 and seed.encode(seed.decode(ids)) == ids
    assert seed.decode(ids) == b"<img>" + "".join(map(code_name, codes)).encode() + b"</img>"
    before, image, after = seed.parse([*b"a ", *ids, *b"b"])
    assert bytes(before) == b"a " and np.array_equal(image, codes) and bytes(after) == b"b"
    assert seed.vocabulary()[ids[1]] == code_name(codes[0]).encode()


def test_a_tokenizer_that_has_the_tokens_keeps_their_ids():
    class Released(ByteTokenizer):
        names = {f"<img_{n:05d}>": 300 + n for n in range(4)} | {"<img>": 298, "</img>": 299}
        vocab_size = 304

        def token_id(self, name):
            return self.names.get(name)

    tokenizer = ImageTextTokenizer(Released(), codes=4, length=2)
    assert tokenizer.image_ids([1, 3]) == [298, 301, 303, 299] and tokenizer.vocab_size == 304
    with pytest.raises(ValueError, match="not 3 codes in a row"):
        ImageTextTokenizer(Released(), codes=3, length=2)


def test_images_that_are_not_whole_are_refused():
    ids = TOKENIZER.image_ids([1, 2, 3])
    for wrong in (ids[:-1], ids[1:], ids[:2] + ids[3:], [*ids[:3], 65, *ids[3:]], ids[:1] + ids, [ids[-1]]):
        with pytest.raises(ValueError, match="img>"):
            TOKENIZER.parse(wrong)
    for codes, message in (
        ([1, 2], "has 2 codes; it must have 3"),
        ([1, 2, 16], "go from 1 to 16"),
        ([-1, 2, 3], "-1"),
    ):
        with pytest.raises(ValueError, match=message):
            TOKENIZER.image_ids(codes)


# ----------------------------------------------------------------------------------------------------------------- rows


def test_which_tokens_count():
    """Pairs: all; with second_only, the second part and the end; answers: they and the end."""
    ids, counted = DATA.row({"parts": ["ab", [1, 2, 3]]})
    assert ids == [256, 97, 98, *TOKENIZER.image_ids([1, 2, 3]), 256]
    assert counted == [False] + [True] * 8
    later = dataclasses.replace(DATA, second_only=True)
    assert later.row({"parts": ["ab", [1, 2, 3]]})[1] == [False] * 3 + [True] * 6
    wide = dataclasses.replace(DATA, length=64)
    ids, counted = wide.row({"user": [{"image": [1, 2, 3]}, "what?"], "assistant": ["a cat"]})
    shown = TOKENIZER.decode(ids)
    assert shown == b"USER: <img><img_00001><img_00002><img_00003></img>what?\nASSISTANT:a cat."
    assert TOKENIZER.decode(np.array(ids)[counted]) == b"a cat." and sum(counted) == 7
    llama2 = dataclasses.replace(wide, style="llama2")
    assert TOKENIZER.decode(llama2.row({"user": ["x"], "assistant": ["y!"]})[0]) == b"[INST] x [/INST]\ny!"
    for seed in range(30):
        ids, counted = dataclasses.replace(DATA, length=120).row(
            {"draw": "a cat.", "image": [1, 2, 3]}, np.random.default_rng(seed)
        )
        asked = TOKENIZER.decode(ids).split(b"\n")[0].decode()
        number = next(
            n for n, request in enumerate(REQUESTS) if asked == f"USER: {request} a cat" + ".?"[n >= QUESTIONS_FROM]
        )
        assert number in range(20)
        assert TOKENIZER.decode(np.array(ids)[counted]).endswith(b"<img><img_00001><img_00002><img_00003></img>")
    assert len(REQUESTS) == 20
    batch = DATA.batch_of([DATA.row({"parts": ["ab", [1, 2, 3]]}), None])
    assert batch["mask"].sum(1).tolist() == [8, 0] and batch["images"].sum(1).tolist() == [5, 0]
    assert batch["bytes"].sum(1).tolist() == [2, 0] and not batch["segments"][1].any()


def test_a_row_is_cut_between_images_only():
    long = DATA.row({"parts": ["x" * 14, [1, 2, 3], "y"]})
    assert len(long[0]) == 15 and not TOKENIZER.is_image(np.array(long[0])).any()
    assert len(DATA.row({"parts": ["x" * 30]})[0]) == 17
    both = DATA.row({"parts": [[1, 2, 3], [4, 5, 6], [7, 8, 9]]})[0]
    assert [part.tolist() for part in TOKENIZER.parse(both[1:-1])] == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    few = dataclasses.replace(DATA, max_images=1).row({"parts": ["a", [1, 2, 3], "b", [4, 5, 6]]})[0]
    assert TOKENIZER.decode(few) == b"a<img><img_00001><img_00002><img_00003></img>b"


def test_both_orders_and_neighbours_swapped():
    def orders(document, **fields):
        data = dataclasses.replace(DATA, length=40, **fields)
        rows = {TOKENIZER.decode(data.row(document, np.random.default_rng(seed))[0]) for seed in range(40)}
        return sorted(rows)

    image = b"<img><img_00001><img_00002><img_00003></img>"
    assert orders({"parts": ["a", [1, 2, 3]]}) == sorted([b"a" + image, image + b"a"])
    assert orders({"parts": ["a", [1, 2, 3]]}, text_first=1.0) == [b"a" + image]
    many = {"parts": [[1, 2, 3], "a", [1, 2, 3], "b"]}
    assert orders(many) == sorted([image + b"a" + image + b"b", b"a" + image + b"b" + image])
    assert orders(many, swap=0.0) == [image + b"a" + image + b"b"]


def test_data_from_files(tmp_path):
    """The same rows with any share of them; documents of several folders are mixed."""
    for name, letter in (("one", "a"), ("two", "b")):
        documents = [{"parts": [letter, {"image": np.array([n % 16, 1, 2])}]} for n in range(20)]
        for split in ("train", "validation", "test"):
            write_documents(tmp_path / name / f"{split}.jsonl", documents)
    data = dataclasses.replace(DATA, path=str(tmp_path / "one"), batch_size=4, workers=0)
    whole = next(data.train_batches())
    assert whole.keys() == data.batch_spec().keys()
    half = next(data.train_batches(range(2, 4)))
    assert all(np.array_equal(whole[name][2:], half[name]) for name in whole)
    assert sum(len(b["mask"]) for b in data.eval_batches()) == 20
    mixed = dataclasses.replace(data, mixture=((str(tmp_path / "two"), 3.0),), batch_size=64)
    letters = next(mixed.train_batches())["tokens"]
    assert 30 < (letters == ord("b")).any(1).sum() < 62
    with pytest.raises(FileNotFoundError, match=r"three/train\.jsonl does not exist"):
        dataclasses.replace(data, path=str(tmp_path / "three")).train_batches()
    (tmp_path / "one" / "train.jsonl").write_text(json.dumps({"caption": "x"}))
    with pytest.raises(ValueError, match="a document has caption; it must have parts"):
        next(dataclasses.replace(data, seed=1).train_batches())


def test_what_the_data_refuse():
    for fields, message in (
        ({"length": 5}, "length is 5; it must be at least 6"),
        ({"swap": 2.0}, "swap is 2.0"),
        ({"style": "chatml"}, "style is 'chatml'"),
        ({"mixture": (("x", 0.0),)}, "weights must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(DATA, **fields)
    with pytest.raises(ValueError, match="vocab_size is 100"):
        ImageTextModeling(model=dataclasses.replace(LLAMA, vocab_size=100)).fit(DATA)
    assert ImageTextModeling(model=dataclasses.replace(LLAMA, vocab_size=0)).fit(DATA).model.vocab_size == 384
    with pytest.raises(ValueError, match="they must be ImageTextData"):
        ImageTextModeling(model=LLAMA).fit(object())


# -------------------------------------------------------------------------------------------------------------- surgery


def test_old_rows_are_kept_and_new_ones_are_new():
    operation = surgery()
    task = operation.before.task
    rng = np.random.default_rng(0)
    shapes = unboxed(jax.eval_shape(lambda: task.init(jax.random.key(0), operation.before.batch)))
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    after, _ = operation.surgery.params(task, operation.before.data, params, None, jax.random.key(1))
    for name in ("embedding", "head_matrix"):
        assert np.array_equal(after[name][:257], params[name][:257]) and after[name].shape == (304, 16)
        assert 0.01 < np.std(after[name][257:]) < 0.03
    assert not np.allclose(after["embedding"][257:], after["head_matrix"][257:])
    config = lora_config()
    assert len(find_sites(config, after)) == 7
    assert set(flat(after)) - set(saved_paths(config, after)) == {
        path for path in flat(after) if path.endswith("/kernel")
    }  # all else trains whole
    with pytest.raises(ValueError, match="but for its vocab_size"):
        other = ImageTextModeling(model=dataclasses.replace(LLAMA, mlp_dim=8))
        AddImageTokens(to=other).task(task, None)
    with pytest.raises(ValueError, match="must be larger"):
        AddImageTokens(to=ImageTextModeling(model=task.model), first=300).task(task, None)


# -------------------------------------------------------------------------------------------------------------- grammar


def test_images_that_are_drawn_are_whole():
    """A random model writes whole images only, wherever one begins; and none if it may not."""
    model = Decoder(LLAMA)
    shapes = unboxed(jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(scale=0.5, size=x.shape).astype(np.float32), shapes)
    params["head_matrix"][[TOKENIZER.begin, TOKENIZER.end]] *= 3  # so that it often tries
    ids = {"begin": TOKENIZER.begin, "end": TOKENIZER.end, "first": TOKENIZER.first, "codes": 16, "length": 3}

    def rows(at="text", **fields):
        grammar = ImageGrammar(**ids, at=at, chooser=Sampling(temperature=2.0), **fields)
        options = {"max_new_tokens": 20, "num_ids": TOKENIZER.vocab_size, "rng": jax.random.key(0)}
        return generate(model, params, [[1], [2], [3], [4]], chooser=grammar, **options).tokens

    seen = 0
    for row in rows():
        cut = max((n for n, t in enumerate(row) if t == TOKENIZER.begin), default=len(row))
        seen += sum(isinstance(p, np.ndarray) for p in TOKENIZER.parse(row if len(row) - cut >= 5 else row[:cut]))
    assert seen
    for row in rows(at="begin"):
        assert isinstance(TOKENIZER.parse(row[:5])[0], np.ndarray)
    for row in rows(at="inside"):
        assert len(TOKENIZER.parse([TOKENIZER.begin, *row[:4]])) == 1
    assert not any(TOKENIZER.is_image(np.array(row)).any() for row in rows(images=False))
    with pytest.raises(ValueError, match="begin is 258; it must be an id that is no code's"):
        ImageGrammar(**ids | {"begin": 258})
    with pytest.raises(ValueError, match="at is 'end'"):
        ImageGrammar(**ids, at="end")
    with pytest.raises(ValueError, match="the model has 8 ids"):
        grammar = ImageGrammar(**ids)
        grammar.choose(jnp.zeros((1, 8)), jax.random.split(jax.random.key(0), 1), grammar.init(1))
