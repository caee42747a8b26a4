"""GGUF files, the format of llama.cpp: Llama, Qwen2, Gemma and GPT-2, with their tokenizers. They are only read.

A file is looked at as the Hugging Face folder that it was made from: its metadata become a config.json, its tensors are
dequantised and get their old names and layouts when they are used, and its tokenizer becomes files in the cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtok.cache import cache_folder, whole
from jaxtok.data.text import TextData
from jaxtok.interop import huggingface
from jaxtok.interop.texts import Texts, texts_of, told
from jaxtok.model import Model
from jaxtok.nn.rotary import RopeScaling, rotary_frequencies
from jaxtok.tokenizers import load_tokenizer
from jaxtok.tokenizers.huggingface import TURN_ENDS

ARCHITECTURES = ("llama", "qwen2", "gemma", "gpt2")

_KNOWN = re.compile(
    r"block_count|context_length|embedding_length|feed_forward_length|vocab_size|tensor_data_layout|expert_count"
    r"|attention\.(head_count|head_count_kv|key_length|value_length|layer_norm_epsilon|layer_norm_rms_epsilon)"
    r"|rope\.(freq_base|dimension_count|scale_linear)"
    r"|rope\.scaling\.(type|factor|original_context_length|finetuned|attn_factor|yarn_(beta_fast|beta_slow))"
)
"""The sizes and settings of an architecture that are read, or change nothing."""

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GPT2_BLOCK = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GPT2_TOP = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_ROPE_FACTORS = "rope_freqs.weight"


@dataclasses.dataclass(frozen=True)
class GGUFFormat:
    """A `Format` that is one file with everything in it."""

    name: str = "gguf"
    holds: str = "Llama, Qwen2, Gemma and GPT-2 in a file of llama.cpp"
    is_file: bool = True

    def owns(self, task: Any) -> bool:
        """Nothing is written in this format."""
        return False

    def recognises(self, path: Path) -> bool:
        """Whether a file begins as GGUF files do."""
        path = Path(path)
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"

    def read(self, path: Path, like: Any = None, *, tokenizer: str = "") -> Model:
        """Returns the model in a file, dequantised.

        Args:
          path: the file.
          like: a task of the same kind, whose other settings are taken.
          tokenizer: the tokenizer to take instead of the file's, as `jaxtok.tokenizers.load_tokenizer` takes it.

        Raises:
          ValueError: the file is damaged, or its architecture, a setting of it, the type of a tensor or the tokenizer
            is not known here; the message names it.
        """
        path = Path(path)
        file = read_file(path)
        options = options_of(path, file)
        texts = texts_of(TextData(tokenizer=tokenizer)) if tokenizer else _texts(path, file.metadata)
        tensors = _Tensors(path, file)
        config = huggingface.config_from(options, tensors)
        params = huggingface.decoder_params(config, tensors)
        task, data = huggingface.task_and_data(config, texts, options)
        if like is not None:
            if type(like) is not type(task):
                raise ValueError(f"{path} holds a {type(task).__name__}; the config must be that of one too.")
            task = dataclasses.replace(like, model=task.model)
        return Model(task=task, params=params, data=told(data, texts), path=path, **texts.facts())

    def write(self, path: Path, model: Model) -> Path:
        """Refuses.

        Raises:
          ValueError: always.
        """
        raise ValueError(f"{path} is a GGUF file, which can only be read; give the name of a folder.")


GGUF = GGUFFormat()


@dataclasses.dataclass(frozen=True)
class File:
    """What is in a file; its tensors are not read before they are used."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Any]
    """The library's `ReaderTensor` by name."""


def read_file(path: Path) -> File:
    """Returns what is in a file.

    Raises:
      ValueError: it is damaged, a part of several files, or of the other byte order.
    """
    import gguf  # not needed for other formats

    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or not a GGUF file ({error}); fetch it again.") from error
    if (parts := metadata.get("split.count", 1)) > 1:
        raise ValueError(f"{path} is one of {parts} files; join them with llama.cpp's gguf-split --merge.")
    if reader.byte_order != "I":
        raise ValueError(f"{path} has the other byte order; convert it with the command gguf-convert-endian.")
    return File(metadata, {tensor.name: tensor for tensor in reader.tensors})


class _Tensors(Mapping[str, np.ndarray]):
    """The tensors by the names of Hugging Face and laid out as there; each is dequantised when it is used."""

    def __init__(self, path: Path, file: File):
        self._path = path
        self._kind = file.metadata["general.architecture"]
        self._heads = {name: _of(file, f"attention.{name}") for name in ("head_count", "head_count_kv")}
        self._heads["head_count_kv"] = self._heads["head_count_kv"] or self._heads["head_count"]
        self._found = {_name(self._kind, name): tensor for name, tensor in file.tensors.items()}
        self._found.pop(_ROPE_FACTORS, None)  # it is in the options

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._found[name]
        array = _dequantised(self._path, tensor)
        if self._kind == "llama" and (match := re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", tensor.name)):
            heads = self._heads["head_count" if match[1] == "q" else "head_count_kv"]
            return _half_split(array, heads)
        if self._kind == "gemma" and tensor.name.endswith("norm.weight"):
            return array - 1
        if self._kind == "gpt2" and tensor.name.startswith("blk.") and array.ndim == 2:
            return array.T
        return array

    def __contains__(self, name: object) -> bool:
        return name in self._found  # without dequantising it

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _name(kind: str, name: str) -> str:
    """Returns the name of a tensor in a Hugging Face folder; one that is not known keeps its own."""
    top, blocks, layers = (
        (_GPT2_TOP, _GPT2_BLOCK, "transformer.h") if kind == "gpt2" else (_TOP, _BLOCK, "model.layers")
    )
    if (match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)) and match[2] in blocks:
        return f"{layers}.{match[1]}.{blocks[match[2]]}.{match[3]}"
    stem, _, leaf = name.rpartition(".")
    return f"{top[stem]}.{leaf}" if stem in top else name


def _dequantised(path: Path, tensor: Any) -> np.ndarray:
    import gguf

    try:
        return gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ValueError(f"{path} has {tensor.name} in the type {tensor.tensor_type.name}: {error}.") from error


def _half_split(array: np.ndarray, heads: int) -> np.ndarray:
    """Returns rows of queries or keys in the order of the half-split rotary layout, from that of neighbouring pairs."""
    pairs = array.reshape(heads, len(array) // heads // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _of(file: File, name: str) -> Any:
    """Returns a setting of the file's architecture, or None."""
    return file.metadata.get(f"{file.metadata['general.architecture']}.{name}")


def options_of(path: Path, file: File) -> dict[str, Any]:
    """Returns the content of the config.json of the Hugging Face folder that a file was made from.

    Raises:
      ValueError: the architecture or a setting of it is not known here.
    """
    kind = file.metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(f"{path} has the architecture {kind!r}; it must be one of {', '.join(ARCHITECTURES)}.")
    settings = {name.removeprefix(f"{kind}."): x for name, x in file.metadata.items() if name.startswith(f"{kind}.")}
    for name, value in settings.items():
        if not _KNOWN.fullmatch(name) or isinstance(value, list):
            raise ValueError(f"{path} has {kind}.{name} = {value}, which the models here do not have.")
    if experts := settings.get("expert_count"):
        raise ValueError(f"{path} has {kind}.expert_count = {experts}; models of experts are not known here.")

    def need(name: str) -> Any:
        if name not in settings:
            raise ValueError(f"{path} lacks {kind}.{name}; fetch it again.")
        return settings[name]

    matrices = [tensor for tensor in file.tensors.values() if len(tensor.shape) > 1]
    is_bfloat16 = all(tensor.tensor_type.name == "BF16" for tensor in matrices)
    layers, width, heads = need("block_count"), need("embedding_length"), need("attention.head_count")
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{path} lacks the tensor token_embd.weight; fetch it again.")
    common = {
        "model_type": kind,
        "vocab_size": int(file.tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "bfloat16" if is_bfloat16 else "float32",
    }
    if kind == "gpt2":
        return common | {
            "n_layer": layers,
            "n_embd": width,
            "n_head": heads,
            "n_inner": need("feed_forward_length"),
            "n_positions": need("context_length"),
            "layer_norm_epsilon": need("attention.layer_norm_epsilon"),
        }
    head_size = settings.get("attention.key_length", width // heads)
    for name in ("rope.dimension_count", "attention.value_length"):
        if settings.get(name, head_size) != head_size:
            raise ValueError(f"{path} has {kind}.{name} = {settings[name]}; it must be the head's size, {head_size}.")
    return common | {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": settings.get("attention.head_count_kv", heads),
        "head_dim": head_size,
        "intermediate_size": need("feed_forward_length"),
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
        "rope_theta": settings.get("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(path, file, settings, head_size),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }


def _rope_scaling(path: Path, file: File, settings: Mapping[str, Any], head_size: int) -> dict[str, Any] | None:
    length = settings["context_length"]
    kind, factor = settings.get("rope.scaling.type"), settings.get("rope.scaling.factor", 1.0)
    original = settings.get("rope.scaling.original_context_length", length)
    if kind is None and settings.get("rope.scale_linear", 1.0) != 1.0:
        kind, factor = "linear", settings["rope.scale_linear"]
    if (factors := file.tensors.get(_ROPE_FACTORS)) is not None:
        if kind not in (None, "none"):
            raise ValueError(f"{path} has rope scaling of the type {kind!r} and {_ROPE_FACTORS}; it must have one.")
        divisors = _dequantised(path, factors)
        return _factors(divisors, settings.get("rope.freq_base", 10000.0), head_size, length)
    if kind in (None, "none") or (kind == "linear" and factor == 1.0):
        return None
    if kind not in ("linear", "yarn") or settings.get("rope.scaling.attn_factor", 1.0) != 1.0:
        what = f"type {kind!r}" if kind not in ("linear", "yarn") else "attn_factor"
        raise ValueError(f"{path} has rope scaling with {what}, which is not known here; it must be linear or yarn.")
    scaling = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}
    betas = {name: settings.get(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
    return scaling | {name: beta for name, beta in betas.items() if beta is not None}


def _factors(divisors: np.ndarray, base: float, head_size: int, length: int) -> dict[str, Any] | None:
    """Returns the scaling that divides each frequency by a number: Llama 3's where it is that, as files do not say."""
    if (divisors == 1).all():
        return None
    plain = rotary_frequencies(head_size, base)[0]
    scaling = RopeScaling(kind="llama3", factor=float(divisors.max()), original_length=8192)
    if len(divisors) == len(plain):
        theirs = rotary_frequencies(head_size, base, scaling)[0]
        if np.allclose(plain / divisors, theirs, rtol=1e-5, atol=0):
            return huggingface.rope_to_json(scaling)
    listed = divisors.tolist()
    return {
        "rope_type": "longrope",
        "short_factor": listed,
        "long_factor": listed,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": length,
    }


# Tokenizers.

_GPT2_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(digits: str) -> list[dict[str, Any]]:
    """Cuts as Llama 3 and Qwen2 do, which differ in how many digits stay together."""
    regex = {"Regex": f"{_CONTRACTIONS}|{digits}|{_REST}"}
    split = {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
    return [split, _GPT2_SPLIT | {"use_regex": False}]


_STEPS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_GPT2_SPLIT],
    "smollm": [{"type": "Digits", "individual_digits": True}, _GPT2_SPLIT],
    "llama-bpe": _split(r"\p{N}{1,3}"),
    "qwen2": _split(r"\p{N}"),
}
"""How text is cut before a byte-level BPE merges within each part, by the names of pre-tokenizers."""
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
"""The types of tokens, which are those of SentencePiece."""


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """The facts about a tokenizer in a file's metadata."""

    kind: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    pre: str
    ids: dict[str, int]
    """The ids of roles: bos, eos, eot, eom, unknown, padding."""
    add_bos: bool
    prefix: bool
    """Whether a space is written before a text."""
    template: str


def _vocabulary(path: Path, metadata: Mapping[str, Any]) -> _Vocabulary:
    def get(name: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{name}", default)

    kind, tokens, pre = get("model"), get("tokens"), get("pre")
    if kind not in ("gpt2", "llama") or not tokens:
        raise ValueError(
            f"{path} has a tokenizer of the kind {kind!r}; it must be gpt2 or llama (or convert it with --tokenizer)."
        )
    if kind == "gpt2" and pre not in _STEPS:
        raise ValueError(f"{path} has the pre-tokenizer {pre!r}; it must be one of {', '.join(_STEPS)}.")
    roles = ("bos", "eos", "eot", "eom", "unknown", "padding")
    ids = {role: i for role in roles if (i := get(f"{role}_token_id")) is not None}
    if wrong := next((role for role, i in ids.items() if not 0 <= i < len(tokens)), None):
        raise ValueError(f"{path} has {wrong}_token_id = {ids[wrong]}; ids are 0 to {len(tokens) - 1}.")
    if "eos" not in ids:
        raise ValueError(f"{path} does not say what ends a text (tokenizer.ggml.eos_token_id); fetch another file.")
    adds = get("add_bos_token", kind == "llama" or pre == "llama-bpe")
    return _Vocabulary(
        kind=kind,
        tokens=tokens,
        types=get("token_type", [_NORMAL] * len(tokens)),
        scores=get("scores", [0.0] * len(tokens)),
        merges=get("merges", []),
        pre=pre,
        ids=ids,
        add_bos=adds and "bos" in ids,
        prefix=get("add_space_prefix", kind == "llama"),
        template=metadata.get("tokenizer.chat_template", ""),
    )


def _texts(path: Path, metadata: Mapping[str, Any]) -> Texts:
    vocabulary = _vocabulary(path, metadata)
    spec = _written(vocabulary)
    ids = vocabulary.ids
    ends = [ids[role] for role in ("eos", "eot", "eom") if role in ids]
    ends += [i for i, name in enumerate(vocabulary.tokens) if name in TURN_ENDS and vocabulary.types[i] == _CONTROL]
    return Texts(
        str(spec),
        load_tokenizer(spec, ends[0]),
        begin=(ids["bos"],) if vocabulary.add_bos else (),
        ends=tuple(dict.fromkeys(ends)),
        pad=ids.get("padding"),
    )


def _written(vocabulary: _Vocabulary) -> Path:
    """Writes the tokenizer's files into the cache, unless they are there; returns the tokenizer's."""
    if vocabulary.kind == "gpt2":
        name, content = "tokenizer.json", json.dumps(_byte_level(vocabulary), ensure_ascii=False).encode()
    else:
        name, content = "tokenizer.model", _sentencepiece(vocabulary)
    roles = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    named = {f"{roles[role]}_token": vocabulary.tokens[i] for role, i in vocabulary.ids.items() if role in roles}
    settings = named | {
        "tokenizer_class": "PreTrainedTokenizerFast" if vocabulary.kind == "gpt2" else "LlamaTokenizer",
        "add_bos_token": vocabulary.add_bos,
        "add_prefix_space": vocabulary.prefix,
    }
    if vocabulary.template:
        settings["chat_template"] = vocabulary.template
    files = {name: content, "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode()}
    digest = hashlib.sha256(b"".join(files.values())).hexdigest()[:16]
    folder = cache_folder("gguf") / digest
    with whole(folder) as half_done:
        if half_done is not None:
            for file, data in files.items():
                (half_done / file).write_bytes(data)
    return folder / name


def _byte_level(vocabulary: _Vocabulary) -> dict[str, Any]:
    """Returns the content of a tokenizer.json."""
    types, tokens = vocabulary.types, vocabulary.tokens
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": name, **plain, "special": types[i] == _CONTROL}
        for i, name in enumerate(tokens)
        if types[i] in (_CONTROL, _USER)
    ]
    after: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    if vocabulary.add_bos:
        bos = tokens[vocabulary.ids["bos"]]
        one, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        special = {bos: {"id": bos, "ids": [vocabulary.ids["bos"]], "tokens": [bos]}}
        pair = [one, text, one, {"Sequence": {"id": "B", "type_id": 0}}]
        after = {"type": "TemplateProcessing", "single": [one, text], "pair": pair, "special_tokens": special}
    steps = _STEPS[vocabulary.pre]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if vocabulary.pre == "qwen2" else None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        "post_processor": after,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": vocabulary.pre == "llama-bpe",
            "vocab": {name: i for i, name in enumerate(tokens) if types[i] != _UNUSED},
            "merges": [merge.split(" ", 1) for merge in vocabulary.merges],
        },
    }


def _sentencepiece(vocabulary: _Vocabulary) -> bytes:
    """Returns the content of a tokenizer.model."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model, ids, types = ModelProto(), vocabulary.ids, list(vocabulary.types)
    if _UNKNOWN not in types:  # SentencePiece needs one
        types[ids.get("unknown", 0)] = _UNKNOWN
    known = set(vocabulary.tokens)
    for name, kind, score in zip(vocabulary.tokens, types, vocabulary.scores):
        marked = name.replace(" ", "▁")  # some files have plain spaces in tokens that users defined
        piece = name if marked in known else marked
        model.pieces.add(piece=piece, type=kind, score=score if math.isfinite(score) else 0.0)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(types)
    trainer.byte_fallback = types.count(_BYTE) == 256
    for role, field in {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}.items():
        if role in ids:
            setattr(trainer, f"{field}_id", ids[role])
            setattr(trainer, f"{field}_piece", vocabulary.tokens[ids[role]])
        else:
            setattr(trainer, f"{field}_id", -1)
    trainer.unk_id = types.index(_UNKNOWN)
    trainer.unk_piece = vocabulary.tokens[trainer.unk_id]
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = vocabulary.prefix
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return model.SerializeToString()
