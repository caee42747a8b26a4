"""Tiny GGUF files, written with the library's own writer from models and tokenizers of random weights and words."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxtok.interop.huggingface import params_to
from jaxtok.lm.decoder import Decoder, init_params
from jaxtok.lm.gpt2 import GPT2Config
from jaxtok.lm.llama import LlamaConfig

SIZES = {"num_layers": 2, "d_model": 32, "num_heads": 4, "mlp_dim": 64, "max_length": 64}
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_DIGITS = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}


def texts(count: int, seed: int = 0) -> list[str]:
    """Random texts: words, numbers, contractions, white space, and characters of many kinds."""
    rng = random.Random(seed)
    parts = [
        "the",
        " and",
        "don't",
        "I'LL",
        "12",
        "2026",
        " 7",
        "  ",
        "\n",
        "\n\n ",
        "\t",
        "é",
        "naïve",
        "…",
        "漢字",
        "🙂👍🏽",
    ]
    parts += ["x = f(y);", "<b>", " http://a.b/c?d=1", "<|im_end|>", "\u200d", "Ω", " ", "½", "٣", "'s", "_", "\x00"]
    return ["".join(rng.choice(parts) for _ in range(rng.randrange(1, 12))) for _ in range(count)]


def byte_level(pre: str) -> tokenizers.Tokenizer:
    """A BPE of about 400 tokens that cuts text as the models of a pre-tokenizer do."""
    found = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    if pre == "gpt-2":
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        found.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    else:
        cut = pre_tokenizers.Split(tokenizers.Regex(_CUT.replace("DIGITS", _DIGITS[pre])), behavior="isolated")
        found.pre_tokenizer = pre_tokenizers.Sequence(
            [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[*SPECIAL],
        show_progress=False,
    )
    lines = [f"This is line {n}, with some words in it.\n" for n in range(80)]
    found.train_from_iterator(texts(200, seed=1) + lines, trainer)
    return found


def sentences(path: Path, prefix: bool) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece BPE of 400 pieces with a token for each byte; its model is written to a path."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts(300, seed=1) + ["This is a line, with some words in it."] * 20),
        model_prefix=str(path.with_suffix("")),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        user_defined_symbols=["<turn>", "▁▁"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(path.with_suffix(".model")))


def tokenizer_fields(pre: str, own: tokenizers.Tokenizer) -> dict[str, Any]:
    """The metadata of a byte-level BPE."""
    vocab = own.get_vocab()
    names = sorted(vocab, key=vocab.get)
    merges = [" ".join(pair) for pair in json.loads(own.to_str())["model"]["merges"]]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": names,
        "token_type": [3 if name in SPECIAL else 1 for name in names],
        "merges": merges,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 0,
    }


def sentence_fields(own: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """The metadata of a SentencePiece model."""

    def kind(i: int) -> int:
        if own.is_unknown(i) or own.is_control(i):
            return 2 if own.is_unknown(i) else 3
        return 6 if own.is_byte(i) else 4 if own.id_to_piece(i) in ("<turn>", "▁▁") else 1

    ids = range(own.get_piece_size())
    return {
        "model": "llama",
        "tokens": [own.id_to_piece(i).replace("▁▁", "  ") if kind(i) == 4 else own.id_to_piece(i) for i in ids],
        "scores": [own.get_score(i) for i in ids],
        "token_type": [kind(i) for i in ids],
        "bos_token_id": own.bos_id(),
        "eos_token_id": own.eos_id(),
        "unknown_token_id": own.unk_id(),
    }


def config_of(kind: str, vocab_size: int) -> LlamaConfig | GPT2Config:
    if kind == "gpt2":
        sizes = {**SIZES, "mlp_dim": 128, "max_length": 1024}  # transformers takes no others from such a file
        return GPT2Config(**sizes, vocab_size=vocab_size, norm_eps=1e-5)
    sizes = {**SIZES, "vocab_size": vocab_size, "norm_eps": 1e-5, "head_size": 8}
    if kind == "gemma":
        more = {"norm": "rms_plus_one", "activation": "gelu_tanh", "scale_embeddings": True, "tie_embeddings": True}
        return LlamaConfig(**sizes, num_kv_heads=1, **more)
    more = {"qkv_bias": True} if kind == "qwen2" else {"mlp_bias": False, "tie_embeddings": True}
    return LlamaConfig(**sizes, num_kv_heads=2, **more)


def random_params(config: Any) -> Any:
    shapes = jax.eval_shape(lambda: init_params(Decoder(config), jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(scale=0.3, size=x.shape).astype(x.dtype), shapes)


_NAMES = {
    r"model\.layers\.(\d+)\.input_layernorm": r"blk.\1.attn_norm",
    r"model\.layers\.(\d+)\.post_attention_layernorm": r"blk.\1.ffn_norm",
    r"model\.layers\.(\d+)\.self_attn\.o_proj": r"blk.\1.attn_output",
    r"model\.layers\.(\d+)\.self_attn\.(\w)_proj": r"blk.\1.attn_\2",
    r"model\.layers\.(\d+)\.mlp\.(\w+)_proj": r"blk.\1.ffn_\2",
    r"model\.embed_tokens|transformer\.wte": "token_embd",
    r"model\.norm|transformer\.ln_f": "output_norm",
    r"lm_head": "output",
    r"transformer\.wpe": "position_embd",
    r"transformer\.h\.(\d+)\.ln_1": r"blk.\1.attn_norm",
    r"transformer\.h\.(\d+)\.ln_2": r"blk.\1.ffn_norm",
    r"transformer\.h\.(\d+)\.attn\.c_attn": r"blk.\1.attn_qkv",
    r"transformer\.h\.(\d+)\.attn\.c_proj": r"blk.\1.attn_output",
    r"transformer\.h\.(\d+)\.mlp\.c_fc": r"blk.\1.ffn_up",
    r"transformer\.h\.(\d+)\.mlp\.c_proj": r"blk.\1.ffn_down",
}


def written_there(kind: str, config: Any, name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """A tensor of a Hugging Face folder as llama.cpp's converter writes it."""
    stem, leaf = name.rsplit(".", 1)
    there = next(re.sub(pattern, new, stem) for pattern, new in _NAMES.items() if re.fullmatch(pattern, stem))
    if kind == "llama" and there.endswith(("attn_q", "attn_k")):
        heads = config.num_heads if there.endswith("q") else config.kv_heads
        array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    if kind == "gemma" and there.endswith("norm"):
        array = array + 1
    if kind == "gpt2" and there.startswith("blk.") and array.ndim == 2:
        array = array.T
    return f"{there}.{leaf}", np.ascontiguousarray(array)


def settings_of(kind: str, config: Any) -> dict[str, Any]:
    found = {
        "block_count": config.num_layers,
        "context_length": config.max_length,
        "embedding_length": config.d_model,
        "feed_forward_length": config.mlp_dim,
        "attention.head_count": config.num_heads,
    }
    if kind == "gpt2":
        return found | {"attention.layer_norm_epsilon": 1e-5}
    return found | {
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 5000.0,
    }


def write_gguf(
    path: Path,
    kind: str,
    fields: dict[str, Any],
    settings: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    quantized: gguf.GGMLQuantizationType | None = None,
    template: str = "",
    leave_out: tuple[str, ...] = (),
) -> tuple[Any, Any]:
    """Writes a file; returns the config and the parameters that it has (before they are quantised).

    Args:
      fields: the metadata of the tokenizer.
      settings: further settings of the architecture.
      tensors: further tensors.
      quantized: the type of the matrices.
      leave_out: the beginnings of the names of tensors that are not written.
    """
    config = config_of(kind, len(fields["tokens"]))
    params = random_params(config)
    if kind != "gpt2":
        config = dataclasses.replace(config, rotary_base=5000.0)
    writer = gguf.GGUFWriter(path, kind)
    for name, value in (settings_of(kind, config) | (settings or {})).items():
        _add(writer, f"{kind}.{name}", value)
    for name, value in fields.items():
        _add(writer, f"tokenizer.ggml.{name}", value)
    if template:
        writer.add_chat_template(template)
    for name, array in params_to(config, params).items():
        there, array = written_there(kind, config, name, array)
        if there.startswith(leave_out) and leave_out:
            continue
        if quantized is not None and array.ndim == 2:
            writer.add_tensor(there, gguf.quantize(array, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(there, array)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return config, params


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)
