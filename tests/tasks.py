"""Every Task in a tiny size that eight devices divide. Registered here, it is tested on every mesh."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxtok.data.codes import CodeData
from jaxtok.data.encoders import EncoderData
from jaxtok.data.images import ImageData
from jaxtok.data.span_corruption import SpanCorruption
from jaxtok.data.text import TextData
from jaxtok.data.word_pieces import WordPieceText
from jaxtok.data.word_units import WordUnitText
from jaxtok.data.words import WordText
from jaxtok.lm.bert import BertConfig
from jaxtok.lm.byte2word import Byte2WordConfig, ByteWords
from jaxtok.lm.electra import ElectraConfig, ReplacedTokens
from jaxtok.lm.gpt2 import GPT2Config
from jaxtok.lm.hat import HATConfig, HATModeling
from jaxtok.lm.hat_released import ReleasedConfig, ReleasedModeling
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.lexinvariant import LexinvariantConfig, LexinvariantModeling
from jaxtok.lm.llama import LlamaConfig
from jaxtok.lm.masked_words import MaskedWords, Masking
from jaxtok.lm.mrt5 import MrT5Training, mrt5
from jaxtok.lm.t5 import SequenceToSequence, T5Config
from jaxtok.lm.text_classification import TextClassification
from jaxtok.lm.tokenformer import TokenFormerConfig, uniform_counts
from jaxtok.lm.transformer import matched_transformer
from jaxtok.lm.whole_words import SubwordWords
from jaxtok.lm.word_pooled import WordPooledConfig, WordPooling
from jaxtok.nn.linear import LlamaStack
from jaxtok.nn.lora import LoraConfig
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.lora import Lora
from jaxtok.training.optimizer import OptimizerConfig, PartOptimizer
from jaxtok.vision.autoencoding import Autoencoding
from jaxtok.vision.binary_autoencoder import BAEConfig
from jaxtok.vision.classification import ImageClassification
from jaxtok.vision.discriminator import DiscriminatorConfig
from jaxtok.vision.elm import ElmConfig, ElmModeling
from jaxtok.vision.elm_masked import MaskedElmConfig, MaskedElmModeling
from jaxtok.vision.vit import TokenFormerViTConfig
from jaxtok.vision.vqgan import VQGANConfig


@dataclasses.dataclass(frozen=True)
class Case:
    task: Any
    data: Any
    batch: dict[str, np.ndarray]
    unfit: dict[str, str] = dataclasses.field(default_factory=dict)
    """Meshes that it does not fit, with the reason."""
    train: TrainConfig = TrainConfig()

    @property
    def experiment(self) -> Experiment:
        return Experiment(task=self.task, data=self.data, train=self.train)


TOKENFORMER = TokenFormerConfig(
    num_layers=2,
    d_model=16,
    num_heads=8,
    rotary_fraction=1.0,
    tokens=uniform_counts(16, 32),
    vocab_size=64,
    max_length=32,
)


def text(model) -> Case:
    """Two documents in most rows, and padding at the end of some."""
    data = TextData(length=16, batch_size=8)
    rng = np.random.default_rng(0)
    shape = (data.batch_size, data.length)
    ends = rng.integers(3, 20, (data.batch_size, 1))
    place = np.broadcast_to(np.arange(data.length), shape)
    segments = np.where(place < ends, 1, 2) * (place < ends + 10)
    batch = {
        "tokens": rng.integers(0, model.vocab_size, shape),
        "targets": rng.integers(0, model.vocab_size, shape),
        "positions": np.where(place < ends, place, place - ends),
        "segments": segments,
        "mask": segments > 0,
        "bytes": np.ones(shape),
    }
    return Case(
        LanguageModeling(model=model),
        data,
        {name: batch[name].astype(dtype) for name, (_, dtype) in data.batch_spec().items()},
    )


def word_batch(data: WordText) -> dict[str, np.ndarray]:
    """Documents of random words, one after the other over the rows, and padding at the end of the last ones."""
    rng = np.random.default_rng(0)
    texts = [bytes(rng.choice(list(b"abcd \n"), n).tolist()) for n in rng.integers(0, 24, 60)]
    items = [data.items(text) for text in texts]
    size = data.batch_size * data.length
    rows = np.zeros((size, items[0].shape[1]), np.int32)
    place = np.zeros((2, size), np.int32)
    whole = np.concatenate(items)[: size - 3]
    rows[: len(whole)] = whole
    documents = np.repeat(np.arange(len(items)), [len(x) for x in items])[: len(whole)]
    for row in range(data.batch_size):
        here = documents[row * data.length : (row + 1) * data.length]
        segments = np.cumsum(np.diff(here, prepend=here[:1]) > 0) + 1
        first = np.searchsorted(segments, segments)
        place[:, row * data.length : row * data.length + len(here)] = segments, np.arange(len(here)) - first
    shape = (data.batch_size, data.length)
    return data.layout(rows.reshape(*shape, -1), place[0].reshape(shape), place[1].reshape(shape))


def hat() -> Case:
    char = {"num_layers": 2, "d_model": 8, "num_heads": 2, "mlp_dim": 16}
    model = HATConfig(
        encoder=LlamaStack(**char, causal=False),
        backbone=LlamaStack(num_layers=2, d_model=16, num_heads=8, mlp_dim=32),
        decoder=LlamaStack(**char),
        max_units=5,
    )
    data = WordText(length=8, batch_size=8, max_units=5)
    return Case(HATModeling(model=model), data, word_batch(data))


def hat_released() -> Case:
    char = {"num_layers": 2, "d_model": 16, "num_heads": 8, "mlp_dim": 32, "window": 9}
    model = ReleasedConfig(
        encoder=LlamaStack(**char),
        backbone=LlamaStack(num_layers=2, d_model=16, num_heads=8, num_kv_heads=2, mlp_dim=32),
        decoder=LlamaStack(**char),
        connector_heads=8,
        guide_heads=8,
        max_word_size=6,
    )
    task = ReleasedModeling(model=model)
    data = WordText(length=8, batch_size=8, max_units=6, splitter=task.splitter)
    return Case(task, data, word_batch(data))


def word_pooled() -> Case:
    """Random words in two documents, and padding at the end of the rows; every axis of a mesh divides the words."""
    data = WordUnitText(length=16, batch_size=8, max_units=5)
    model = WordPooledConfig(
        vocab_size=384,
        max_units=5,
        max_words=16,
        prefixes=2,
        d_model=16,
        num_layers=2,
        num_heads=8,
        unit_layers=2,
        encoder_heads=4,
        encoder_mlp_dim=32,
        dropout=0.0,
        encoder_dropout=0.0,
    )
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, data.max_units + 1, (data.batch_size, data.length + 1))
    units = rng.integers(1, model.vocab_size, (*lengths.shape, data.max_units))
    units *= np.arange(data.max_units) < lengths[..., None]
    place = np.broadcast_to(np.arange(data.length), (data.batch_size, data.length))
    segments = (1 + (place >= 7)) * (place < rng.integers(9, 17, (data.batch_size, 1)))
    batch = {
        "words": units[:, :-1],
        "lengths": lengths[:, :-1],
        "targets": units[:, 1:],
        "target_lengths": lengths[:, 1:],
        "positions": np.where(place < 7, place, place - 7),
        "segments": segments,
        "mask": segments > 0,
        "bytes": lengths[:, 1:] + 1,
    }
    spec = data.batch_spec()
    return Case(WordPooling(model=model), data, {name: batch[name].astype(dtype) for name, (_, dtype) in spec.items()})


def images() -> Case:
    model = TokenFormerViTConfig(
        image_size=8, patch_size=4, num_classes=4, num_layers=2, d_model=16, num_heads=8, tokens=uniform_counts(16, 32)
    )
    data = ImageData(images="digits", size=8, batch_size=8)
    rng = np.random.default_rng(0)
    batch = {
        "images": rng.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8),
        "labels": rng.integers(0, 4, 8).astype(np.int32),
        "mask": np.ones(8, np.float32),
    }
    return Case(ImageClassification(model=model), data, batch, {"sequence": "an image is 4 patches and a token"})


TOKENIZER = {"image_size": 8, "width": 64, "multipliers": (1, 1), "res_blocks": 1, "attention_resolutions": ()}


def autoencoding(model, **options) -> Case:
    rng = np.random.default_rng(0)
    batch = {
        "images": rng.integers(0, 256, (8, 8, 8, 3)).astype(np.uint8),
        "labels": np.zeros(8, np.int32),
        "mask": (np.arange(8) < 7).astype(np.float32),
    }
    # Of so many kernels' gradients some are next to nothing, which Adam with a small epsilon makes large.
    optimizer = OptimizerConfig(eps=1e-5)
    if options["discriminator"]:
        part = PartOptimizer(eps=1e-5, part="discriminator", start=1)
        optimizer = dataclasses.replace(optimizer, parts=(part,))
    data = ImageData(images="digits", size=8, batch_size=8)
    return Case(Autoencoding(model=model, **options), data, batch, train=TrainConfig(optimizer=optimizer))


ELM = {"num_layers": 2, "d_model": 32, "num_heads": 8, "mlp_dim": 32, "grid": 4, "code_bits": 5, "num_classes": 3}


def codes(task) -> Case:
    """Images of random codes, one of which only fills the batch."""
    model = task.model
    data = CodeData(grid=model.grid, sub_codes=model.sub_codes, code_bits=model.code_bits, batch_size=8)
    rng = np.random.default_rng(0)
    batch = {
        "codes": rng.integers(0, model.codebook, data.batch_spec()["codes"][0]),
        "labels": rng.integers(0, model.num_classes, 8),
        "mask": np.arange(8) < 7,
    }
    return Case(task, data, {name: batch[name].astype(dtype) for name, (_, dtype) in data.batch_spec().items()})


def lexinvariant(model, **options) -> Case:
    return dataclasses.replace(text(model), task=LexinvariantModeling(model=model, **options))


def pairs(task) -> Case:
    """Inputs and targets of several lengths."""
    data = SpanCorruption(length=16, batch_size=8, density=0.3, mean_span=2.0)
    rng = np.random.default_rng(0)
    shape = data.batch_spec()["targets"][0]
    mask = np.arange(shape[1]) < rng.integers(3, shape[1], (8, 1))
    batch = {
        "tokens": rng.integers(2, task.model.vocab_size, (8, 16)) * (np.arange(16) < rng.integers(5, 17, (8, 1))),
        "targets": rng.integers(2, task.model.vocab_size, shape) * mask,
        "mask": mask,
        "bytes": mask,
    }
    return Case(task, data, {name: batch[name].astype(dtype) for name, (_, dtype) in data.batch_spec().items()})


def encoder(make, unfit=()) -> Case:
    """[CLS] a [SEP] b [SEP] and padding."""
    model = ElectraConfig(
        num_layers=2, d_model=16, num_heads=8, mlp_dim=32, embedding_size=8, vocab_size=64, max_positions=16
    )
    task, data = make(model), EncoderData(length=16, batch_size=8)
    rng = np.random.default_rng(0)
    place, ends = np.arange(data.length), rng.integers(7, 16, (data.batch_size, 1))
    special = (place == 0) | (place == 5) | (place == ends)
    batch = {
        "tokens": np.where(special, 1, rng.integers(4, 64, (data.batch_size, data.length))),
        "types": place + 0 * ends > 5,
        "mask": place <= ends,
        "bytes": ~special,
    }
    batch = {name: batch[name].astype(dtype) for name, (_, dtype) in data.batch_spec().items()}
    if isinstance(task, TextClassification):
        batch["labels"] = rng.integers(0, 4, data.batch_size).astype(np.int32)
        data = Labelled(data.batch_size, data.length)
    return Case(task, data, batch, dict(unfit))


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Stands for rows with a class each: the shapes of their batches."""

    batch_size: int
    length: int

    def batch_spec(self):
        spec = EncoderData(length=self.length, batch_size=self.batch_size).batch_spec()
        return spec | {"labels": ((self.batch_size,), np.int32)}


MASKING = Masking(mask_id=3, kept_ids=(1, 2))
ONE_HEAD = dict.fromkeys(("tensor 8", "2 x 2 x 2", "sequence"), "the generator has a head for every 64 channels: one")


def lora(case: Case) -> Case:
    """The adapter's matrices have no axis of their own that a mesh divides: only that of their parameter."""
    config = LoraConfig(rank=2, targets=(r".*/kernel", "embedding", "head_matrix"), saved=(r"final_norm/.*",))
    return dataclasses.replace(case, task=Lora(task=case.task, lora=config))


def words(task) -> Case:
    """Rows of words, some of them padded."""
    data = WordPieceText(length=16, batch_size=8, max_bytes=6, max_pieces=3)
    rng = np.random.default_rng(0)
    shape = (data.batch_size, data.length)
    ends = rng.integers(5, 17, (data.batch_size, 1))
    real = np.arange(data.length) < ends
    ids = np.where(np.arange(6) < rng.integers(1, 7, (*shape, 1)), rng.integers(0, 256, (*shape, 6)), 256)
    pieces = np.where(np.arange(3) < rng.integers(1, 4, (*shape, 1)), rng.integers(0, 60, (*shape, 3)), -1)
    ids[:, 0], pieces[:, 0] = [257] + [256] * 5, -1
    ids[~real], pieces[~real] = 256, -1
    batch = {"words": ids, "pieces": pieces, "inputs": pieces, "mask": real, "bytes": real, "cut": 0 * real}
    batch = {name: batch[name].astype(dtype) for name, (_, dtype) in data.batch_spec().items()}
    return Case(task, data, batch)


WORD_BODY = {"num_layers": 2, "d_model": 16, "num_heads": 8, "mlp_dim": 32, "vocab_size": 64, "dropout": 0.0}
BYTE2WORD = Byte2WordConfig(**WORD_BODY, max_length=16, pool_heads=8, max_bytes=6, max_pieces=3)
BERT = BertConfig(**WORD_BODY, max_positions=32, pooler=False, next_sentence=False)

SIZES = {"num_layers": 2, "d_model": 16, "num_heads": 8, "vocab_size": 64, "max_length": 32}

T5 = T5Config(**{**SIZES, "head_size": 4, "mlp_dim": 32, "gated": True, "tie_embeddings": False})

TASKS = {
    "tokenformer": lambda: text(TOKENFORMER),
    "transformer": lambda: text(matched_transformer(TOKENFORMER)),
    "gpt2": lambda: text(GPT2Config(**SIZES, mlp_dim=32)),
    "llama": lambda: text(LlamaConfig(**SIZES, num_kv_heads=2, mlp_dim=32, window=9)),
    "hat": hat,
    "hat_released": hat_released,
    "word_pooled": word_pooled,
    "lexinvariant": lambda: lexinvariant(LexinvariantConfig(**SIZES, mlp_dim=32)),
    "semi_lexinvariant": lambda: lexinvariant(TOKENFORMER, random_symbols=0.5, block=24),
    "t5": lambda: pairs(SequenceToSequence(model=T5)),
    "mrt5": lambda: pairs(
        MrT5Training(
            model=mrt5(T5, gate_layer=1, softmax1=True), target_rate=0.5, score_weight=0.5, hard_probability=0.5
        )
    ),
    "lora": lambda: lora(text(LlamaConfig(**SIZES, num_kv_heads=2, mlp_dim=32, tie_embeddings=False))),
    "tokenformer_vit": images,
    "bae": lambda: autoencoding(
        BAEConfig(**TOKENIZER, embed_dim=64, bits=8, sub_codes=2, code_weight=0.1),
        discriminator=DiscriminatorConfig(width=8, layers=1, start_step=0, augment=True),
        perceptual="mse",
    ),
    "vqgan": lambda: autoencoding(
        VQGANConfig(**TOKENIZER | {"multipliers": (1,)}, embed_dim=32, codebook_size=64),
        discriminator=None,
        perceptual="none",
    ),
    "elm": lambda: codes(ElmModeling(model=ElmConfig(**ELM, num_kv_heads=2, modulation=True, loss_chunk=8))),
    "elm_masked": lambda: codes(MaskedElmModeling(model=MaskedElmConfig(**ELM, sub_codes=2), rounds=4)),
    "electra": lambda: encoder(lambda m: ReplacedTokens(model=m, masking=MASKING, generator_width=0.5), ONE_HEAD),
    "masked_words": lambda: encoder(
        lambda m: MaskedWords(model=dataclasses.replace(m, mask_head=True, replaced_head=False), masking=MASKING)
    ),
    "text_classification": lambda: encoder(
        lambda m: TextClassification(model=dataclasses.replace(m, num_classes=4, replaced_head=False))
    ),
    "byte2word": lambda: words(ByteWords(model=BYTE2WORD)),
    "bert_whole_words": lambda: words(SubwordWords(model=BERT)),
}
