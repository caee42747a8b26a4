"""BERT, RoBERTa and XLM-R in Hugging Face's layout; `jaxtok.interop.electra` has ELECTRA's format, with these names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers

from jaxtok.data.encoders import EncoderData
from jaxtok.interop.folders import FolderFormat, Options, hub_names, read_hub_params, stored_dtype
from jaxtok.interop.tensors import Place, Shapes, Source, shapes_of, write_params
from jaxtok.interop.texts import Texts
from jaxtok.lm.bert import BertConfig, init_params
from jaxtok.lm.electra import ElectraConfig
from jaxtok.lm.masked_words import MaskedWords, Masking
from jaxtok.lm.text_classification import TextClassification
from jaxtok.lm.whole_words import SubwordWords
from jaxtok.model import Model
from jaxtok.protocols import Params

KINDS = ("bert", "roberta", "xlm-roberta", "electra")

ACTIVATIONS = {  # theirs -> ours
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}


def activation_from(name: str) -> str:
    """Returns our name of an activation.

    Raises:
      ValueError: there is no such activation here.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"the activation is {name!r}; it must be one of {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def activation_to(name: str) -> str:
    """Returns their name of an activation."""
    return {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[name]


def sources(config: BertConfig) -> dict[Place, Source]:
    """Returns our parameter paths to their tensors."""
    electra, block = isinstance(config, ElectraConfig), ("stack", "blocks")
    base = "electra" if electra else "roberta" if config.positions_from_ids else "bert"
    found = {
        ("embedding",): Source(f"{base}.embeddings.word_embeddings.weight"),
        ("position_embedding",): Source(f"{base}.embeddings.position_embeddings.weight"),
        ("type_embedding",): Source(f"{base}.embeddings.token_type_embeddings.weight"),
    }
    h = f"{base}.encoder.layer.{{layer}}."
    linears = {(*block, "attention", g): f"{h}attention.self.{g}" for g in ("query", "key", "value")}
    linears[*block, "attention", "output"] = f"{h}attention.output.dense"
    linears[*block, "ffn", "up"] = f"{h}intermediate.dense"
    linears[*block, "ffn", "down"] = f"{h}output.dense"
    norms = {("embedding_norm",): f"{base}.embeddings.LayerNorm"}
    norms[*block, "norm_attention"] = f"{h}attention.output.LayerNorm"
    norms[*block, "norm_ffn"] = f"{h}output.LayerNorm"
    if config.embedding_width != config.d_model:
        linears[("embedding_project",)] = f"{base}.embeddings_project"
    if electra and config.replaced_head:
        linears[("replaced_dense",)] = "discriminator_predictions.dense"
        linears[("replaced_output",)] = "discriminator_predictions.dense_prediction"
    if electra and config.mask_head:
        linears[("head_dense",)] = "generator_predictions.dense"
        norms[("head_norm",)] = "generator_predictions.LayerNorm"
        found[("head_bias",)] = Source("generator_lm_head.bias")
    elif config.mask_head:
        head = "lm_head" if config.positions_from_ids else "cls.predictions.transform"
        linears[("head_dense",)] = f"{head}.dense"
        norms[("head_norm",)] = f"{head}.{'layer_norm' if config.positions_from_ids else 'LayerNorm'}"
        found[("head_bias",)] = Source("lm_head.bias" if config.positions_from_ids else "cls.predictions.bias")
    if config.pooler:
        linears[("pooler",)] = f"{base}.pooler.dense"
    if config.next_sentence:
        linears[("next_sentence_head",)] = "cls.seq_relationship"
    if config.num_classes:
        linears |= {("classifier_dense",): "classifier.dense", ("classifier",): "classifier.out_proj"}
    for path, theirs in linears.items():
        found[*path, "kernel"] = Source(f"{theirs}.weight", transpose=True)
        found[*path, "bias"] = Source(f"{theirs}.bias")
    for path, theirs in norms.items():
        found[*path, "scale"], found[*path, "bias"] = Source(f"{theirs}.weight"), Source(f"{theirs}.bias")
    return found


def read_encoder_config(options: Mapping[str, Any], tensors: Mapping[str, Any]) -> BertConfig:
    """Returns our config from a config.json, with the heads for which there are tensors.

    Raises:
      ValueError: it has an option that the models here do not have.
    """
    if (kind := options.get("position_embedding_type") or "absolute") != "absolute":
        raise ValueError(f"position_embedding_type is {kind!r}; it must be absolute.")
    electra = options["model_type"] == "electra"
    roberta = options["model_type"] not in ("bert", "electra")

    def get(name: str, default: Any) -> Any:
        value = options.get(name)
        return default if value is None else value

    def there(name: str) -> bool:
        return any(key.endswith(name) for key in tensors)

    classes = tensors["classifier.out_proj.weight"].shape[0] if there("classifier.out_proj.weight") else 0
    common = dict(
        num_layers=get("num_hidden_layers", 12),
        d_model=get("hidden_size", 256 if electra else 768),
        num_heads=get("num_attention_heads", 4 if electra else 12),
        mlp_dim=get("intermediate_size", 1024 if electra else 3072),
        activation=activation_from(get("hidden_act", "gelu")),
        vocab_size=get("vocab_size", 50265 if options["model_type"] == "roberta" else 30522),
        max_positions=get("max_position_embeddings", 512),
        type_vocab_size=get("type_vocab_size", 2),
        pad_id=get("pad_token_id", 1 if roberta else 0),
        norm_eps=float(get("layer_norm_eps", 1e-12)),
        init_std=float(get("initializer_range", 0.02)),
        num_classes=classes,
        param_dtype=stored_dtype(options),
    )
    if electra:
        return ElectraConfig(
            embedding_size=get("embedding_size", 128),
            mask_head=there("generator_predictions.dense.weight"),
            replaced_head=there("discriminator_predictions.dense.weight"),
            head_activation="" if common["activation"] == "gelu" else "gelu",
            **common,
        )
    return BertConfig(
        positions_from_ids=roberta,
        mask_head=there("lm_head.dense.weight") or there("cls.predictions.transform.dense.weight"),
        pooler=there("pooler.dense.weight"),
        next_sentence=there("cls.seq_relationship.weight"),
        **common,
    )


def config_from(options: Options, tensors: Mapping[str, np.ndarray]) -> BertConfig:
    """Calls `read_encoder_config`, and checks the head.

    Raises:
      ValueError: as there; or the head for masked words is not the embedding.
    """
    config = read_encoder_config(options, tensors)
    if config.mask_head:
        (table,) = [s.name for place, s in sources(config).items() if place == ("embedding",)]
        embedding = next((name for name in hub_names(table) if name in tensors), None)
        for head in ("lm_head.decoder.weight", "cls.predictions.decoder.weight", "generator_lm_head.weight"):
            if head in tensors and embedding and not np.array_equal(tensors[head], tensors[embedding]):
                raise ValueError(f"{head} is not the embedding; an encoder's head must be its embedding.")
    return config


def config_json(config: BertConfig) -> dict[str, Any]:
    """Returns the content of a config.json.

    Raises:
      ValueError: Hugging Face has no such model.
    """
    electra = isinstance(config, ElectraConfig)
    kind = "electra" if electra else "roberta" if config.positions_from_ids else "bert"
    head_of_gelu = not electra or (config.head_activation or config.activation) == "gelu"
    if not head_of_gelu and (config.mask_head or config.num_classes):
        head = config.head_activation or config.activation
        raise ValueError(f"head_activation is {head!r}; it must be gelu, as in Hugging Face's ELECTRA.")
    if not electra and config.embedding_width != config.d_model:
        raise ValueError(
            f"embedding_size is {config.embedding_size}; of Hugging Face's encoders, only ELECTRA can have one."
        )
    head = "ForMaskedLM" if config.mask_head else "ForSequenceClassification" if config.num_classes else "Model"
    head = "ForPreTraining" if config.next_sentence or (electra and config.replaced_head) else head
    options = {
        "architectures": [kind.capitalize() + head],
        "model_type": kind,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.d_model,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "hidden_act": activation_to(config.activation),
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.type_vocab_size,
        "pad_token_id": config.pad_id,
        "layer_norm_eps": config.norm_eps,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": True,
        "initializer_range": config.init_std,
        "torch_dtype": config.param_dtype,
    }
    options |= {"num_labels": config.num_classes} if config.num_classes else {}
    return options | ({"embedding_size": config.embedding_width} if electra else {})


def shapes(config: BertConfig) -> Shapes:
    """Returns parameter paths to shapes."""
    return shapes_of(lambda: init_params(config, jax.random.key(0)))


def params_from(config: BertConfig, tensors: Mapping[str, np.ndarray]) -> Params:
    """Returns our parameter tree from their tensors; raises as `read_params`."""
    tied = config.mask_head
    return read_hub_params(sources(config), shapes(config), tensors, dtype=config.param_dtype, tied=tied)


def params_to(config: BertConfig, params: Params) -> dict[str, np.ndarray]:
    """Returns their tensors by name from our parameter tree."""
    return write_params(sources(config), params)


_SYMBOLS = {"cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "</s>"), "mask": ("[MASK]", "<mask>")}


def task_and_data(config: BertConfig, texts: Texts, options: Options) -> tuple[Any, EncoderData]:
    """Returns an encoder's task, by its heads, and rows of text for it.

    Raises:
      ValueError: it has no head to train, or its tokenizer has no symbols for [CLS], [SEP] and the mask.
    """
    own, ids = options.get("jaxtok") or {}, {}
    for role, names in _SYMBOLS.items():
        ids[role] = own.get(f"{role}_id")
        if ids[role] is None and Path(texts.spec).suffix == ".json":
            vocabulary = tokenizers.Tokenizer.from_file(texts.spec).get_vocab(with_added_tokens=True)
            ids[role] = next((vocabulary[name] for name in names if name in vocabulary), None)
        if ids[role] is None and not (role == "mask" and config.num_classes):
            raise ValueError(f"the tokenizer {texts.spec} has neither {' nor '.join(names)}; give the encoder's own.")
    data = EncoderData(
        tokenizer=texts.spec,
        length=min(128, config.max_length),
        batch_size=8,
        cls_id=ids["cls"],
        sep_id=ids["sep"],
        pad_id=config.pad_id,
    )
    if config.num_classes:
        return TextClassification(model=config), data
    if not config.mask_head:
        raise ValueError(
            "this encoder has neither a head for masked words nor one for classes, so there is no task for it; "
            "jaxtok.interop.huggingface.read_folder reads it without one."
        )
    return MaskedWords(model=config, masking=Masking(mask_id=ids["mask"], kept_ids=(ids["cls"], ids["sep"]))), data


def facts(model: Model) -> dict[str, int]:
    """Returns the symbols of a model's rows, as far as its data and task tell them."""
    found = {}
    if isinstance(model.data, EncoderData):
        found |= {"cls_id": model.data.cls_id, "sep_id": model.data.sep_id}
    if isinstance(model.task, SubwordWords):  # the last rows of the embedding
        size = model.task.model.vocab_size
        found |= {"mask_id": size - 4, "cls_id": size - 3, "sep_id": size - 2}
    elif isinstance(model.task, MaskedWords):
        found |= {"mask_id": model.task.masking.mask_id}
    return found


def owns(task: Any) -> bool:
    """Whether the task's whole model is one of these encoders."""
    kinds = (MaskedWords, TextClassification, SubwordWords)
    return type(task) in kinds and isinstance(task.model, BertConfig) and not isinstance(task.model, ElectraConfig)


ENCODERS = FolderFormat(
    name="bert",
    holds="BERT, RoBERTa and XLM-R",
    owns=owns,
    has=lambda options: options.get("model_type") in ("bert", "roberta", "xlm-roberta"),
    config_from=config_from,
    options_of=config_json,
    params_from=params_from,
    params_to=params_to,
    task_and_data=task_and_data,
    facts=facts,
)
