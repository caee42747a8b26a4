"""The contract of every format, on a tiny model of each kind that it holds, and by the verb that a user types."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from jaxtok.cli import main
from jaxtok.data.codes import CodeData
from jaxtok.data.encoders import EncoderData
from jaxtok.data.images import ImageData
from jaxtok.data.span_corruption import SpanCorruption
from jaxtok.data.text import TextData
from jaxtok.data.volumes import VolumeData
from jaxtok.data.word_pieces import WordPieceText
from jaxtok.data.word_units import NormalizedText, WordUnitText
from jaxtok.door import open_model
from jaxtok.interop.formats import FORMATS, format_for, format_named, format_of, recognised
from jaxtok.interop.hat import task_and_data as hat_task_and_data
from jaxtok.interop.huggingface import read_folder, write_folder
from jaxtok.lm.bert import BertConfig
from jaxtok.lm.byte2word import Byte2WordConfig, ByteWords
from jaxtok.lm.electra import ElectraConfig, ReplacedTokens
from jaxtok.lm.gpt2 import GPT2Config
from jaxtok.lm.hat_released import ReleasedConfig
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.lexinvariant import LexinvariantModeling
from jaxtok.lm.llama import LlamaConfig
from jaxtok.lm.mamba import MambaConfig
from jaxtok.lm.masked_words import MaskedWords, Masking
from jaxtok.lm.mrt5 import MrT5Config, MrT5Training
from jaxtok.lm.opt import OPTConfig
from jaxtok.lm.t5 import SequenceToSequence, T5Config
from jaxtok.lm.text_classification import TextClassification
from jaxtok.lm.tokenformer import TokenFormerConfig, uniform_counts
from jaxtok.lm.word_pooled import PlainConfig, WordPooledConfig, WordPooling
from jaxtok.model import Model
from jaxtok.nn.linear import LlamaStack
from jaxtok.nn.lora import LoraConfig
from jaxtok.runs import open_run, write_run
from jaxtok.tokenizers import load_tokenizer, train_sentencepiece
from jaxtok.training.checkpoints import abstract_params, begin
from jaxtok.training.experiment import Experiment
from jaxtok.transfer.lora import Lora
from jaxtok.verbs import evaluate, grow
from jaxtok.vision.autoencoding import Autoencoding
from jaxtok.vision.binary_autoencoder import BAEConfig
from jaxtok.vision.elm import ElmConfig, ElmModeling
from jaxtok.vision.elm_masked import MaskedElmConfig, MaskedElmModeling
from jaxtok.vision.eva_vit import EvaViTConfig
from jaxtok.vision.flextok import FlexTokConfig, FlexTokenizer
from jaxtok.vision.kl_vae import KLAutoencoding, KLVAEConfig
from jaxtok.vision.qformer import QFormerConfig
from jaxtok.vision.seed import Seed, SeedConfig
from jaxtok.vision.segmamba import SegMambaConfig
from jaxtok.vision.tokenbridge import TokenBridgeConfig, TokenBridgeModeling
from jaxtok.vision.tokenbridge_tokenizer import DimensionwiseQuantizer
from jaxtok.vision.tokenunify import AffinityPrediction
from jaxtok.vision.vqgan import VQGANConfig

HUB_FOLDER = Path(__file__).parents[1] / "goldens" / "llama_gpt2_bricks" / "hf_folder_llama"
SIZES = {"num_layers": 2, "d_model": 16, "num_heads": 2, "mlp_dim": 24}
TEXT = {"length": 32, "batch_size": 8}
FLEXTOK = FlexTokConfig(
    latent_size=(8, 8),
    channels=3,
    registers=8,
    encoder_width=16,
    encoder_depth=2,
    decoder_width=24,
    decoder_depth=2,
    head_dim=8,
    time_channels=16,
    head_modulation=True,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A tiny model, and the format that is its default (of several, the one that `suffix` asks for)."""

    format: str
    task: Any
    data: Any
    suffix: str = ""
    """The suffix of the file; empty for a folder."""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What begins and ends texts, where it is not the tokenizer's own end."""

    def model(self) -> Model:
        """The model with random parameters, so that none can be taken for another."""
        rng = np.random.default_rng(0)
        shapes = abstract_params(self.task, self.data)
        params = jax.tree.map(lambda x: rng.normal(scale=0.2, size=x.shape).astype(x.dtype), shapes)
        facts = {}
        if hasattr(self.data, "tokenizer"):
            tokenizer = load_tokenizer(self.data.tokenizer)
            facts = {"tokenizer": tokenizer, "begin": (tokenizer.eod_id,), "ends": (tokenizer.eod_id,)} | self.facts
        return Model(task=self.task, params=params, data=self.data, **facts)

    def target(self, folder: Path) -> Path:
        return folder / f"written{self.suffix}"

    @property
    def like(self) -> Any:
        """What a file of bare tensors does not say."""
        return self.task if self.suffix else None


def language_model(form: str, model: Any, tokenizer: str = "bytes", **facts: Any) -> Case:
    return Case(form, LanguageModeling(model=model), TextData(**TEXT, tokenizer=tokenizer), facts=facts)


SYMBOLS = {"cls_id": 258, "sep_id": 259}
MASKING = Masking(mask_id=260, kept_ids=(258, 259))
ENCODER = {**SIZES, "vocab_size": 384, "max_positions": 32}
ELECTRA = ElectraConfig(**ENCODER, embedding_size=8)
WORDS = ElectraConfig(**ENCODER, embedding_size=8, replaced_head=False, mask_head=True)
T5_SIZES = {
    "num_layers": 2,
    "decoder_layers": 2,
    "d_model": 16,
    "num_heads": 2,
    "head_size": 8,
    "mlp_dim": 24,
    "vocab_size": 384,
}
PAIRS = SpanCorruption(length=1024, batch_size=8)
CHARACTERS = LlamaStack(num_layers=1, d_model=12, num_heads=2, mlp_dim=20)
RELEASED = ReleasedConfig(
    encoder=CHARACTERS,
    backbone=LlamaStack(num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, mlp_dim=24),
    decoder=CHARACTERS,
    connector_heads=4,
    guide_heads=2,
    max_word_size=12,
)
POOLED = WordPooledConfig(max_units=6, max_words=24, prefixes=2, d_model=16, num_layers=2, num_heads=2, encoder_heads=2)
PLAIN = PlainConfig(num_layers=2, d_model=16, num_heads=2, mlp_dim=64, max_length=24)
BYTE2WORD = Byte2WordConfig(
    **SIZES, vocab_size=384, max_length=16, pool_heads=2, max_bytes=6, max_pieces=6, dropout=0.0
)
IMAGES = ImageData(images="digits", size=8, batch_size=8)
TOWERS = {"image_size": 8, "width": 32, "multipliers": (1,), "res_blocks": 1, "attention_resolutions": (8,)}
ELM = {"num_layers": 2, "d_model": 16, "num_heads": 2, "mlp_dim": 16, "grid": 4, "num_classes": 3}
VAE = {
    "model": KLVAEConfig(image_size=8, widths=(8, 16), groups=4, res_blocks=1, encoder_attention=(), z_channels=2),
    "discriminator": None,
    "perceptual": "none",
}
BRIDGE = TokenBridgeConfig(
    grid=2,
    channels=3,
    quantizer=DimensionwiseQuantizer(levels=5),
    channel_order=(2, 0, 1),
    num_classes=3,
    buffer=2,
    **{
        f"{part}_{name}": n
        for part in ("encoder", "decoder", "head")
        for name, n in (("width", 8), ("layers", 2), ("heads", 2))
    },
)
BPE = {"begin": (380,), "ends": (381, 383), "pad": 382}


def encoder(form: str, task: Any, **options: Any) -> Case:
    return Case(form, task, EncoderData(**TEXT, **SYMBOLS, pad_id=task.model.pad_id), **options)


def images(model: Any) -> Case:
    return Case("vqgan", Autoencoding(model=model, discriminator=None, perceptual="none"), IMAGES, ".safetensors")


def volumes(out_channels: int) -> Case:
    sizes = {"crop": (16, 16, 16), "features": (4, 4, 6, 6), "hidden": 6, "depths": (2, 1, 1, 1), "slices": 1}
    model = SegMambaConfig(**sizes, kernel=3, out_channels=out_channels)
    return Case("tokenunify", AffinityPrediction(model=model), VolumeData(crop=(16, 16, 16)), ".safetensors")


def codes(task: Any, suffix: str) -> Case:
    model = task.model
    data = CodeData(grid=model.grid, sub_codes=model.sub_codes, code_bits=model.code_bits, batch_size=8)
    return Case("elm", task, data, suffix)


SEED = Seed(
    model=SeedConfig(
        vision=EvaViTConfig(image_size=8, patch_size=4, num_layers=1, d_model=16, num_heads=2, mlp_dim=24),
        qformer=QFormerConfig(**SIZES | {"num_layers": 3}, num_queries=3, context_width=16, vocab_size=0),
        codebook_size=8,
        code_dim=4,
        depth=1,
        block_heads=2,
        feature_dim=8 * 8 * 3,
    ),
    target="image",
)
LM_SIZES = {**SIZES, "vocab_size": 400, "max_length": 32}
HUB_SIZES = {**LM_SIZES, "head_size": 8, "mlp_bias": False}
CASES: dict[str, Callable[[], Case]] = {
    "gpt2": lambda: language_model("huggingface", GPT2Config(**LM_SIZES, norm_eps=1e-5)),
    "opt": lambda: language_model("huggingface", OPTConfig(**LM_SIZES)),
    "llama, a tokenizer.json": lambda: language_model(
        "huggingface",
        LlamaConfig(**HUB_SIZES, num_kv_heads=1),
        str(HUB_FOLDER / "tokenizer.json"),
        **BPE,
    ),
    "mistral": lambda: language_model("huggingface", LlamaConfig(**HUB_SIZES, num_kv_heads=1, window=7)),
    "qwen2": lambda: language_model(
        "huggingface", LlamaConfig(**HUB_SIZES, num_kv_heads=2, qkv_bias=True, window=5, full_layers=(0,))
    ),
    "gemma": lambda: language_model(
        "huggingface",
        LlamaConfig(
            **HUB_SIZES,
            num_kv_heads=1,
            norm="rms_plus_one",
            activation="gelu_tanh",
            tie_embeddings=True,
            scale_embeddings=True,
        ),
    ),
    "mamba": lambda: language_model(
        "mamba", MambaConfig(num_layers=2, d_model=16, state_size=4, use_bias=True, vocab_size=400, max_length=32)
    ),
    "tokenformer": lambda: language_model(
        "tokenformer",
        TokenFormerConfig(
            num_layers=2, d_model=16, num_heads=2, tokens=uniform_counts(6, 12), vocab_size=384, max_length=32
        ),
    ),
    "bert": lambda: encoder("bert", MaskedWords(model=BertConfig(**ENCODER), masking=MASKING)),
    "roberta, classes": lambda: encoder(
        "bert",
        TextClassification(
            model=BertConfig(
                **ENCODER | {"max_positions": 34},
                pad_id=1,
                positions_from_ids=True,
                mask_head=False,
                pooler=False,
                next_sentence=False,
                num_classes=3,
            )
        ),
    ),
    "electra, discriminator": lambda: encoder(
        "electra", ReplacedTokens(model=ELECTRA, masking=MASKING, generator="uniform")
    ),
    "electra, generator": lambda: encoder("electra", MaskedWords(model=WORDS, masking=MASKING)),
    "electra, variables": lambda: encoder(
        "electra_tensorflow", ReplacedTokens(model=ELECTRA, masking=MASKING), suffix=".npz"
    ),
    "t5": lambda: Case("t5", SequenceToSequence(model=T5Config(**T5_SIZES)), PAIRS),
    "mrt5": lambda: Case("t5", MrT5Training(model=MrT5Config(**T5_SIZES, gate_layer=1, softmax1=True)), PAIRS),
    "hat": lambda: Case("hat", *hat_task_and_data(RELEASED)),
    "word_pooled": lambda: Case(
        "word_pooled", WordPooling(model=POOLED), WordUnitText(length=24, batch_size=8, max_units=6)
    ),
    "word_pooled, plain": lambda: Case(
        "word_pooled", LanguageModeling(model=PLAIN), NormalizedText(length=24, batch_size=8, rule="spaces")
    ),
    "byte2word": lambda: Case(
        "byte2word",
        ByteWords(model=BYTE2WORD),
        WordPieceText(length=16, batch_size=8, max_bytes=6, max_pieces=6),
    ),
    "bae": lambda: images(BAEConfig(**TOWERS, embed_dim=32, bits=6)),
    "flextok": lambda: Case("flextok", FlexTokenizer(model=FLEXTOK), IMAGES, ".safetensors"),
    "tokenunify": lambda: volumes(3),
    "vqgan": lambda: images(VQGANConfig(**TOWERS, embed_dim=32, codebook_size=16)),
    "kl_vae": lambda: Case("kl_vae", KLAutoencoding(**VAE), IMAGES, ".safetensors"),
    "kl_vae, diffusers": lambda: Case("kl_vae_diffusers", KLAutoencoding(**VAE), IMAGES),
    "tokenbridge": lambda: Case(
        "tokenbridge",
        TokenBridgeModeling(model=BRIDGE),
        CodeData(shape=BRIDGE.code_shape, values=BRIDGE.code_values, batch_size=8),
        ".safetensors",
    ),
    "seed": lambda: Case("seed", SEED, dataclasses.replace(IMAGES, size=8), ".safetensors"),
    "elm": lambda: codes(ElmModeling(model=ElmConfig(**ELM, code_bits=3, sub_codes=2)), ".safetensors"),
    "elm, masked": lambda: codes(MaskedElmModeling(model=MaskedElmConfig(**ELM, code_bits=4, sub_codes=2)), ".npz"),
}
"""Cases by kind of model. A case here puts a new format into the contract."""


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "corpus.txt"
    file.write_text("".join(f"This is line {n}, with some more words in it.\n" for n in range(80)))
    return str(file)


def same(ours: Model, theirs: Model) -> None:
    """Checks that task, parameters (bit for bit), and what begins and ends texts are equal."""
    assert ours.task == theirs.task
    chex.assert_trees_all_equal_structs(ours.params, theirs.params)
    chex.assert_trees_all_equal_dtypes(ours.params, theirs.params)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    assert (ours.begin, ours.ends, ours.pad) == (theirs.begin, theirs.ends, theirs.pad)
    if ours.tokenizer is not None:
        text = "some text, naïve \x00"
        assert ours.tokenizer.encode(text) == theirs.tokenizer.encode(text)


def test_every_format_has_a_case():
    assert {make().format for make in CASES.values()} | {"peft", "gguf"} == {form.name for form in FORMATS}
    assert len({form.name for form in FORMATS}) == len(FORMATS)


def test_written_then_read_is_the_same(case, tmp_path):
    form, model = format_named(case.format), case.model()
    path = form.write(case.target(tmp_path), model)
    read = form.read(path, case.like)
    same(dataclasses.replace(model, tokenizer=None, begin=(), ends=()) if case.suffix else model, read)
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "and nothing beside it"
    assert recognised(path) == [form] and format_of(path, case.like) is form
    if not case.suffix:
        assert format_of(path) is form
        like = form.read(path, case.task)
        assert like.task == case.task


def test_who_owns_what(case):
    owners = {form.name for form in FORMATS if form.owns(case.task)}
    several = ({"electra", "electra_tensorflow"}, {"kl_vae", "kl_vae_diffusers"})
    assert owners == {case.format}.union(*(names for names in several if case.format in names)) - (
        {"electra_tensorflow"} if type(case.task) is TextClassification else set()
    )
    assert format_for(case.task, case.target(Path("x"))).name == case.format


def test_a_failure_leaves_nothing(case, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("the disk is full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="the disk is full"):
        format_named(case.format).write(case.target(tmp_path / "new"), case.model())
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not case.target(tmp_path / "new").exists()


def change_tensors(path: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Changes the tensors of a written folder or file."""
    file = next(path.glob("*.safetensors")) if path.is_dir() else path
    if file.suffix == ".npz":
        with np.load(file) as held:
            tensors = dict(held)
        change(tensors)
        np.savez(file, **tensors)
    else:
        tensors = safetensors.numpy.load_file(file)
        change(tensors)
        safetensors.numpy.save_file(tensors, file)


def test_tensors_that_do_not_fit_are_named(case, tmp_path):
    form = format_named(case.format)
    path = form.write(case.target(tmp_path), case.model())
    names: list[str] = []

    def break_them(tensors):
        matrices = sorted(name for name in tensors if tensors[name].ndim in (2, 4))
        wide, gone = [name for name in matrices if re.search(r"[._](1|3)[./].*(?<!conv_out.weight)$", name)][-2:]
        tensors[wide] = np.concatenate([tensors[wide]] * 2)
        del tensors[gone]
        tensors["surprise"] = np.zeros(2, np.float32)
        names.extend([f"{name} {what}" for name, what in ((wide, "has shape"), (gone, "is missing"))])

    change_tensors(path, break_them)
    with pytest.raises(ValueError, match="do not fit the config") as error:
        form.read(path, case.like)
    for part in [*names, "surprise is unknown"]:
        assert part.removeprefix("ae.") in str(error.value)
    change_tensors(path, lambda tensors: tensors.update({"surprise": np.zeros(2, np.int8)}))
    with pytest.raises(ValueError, match="surprise is unknown"):
        form.read(path, case.like)


def write_config(folder: Path, run: Path) -> str:
    """A config file that is like that of a run."""
    file = folder / "config.py"
    file.write_text(
        "from pathlib import Path\nfrom jaxtok.training.checkpoints import read_config\n"
        f"config = read_config(Path({str(run)!r}))\n"
    )
    return str(file)


EVALUATED = ("gpt2", "mamba", "tokenformer", "bert", "electra, variables", "t5", "word_pooled", "byte2word", "bae")
"""Whose numbers are compared, too: one of each format. The rest are with --slow, as are hat's rows of 4,096 bytes."""


def test_there_and_back_by_the_verb(case, tmp_path, corpus, request):
    """A run, the other format, and a run again: the same tensors, and the same numbers of an evaluation."""
    model, run, target, back = case.model(), tmp_path / "run", case.target(tmp_path), tmp_path / "back"
    begin(Experiment(task=case.task, data=case.data, name="run", workdir=str(run)), model.params)
    if case.facts:
        (run / "text.json").write_text(json.dumps(case.facts))
    assert main(["convert", str(run), str(target)]) == 0
    config = ["--config", write_config(tmp_path, run)] if case.suffix else []
    assert main(["convert", str(target), str(back), *config]) == 0
    same(open_run(back), open_run(run))
    again = case.target(tmp_path / "again")
    assert main(["convert", str(back), str(again)]) == 0
    if again.is_dir():
        assert {file.name for file in again.iterdir()} == {file.name for file in target.iterdir()}
        for file in again.iterdir():
            assert file.read_bytes() == (target / file.name).read_bytes(), file.name
    else:
        assert again.read_bytes() == target.read_bytes() or again.suffix == ".npz"  # a zip has the time in it
    if isinstance(case.data, CodeData):
        losses = [code_loss(open_run(path)) for path in (run, back)]
        assert losses[0] == losses[1] and np.isfinite(losses[0])
    elif not (request.config.getoption("--slow") or request.node.callspec.params["case"] in EVALUATED):
        return
    elif not isinstance(case.task, TextClassification):
        options = {"split": "all", "batches": 1} | ({} if isinstance(case.data, ImageData) else {"corpus": corpus})
        paths = [run, back] if case.suffix else [run, back, target]
        rows = [evaluate(path, **options) for path in paths]
        for row in rows[1:]:
            assert {**row, "checkpoint": ""} == {**rows[0], "checkpoint": ""}


def code_loss(model: Model) -> float:
    rng = np.random.default_rng(0)
    batch = {name: np.zeros(spec.shape, spec.dtype) for name, spec in model.data.batch_spec().items()}
    batch["codes"] = rng.integers(0, model.task.code_values[0], batch["codes"].shape).astype(np.int32)
    batch["mask"] = np.ones_like(batch["mask"])
    return float(jax.jit(model.task.loss)(model.params, batch, jax.random.key(0), 0)[0])


# ---------------------------------------------------------------------------------------------------- of single formats


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A base in Hugging Face's format, a run that trains an adapter of it, and the model that this gives."""
    folder = tmp_path_factory.mktemp("adapter")
    case = CASES["llama, a tokenizer.json"]()
    base = format_named("huggingface").write(folder / "base", case.model())
    task = Lora(task=case.task, lora=LoraConfig(rank=2, targets=(r".*/kernel",), saved=("final_norm/.*",)))
    params = Case("peft", task, case.data).model().params | {"frozen": case.model().params}
    begin(Experiment(task=task, data=case.data, workdir=str(folder / "run")), params)
    return base, folder / "run", dataclasses.replace(case.model(), params=task.merged(params))


def test_an_adapter_there_and_back(adapter, tmp_path):
    base, run, merged = adapter
    assert main(["convert", str(run), str(tmp_path / "peft"), "--base", str(base)]) == 0
    form = format_named("peft")
    assert recognised(tmp_path / "peft") == [form] and form.owns(open_run(run).task)
    assert [other.name for other in FORMATS if other.owns(open_run(run).task)] == ["peft"]
    assert main(["convert", str(tmp_path / "peft"), str(tmp_path / "back")]) == 0
    back = open_run(tmp_path / "back")
    assert back.task == merged.task and (back.begin, back.ends) == (merged.begin, merged.ends)
    chex.assert_trees_all_close(back.params, merged.params, atol=1e-6)
    options = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    (tmp_path / "peft" / "adapter_config.json").write_text(
        json.dumps(options | {"base_model_name_or_path": "some/model"})
    )
    with pytest.raises(FileNotFoundError, match="adapter of the model 'some/model', which is not a folder here"):
        form.read(tmp_path / "peft")
    assert main(["convert", str(tmp_path / "peft"), str(tmp_path / "other"), "--base", str(base)]) == 0


def test_a_bert_lends_its_layers_to_a_byte2word(tmp_path):
    bert = CASES["bert"]().model()
    format_named("bert").write_model(tmp_path / "bert", bert.task.model, bert.params)
    case = CASES["byte2word"]()
    run = begin(Experiment(task=case.task, data=case.data, workdir=str(tmp_path / "run")), case.model().params)
    config = write_config(tmp_path, run)
    assert main(["convert", str(tmp_path / "bert"), str(tmp_path / "new"), "--config", config]) == 0
    new = open_run(tmp_path / "new")
    assert new.task == case.task and new.data == case.data
    jax.tree.map(np.testing.assert_array_equal, new.params["stack"], bert.params["stack"])
    with pytest.raises(ValueError, match="give the config of one"):
        format_named("byte2word").read(tmp_path / "bert")


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("electra, discriminator", {"generator": "encoder"}),
        ("mrt5", {"target_rate": 0.5}),
        ("gpt2", {}),
    ],
)
def test_a_config_says_how_a_folder_is_trained_on(name, changed, tmp_path):
    """Parameters that the folder does not have (a generator, a controller) are new, and the run can be opened."""
    case = CASES[name]()
    folder = format_named(case.format).write(tmp_path / "folder", case.model())
    task = dataclasses.replace(case.task, **changed)
    run = Case(case.format, task, dataclasses.replace(case.data, corpus="some/texts"))
    config = write_config(
        tmp_path, begin(Experiment(task=task, data=run.data, workdir=str(tmp_path / "run")), run.model().params)
    )
    assert main(["convert", str(folder), str(tmp_path / "new"), "--config", config]) == 0
    new = open_run(tmp_path / "new")
    assert new.task == task and new.data.corpus == "some/texts"
    assert jax.tree.structure(new.params) == jax.tree.structure(run.model().params)
    assert format_for(new.task).model_of(new.task, new.params)[0] == case.task.model
    again = format_for(new.task).write(tmp_path / "again", new)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="the config must be that of one too"):
        format_named(case.format).read(folder, CASES["hat"]().task)


def test_a_file_of_another_model_than_the_configs(tmp_path, capsys):
    elm, bae = CASES["elm"](), CASES["bae"]()
    file = format_named("elm").write(tmp_path / "elm.safetensors", elm.model())
    run = begin(Experiment(task=bae.task, data=bae.data, workdir=str(tmp_path / "run")), bae.model().params)
    command = ["convert", str(file), str(tmp_path / "new"), "--config", write_config(tmp_path, run)]
    assert main(command) == 1
    assert "encoder.blocks.0.weight is missing" in printed_error(capsys) and not (tmp_path / "new").exists()
    assert main(["convert", str(run), str(file)]) == 1
    assert "exists already" in printed_error(capsys), "nothing is overwritten"


def test_a_model_that_is_more_than_its_body_is_not_written_as_that():
    task = LexinvariantModeling(model=CASES["tokenformer"]().task.model, random_symbols=0.5)
    with pytest.raises(ValueError, match="of LexinvariantModeling, for which there is no format here"):
        format_for(task)


def test_the_format_can_be_chosen(tmp_path, capsys):
    case = CASES["electra, variables"]()
    run = begin(Experiment(task=case.task, data=case.data, workdir=str(tmp_path / "run")), case.model().params)
    for form, name in (("electra_tensorflow", "a.safetensors"), ("electra", "a")):
        assert main(["convert", str(run), str(tmp_path / name), "--format", form]) == 0
        assert recognised(tmp_path / name) == [format_named(form)]
    assert main(["convert", str(run), str(tmp_path / "b"), "--format", "elm"]) == 1
    assert "format is elm, which cannot hold a ReplacedTokens" in printed_error(capsys)
    assert main(["convert", str(run), str(tmp_path / "b"), "--format", "onnx"]) == 1
    assert "the format is 'onnx'; it must be one of huggingface, mamba, bert" in printed_error(capsys)
    assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b")]) == 1
    assert "holds bare tensors; give the config of the model (--config)" in printed_error(capsys)
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--which", "ema"]) == 1
    assert "the format electra does not take which; leave it out" in printed_error(capsys)
    assert main(["convert", str(run), str(tmp_path / "b.safetensors"), "--torch-bin"]) == 1
    assert "the format electra_tensorflow does not take torch_bin; leave it out" in printed_error(capsys)
    assert not (tmp_path / "b").exists() and not (tmp_path / "b.safetensors").exists()


def test_a_run_that_has_grown_begins_its_texts_as_before(tmp_path):
    model = dataclasses.replace(CASES["tokenformer"]().model(), begin=(97,), ends=(98, 99), pad=100)
    grown = grow(write_run(tmp_path / "run", model), times=2.0)
    assert grown == tmp_path / "run-grown"
    opened = open_run(grown)
    assert (opened.begin, opened.ends, opened.pad) == ((97,), (98, 99), 100)


def test_a_file_is_opened_with_the_data_of_its_config(tmp_path):
    case = CASES["electra, variables"]()
    file = format_named("electra_tensorflow").write(tmp_path / "a.safetensors", case.model())
    run = begin(Experiment(task=case.task, data=case.data, workdir=str(tmp_path / "run")), case.model().params)
    opened = open_model(file, config=write_config(tmp_path, run))
    assert opened.data == case.data and opened.tokenizer.name == "bytes"
    assert opened.on(batches=1).eval_limit == 1
    with pytest.raises(ValueError, match=r"nothing says what data .*a.safetensors is of; open it with its config"):
        format_named("electra_tensorflow").read(file, case.task).evaluate()


def printed_error(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_what_is_in_no_format(tmp_path, capsys):
    for content, words in {
        None: "does not exist; give a folder or file of a model",
        "": "is empty, which is in none of the formats here (huggingface: GPT-2, OPT, Llama",
        '{"model_type": "rwkv"}': "has the model_type 'rwkv' in its config.json",
        "{": "config.json is not JSON",
        "[1]": "holds a list; it must be a JSON object",
    }.items():
        shutil.rmtree(tmp_path / "odd", ignore_errors=True)
        if content is not None:
            (tmp_path / "odd").mkdir()
        if content:
            (tmp_path / "odd" / "config.json").write_text(content)
        assert main(["convert", str(tmp_path / "odd"), str(tmp_path / "run")]) == 1
        assert words in printed_error(capsys)
        assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------ what begins and ends a text


@pytest.fixture
def hub(tmp_path):
    """A copy of a Hugging Face folder, to be changed."""
    shutil.copytree(HUB_FOLDER, tmp_path / "hub")
    for path in (tmp_path / "hub").iterdir():
        path.chmod(0o644)
    return tmp_path / "hub"


def edit(path: Path, **changed: Any) -> None:
    options = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({name: value for name, value in options.items() if value is not None}))


def ends_of(folder: Path) -> tuple:
    model = format_of(folder).read(folder)
    return model.begin, model.ends, model.pad


def test_where_the_ends_of_texts_come_from(hub):
    assert ends_of(hub) == ((380,), (381, 383), 382)
    edit(hub / "generation_config.json", eos_token_id=383)
    assert ends_of(hub)[1] == (383,), "generation_config.json comes first"
    (hub / "generation_config.json").unlink()
    assert ends_of(hub) == ((380,), (381, 383), 382)
    edit(hub / "config.json", eos_token_id=None)
    assert ends_of(hub)[1] == (381,), "and then the eos_token of tokenizer_config.json"
    edit(hub / "tokenizer_config.json", add_bos_token=False)
    assert ends_of(hub)[0] == (380,), "the tokenizer.json says so, which transformers follows"
    tokenizer = json.loads((hub / "tokenizer.json").read_text())
    _, template = tokenizer["post_processor"]["processors"]
    template["single"].append({"SpecialToken": {"id": "<|end_of_text|>", "type_id": 0}})
    template["special_tokens"]["<|end_of_text|>"] = {
        "id": "<|end_of_text|>",
        "ids": [381],
        "tokens": ["<|end_of_text|>"],
    }
    (hub / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert ends_of(hub)[0] == (380,), "what is written after a text is no part of a prompt"
    edit(hub / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ValueError, match="no eos_token_id, neither in generation_config"):
        ends_of(hub)


def test_the_symbols_of_an_encoder_come_from_its_tokenizer(tmp_path):
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", *(f"##{letter}" for letter in "abcdefgh")]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(names[:5])
    model = CASES["bert"]().model()
    folder = format_named("bert").write_model(tmp_path / "bert", model.task.model, model.params)
    tokenizer.save(str(folder / "tokenizer.json"))
    read = format_of(folder).read(folder)
    assert (read.task.masking.mask_id, read.task.masking.kept_ids) == (4, (2, 3))
    assert (read.data.cls_id, read.data.sep_id, read.data.pad_id) == (2, 3, 0)
    assert (read.begin, read.ends) == ((2,), (3,))
    assert read.tokenizer.encode("abc") == tokenizer.encode("abc", add_special_tokens=False).ids


def test_a_run_and_an_export_keep_them(hub, tmp_path):
    assert main(["convert", str(hub), str(tmp_path / "run")]) == 0
    run = open_run(tmp_path / "run")
    assert (run.begin, run.ends, run.pad) == ((380,), (381, 383), 382)
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "back")]) == 0
    assert ends_of(tmp_path / "back") == ends_of(hub)
    for name in ("config.json", "generation_config.json"):
        options = json.loads((tmp_path / "back" / name).read_text())
        ids = {"bos_token_id": 380, "eos_token_id": [381, 383], "pad_token_id": 382}
        assert {key: options[key] for key in ids} == ids
    assert (tmp_path / "back" / "tokenizer_config.json").is_file()


def test_a_sentencepiece_file_goes_along(tmp_path):
    texts = (f"some text number {n} with words in it" for n in range(200))
    spec = str(train_sentencepiece(texts, tmp_path / "words.model", vocab_size=300))
    case = language_model("huggingface", LlamaConfig(**LM_SIZES), spec)
    run = begin(Experiment(task=case.task, data=case.data, workdir=str(tmp_path / "run")), case.model().params)
    assert main(["convert", str(run), str(tmp_path / "folder")]) == 0
    (tmp_path / "words.model").unlink()
    assert main(["convert", str(tmp_path / "folder"), str(tmp_path / "back")]) == 0
    back = open_run(tmp_path / "back")
    assert back.data.tokenizer == str(tmp_path / "back" / "words.model")
    assert back.tokenizer.decode(back.tokenizer.encode("number 7")) == b"number 7"


def test_a_tokenizer_that_cannot_be_read_is_not_replaced_by_another(hub, tmp_path, capsys):
    (hub / "tokenizer.json").rename(hub / "kept.json")
    (hub / "tokenizer.model").write_bytes(b"x")
    assert main(["convert", str(hub), str(tmp_path / "run")]) == 1
    assert "tokenizer.model is not a SentencePiece model" in printed_error(capsys)
    (hub / "tokenizer.model").rename(hub / "qwen.tiktoken")
    assert main(["convert", str(hub), str(tmp_path / "run")]) == 1
    assert "holds no tokenizer.json (there is qwen.tiktoken, of a tokenizer of the kind " in printed_error(capsys)
    (hub / "qwen.tiktoken").unlink()
    (hub / "tokenizer_config.json").unlink()
    assert main(["eval", str(hub)]) == 1
    assert "holds no tokenizer.json (there is none); it needs that" in printed_error(capsys)
    assert not (tmp_path / "run").exists()
    assert main(["convert", str(hub), str(tmp_path / "run"), "--tokenizer", str(hub / "kept.json")]) == 0
    assert open_run(tmp_path / "run").tokenizer.vocab_size == 384
    case = CASES["t5"]()
    folder = format_named("t5").write(tmp_path / "t5", case.model())
    edit(folder / "config.json", jaxtok=None)
    assert format_of(folder).read(folder).data.tokenizer == "byt5"
    (folder / "spiece.model").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"spiece\.model is not a SentencePiece model"):
        format_of(folder).read(folder)
    (folder / "spiece.model").unlink()
    edit(folder / "config.json", vocab_size=32128)
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json \(there is none\)"):
        format_of(folder).read(folder)


# ----------------------------------------------------------------------------------------------- what must not be read


def test_weights_that_are_no_weights(hub):
    index = json.loads((hub / "model.safetensors.index.json").read_text())
    for shard in ("../elsewhere.safetensors", "/elsewhere.safetensors"):
        name = next(iter(index["weight_map"]))
        changed = index | {"weight_map": index["weight_map"] | {name: shard}}
        (hub / "model.safetensors.index.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="it must be a file of the same folder"):
            format_of(hub).read(hub)
    (hub / "model.safetensors.index.json").write_text(json.dumps(index))
    file = hub / "model-00001-of-00002.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = next(name for name in tensors if "proj" in name)
    safetensors.numpy.save_file(tensors | {name: tensors[name].astype(np.int8)}, file)
    with pytest.raises(ValueError, match=f"{name} holds int8, which are not weights without their scales"):
        format_of(hub).read(hub)
    edit(hub / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(ValueError, match=r"is quantised \(gptq in its config\.json\)"):
        format_of(hub).read(hub)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["gpt2", "tokenformer", "electra, variables", "elm", "bae", "hat"])
def test_weights_that_are_not_finite(name, value, tmp_path, capsys):
    case = CASES[name]()
    path = format_named(case.format).write(case.target(tmp_path), case.model())
    broken = []

    def break_one(tensors):
        broken.append(sorted(tensors)[-1])
        tensors[broken[0]].flat[-1] = value

    change_tensors(path, break_one)
    run = begin(Experiment(task=case.task, data=case.data, workdir=str(tmp_path / "run")), case.model().params)
    config = ["--config", write_config(tmp_path, run)] if case.suffix else []
    assert main(["convert", str(path), str(tmp_path / "new"), *config]) == 1
    name = broken[0].removeprefix("ae.")
    assert f"{name} holds NaN or infinity, so it is damaged; fetch the weights again." in printed_error(capsys)
    assert not (tmp_path / "new").exists()


def test_an_npz_file_of_something_else(tmp_path, capsys):
    case = CASES["elm, masked"]()
    run = begin(Experiment(task=case.task, data=case.data, workdir=str(tmp_path / "run")), case.model().params)
    file = tmp_path / "a.npz"
    np.savez(file, a=np.ones(9))
    good = file.read_bytes()
    np.save(tmp_path / "a.npy", np.ones(9))
    contents = [b"", b"x" * 90, good[:-30], good[:60] + b"x" * 30 + good[90:], (tmp_path / "a.npy").read_bytes()]
    for odd in (np.array(["a text"]), np.array([{}]), np.zeros(3, "V2")):
        np.savez(file, a=odd)
        contents.append(file.read_bytes())
    for content in contents:
        file.write_bytes(content)
        assert main(["convert", str(file), str(tmp_path / "new"), "--config", write_config(tmp_path, run)]) == 1
        assert "a.npz is damaged or not an .npz file of numbers (" in printed_error(capsys), content[:9]
    assert not (tmp_path / "new").exists()


def test_an_adapter_whose_weights_are_no_weights(adapter, tmp_path, capsys):
    base, run, _ = adapter
    assert main(["convert", str(run), str(tmp_path / "peft"), "--base", str(base)]) == 0
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = next(iter(tensors))
    for odd, message in ((tensors[name] * np.nan, "holds NaN"), (tensors[name].astype(np.int8), "holds int8")):
        safetensors.numpy.save_file(tensors | {name: odd}, file)
        assert main(["convert", str(tmp_path / "peft"), str(tmp_path / "back")]) == 1
        assert f"{name} {message}" in printed_error(capsys)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4"])
def test_weights_of_eight_bits_and_less(dtype, tmp_path, capsys):
    """NumPy does not have these types, so that the library fails to read them."""
    case = CASES["gpt2"]()
    folder = format_named("huggingface").write(tmp_path / "folder", case.model())
    elm = CASES["elm"]()
    run = begin(Experiment(task=elm.task, data=elm.data, workdir=str(tmp_path / "run")), elm.model().params)
    names = {
        folder / "model.safetensors": "transformer.ln_f.bias",
        tmp_path / "elm.safetensors": "cls_embedding.weight",
    }
    format_named("elm").write(tmp_path / "elm.safetensors", elm.model())
    for file in names:
        length = int.from_bytes(file.read_bytes()[:8], "little")
        header = json.loads(file.read_bytes()[8 : 8 + length])
        header.pop("__metadata__", None)
        size = max(entry["data_offsets"][1] for entry in header.values())
        names[file] = name = next(n for n, e in header.items() if e["data_offsets"][1] == size)
        bits = 4 if dtype == "F4" else 8
        header[name] |= {"dtype": dtype, "shape": [(size - header[name]["data_offsets"][0]) * 8 // bits]}
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + file.read_bytes()[8 + length :])
    for file, config in {folder: [], tmp_path / "elm.safetensors": ["--config", write_config(tmp_path, run)]}.items():
        assert main(["convert", str(file), str(tmp_path / "new"), *config]) == 1
        error = printed_error(capsys)
        assert f"holds {dtype}, which are not weights without their scales." in error
        assert names.get(file, names[folder / "model.safetensors"]) in error


HEADS = {
    "bert": ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    "roberta": ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
    "electra, generator": ("generator_lm_head.weight", "electra.embeddings.word_embeddings.weight"),
    "t5": ("lm_head.weight", "shared.weight"),
    "gpt2": ("lm_head.weight", "transformer.wte.weight"),
    "qwen2": ("lm_head.weight", "model.embed_tokens.weight"),
    "gemma": ("lm_head.weight", "model.embed_tokens.weight"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("roberta", "qwen2", "gemma"))) for name in HEADS]
)
def test_the_tensors_tell_whether_a_head_is_the_embedding(name, tmp_path, capsys):
    """Whatever config.json says; and a run and an export keep it."""
    case = CASES["bert" if name == "roberta" else name]()
    positions = {"positions_from_ids": True, "max_positions": 33} if name == "roberta" else {}
    head, table = HEADS[name]
    models = {}
    for tied in (True, False):
        model = dataclasses.replace(case.task.model, tie_embeddings=tied, **positions)
        task = dataclasses.replace(case.task, model=model)
        models[tied] = dataclasses.replace(case, task=task).model()
        folder = format_named(case.format).write(tmp_path / f"{tied}", models[tied])
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] == tied
        edit(folder / "config.json", tie_word_embeddings=not tied)
        if tied:
            assert main(["convert", str(folder), str(tmp_path / "run")]) == 1
            assert f"there is no tensor {head}, and config.json says that the head is not" in printed_error(capsys)
            assert not (tmp_path / "run").exists()
            change_tensors(folder, lambda t: t.update({head: t[table]}))
        assert main(["convert", str(folder), str(tmp_path / f"run-{tied}")]) == 0
        same(open_run(tmp_path / f"run-{tied}"), models[tied])
        assert main(["convert", str(tmp_path / f"run-{tied}"), str(tmp_path / f"back-{tied}")]) == 0
        again = safetensors.numpy.load_file(tmp_path / f"back-{tied}" / "model.safetensors")
        assert (head in again) == (not tied)


def test_an_encoder_whose_head_has_a_bias_of_its_own(tmp_path):
    """The head adds `decoder.bias`, of which `bias` is usually another name."""
    case = CASES["bert"]()
    folder = format_named("bert").write(tmp_path / "bert", case.model())
    old, own = "cls.predictions.bias", "cls.predictions.decoder.bias"
    change_tensors(folder, lambda t: t.update({own: t[old]}))
    same(format_of(folder).read(folder), case.model())
    change_tensors(folder, lambda t: t.update({own: t[old] + 1}))
    change_tensors(folder, lambda t: t.update({own.replace("bias", "weight"): t[HEADS["bert"][1]]}))
    np.testing.assert_array_equal(
        format_of(folder).read(folder).params["head_bias"], case.model().params["head_bias"] + 1
    )


def test_a_t5_has_one_embedding(tmp_path, capsys):
    case = CASES["t5"]()
    folder = format_named("t5").write(tmp_path / "t5", case.model())
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        change_tensors(folder, lambda t, name=name: t.update({name: t["shared.weight"]}))
        same(format_of(folder).read(folder), case.model())
        change_tensors(folder, lambda t, name=name: t.update({name: t["shared.weight"] + 1}))
        assert main(["convert", str(folder), str(tmp_path / "run")]) == 1
        assert f"{name} is not shared.weight; encoder and decoder must have the same" in printed_error(capsys)
        change_tensors(folder, lambda t, name=name: t.pop(name))


def test_heads_of_their_own_as_the_library_has_them(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    ids = np.arange(5, 20)[None]
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    sizes |= {"vocab_size": 40, "tie_word_embeddings": False, "initializer_range": 0.2}
    for kind in ("bert", "roberta", "xlm-roberta", "electra"):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(
            kind, **sizes, **({"embedding_size": 8} if kind == "electra" else {})
        )
        theirs = transformers.AutoModelForMaskedLM.from_config(config, attn_implementation="eager").eval()
        for parameter in theirs.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        theirs.save_pretrained(tmp_path / kind)
        with torch.no_grad():
            expected = theirs(torch.tensor(ids)).logits.numpy()
        config, params = read_folder(tmp_path / kind)
        write_folder(tmp_path / f"{kind}-again", config, params)
        again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / f"{kind}-again").eval()
        hidden = jax.jit(config.module().apply)({"params": params}, ids)
        ours = jax.jit(config.module().apply, static_argnames="method")(
            {"params": params}, hidden, method="masked_words"
        )
        np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max(), err_msg=kind)
        with torch.no_grad():
            written = again(torch.tensor(ids)).logits.numpy()
        np.testing.assert_allclose(written, expected, atol=1e-4 * np.abs(expected).max(), err_msg=kind)


def test_a_folder_that_would_be_read_as_another_model_is_not_written(tmp_path, capsys):
    cases = {
        ("tokenformer", "window"): 5,
        ("tokenformer", "scale_embeddings"): True,
        ("tokenformer", "norm_eps"): 1e-3,
        ("tokenformer", "num_kv_heads"): 1,
        ("tokenformer", "relative_buckets"): 8,
        ("t5", "window"): 5,
        ("t5", "norm"): "layernorm",
        ("t5", "use_bias"): True,
        ("mistral", "full_layers"): (0,),
        ("mistral", "use_bias"): True,
        ("gpt2", "window"): 5,
        ("opt", "norm_eps"): 1e-3,
    }
    for number, ((name, field), value) in enumerate(cases.items()):
        case = CASES[name]()
        task = dataclasses.replace(case.task, model=dataclasses.replace(case.task.model, **{field: value}))
        run = begin(
            Experiment(task=task, data=case.data, workdir=str(tmp_path / f"run{number}")),
            dataclasses.replace(case, task=task).model().params,
        )
        assert main(["convert", str(run), str(tmp_path / "written")]) == 1, (name, field)
        said = printed_error(capsys)
        assert field.removeprefix("num_") in said or "the format has no name for the parameter" in said, said
        assert not (tmp_path / "written").exists()


def test_the_exact_gelu_of_a_gated_t5_comes_back(tmp_path):
    """Hugging Face reads gated-gelu as the one with tanh."""
    for activation in ("gelu", "gelu_tanh", "silu", "relu"):
        case = CASES["t5"]()
        model = dataclasses.replace(case.task.model, gated=True, activation=activation)
        model = dataclasses.replace(case, task=dataclasses.replace(case.task, model=model)).model()
        same(format_named("t5").read(format_named("t5").write(tmp_path / activation, model)), model)


def test_a_model_is_written_into_the_folder_where_one_is(tmp_path, monkeypatch):
    case = CASES["gpt2"]()
    run = begin(Experiment(task=case.task, data=case.data, workdir=str(tmp_path / "run")), case.model().params)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["convert", str(run), "."]) == 0
    same(format_named("huggingface").read(tmp_path / "here"), case.model())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "run"]


def test_a_damaged_index_is_named(hub, tmp_path, capsys):
    for content in ("{", "{}", "[]", '{"weight_map": []}'):
        (hub / "model.safetensors.index.json").write_text(content)
        assert main(["convert", str(hub), str(tmp_path / "run")]) == 1
        assert "model.safetensors.index.json is damaged" in printed_error(capsys)


def test_shards_of_pytorch_are_read(hub, capsys):
    torch = pytest.importorskip("torch")
    before = format_of(hub).read(hub)
    index = json.loads((hub / "model.safetensors.index.json").read_text())
    for shard in set(index["weight_map"].values()):
        tensors = safetensors.numpy.load_file(hub / shard)
        torch.save({name: torch.tensor(x) for name, x in tensors.items()}, hub / shard.replace("safetensors", "bin"))
        (hub / shard).unlink()
    shard_of = {name: shard.replace("safetensors", "bin") for name, shard in index["weight_map"].items()}
    (hub / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shard_of}))
    (hub / "model.safetensors.index.json").unlink()
    same(before, format_of(hub).read(hub))
    (hub / max(shard_of.values())).unlink()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin\.index\.json names it"):
        format_of(hub).read(hub)


def test_a_t5_without_the_shared_table_can_have_a_head_of_its_own(tmp_path):
    case = CASES["t5"]()
    task = dataclasses.replace(case.task, model=dataclasses.replace(case.task.model, tie_embeddings=False))
    model = dataclasses.replace(case, task=task).model()
    folder = format_named("t5").write(tmp_path / "t5", model)
    change_tensors(folder, lambda t: t.update({"encoder.embed_tokens.weight": t.pop("shared.weight")}))
    same(format_of(folder).read(folder), model)
