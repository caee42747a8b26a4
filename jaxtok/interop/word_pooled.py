"""Checkpoints of Learn Your Tokens in the authors' names (avi-jit/eTok): a folder of config.json and safetensors.

Their matrices are [out, in], and the encoder's queries, keys and values are packed into one. Reading a folder takes
the authors' hyper-parameters from its config.json: num_prefix (0: the plain model), n_embd, n_head, n_layer,
n_e2e_head, n_e2e_layer, block_size, canvas_size, vocab_size. Their Lightning checkpoints are pickles: save
`model.state_dict()` with safetensors first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from jaxtok.interop.tensors import read_tensors
from jaxtok.lm.word_pooled import PlainConfig, WordPooledConfig, init_params

Config = WordPooledConfig | PlainConfig

_BLOCK = {  # of ours -> of theirs; matrices are transposed
    ("norm_attention",): "ln1",
    ("norm_ffn",): "ln2",
    ("attention", "query"): "attn.query",
    ("attention", "key"): "attn.key",
    ("attention", "value"): "attn.value",
    ("attention", "output"): "attn.proj",
    ("ffn", "up"): "mlp.0",
    ("ffn", "down"): "mlp.2",
}
_ENCODER_LAYER = {
    ("norm_attention",): "norm1",
    ("norm_ffn",): "norm2",
    ("attention", "output"): "self_attn.out_proj",
    ("ffn", "up"): "linear1",
    ("ffn", "down"): "linear2",
}
_PACKED = ("query", "key", "value")


def config_from(official: Mapping[str, Any], **overrides: Any) -> Config:
    """Our config from the authors' hyper-parameters, with the three switches as their code has them.

    Raises:
      ValueError: one is missing.
    """
    plain = not official.get("num_prefix", 4)
    names = ["n_embd", "n_head", "n_layer", "block_size", "vocab_size"]
    names += [] if plain else ["n_e2e_head", "n_e2e_layer", "canvas_size"]
    if missing := [name for name in names if name not in official]:
        raise ValueError(f"the config has no {missing[0]}; add it.")
    get = official.__getitem__
    shared = {
        "vocab_size": get("vocab_size"),
        "d_model": get("n_embd"),
        "num_layers": get("n_layer"),
        "num_heads": get("n_head"),
    }
    if plain:
        return PlainConfig(**shared | {"max_length": get("block_size"), "mlp_dim": 4 * get("n_embd")} | overrides)
    own = {
        "prefixes": official.get("num_prefix", 4),
        "encoder_heads": get("n_e2e_head"),
        "unit_layers": get("n_e2e_layer"),
        "max_words": get("block_size"),
        "max_units": get("canvas_size"),
        "prefix_ids": "official",
        "mask_pads": False,
        "loss_on_pads": True,
    }
    return WordPooledConfig(**shared | own | _switches(official) | overrides)


def config_to(config: Config) -> dict[str, Any]:
    """The authors' hyper-parameters. What their code does otherwise is added under names that begin with `jaxtok_`.

    Raises:
      ValueError: the plain model has positions or another MLP.
    """
    shared = {
        "n_embd": config.d_model,
        "n_head": config.num_heads,
        "n_layer": config.num_layers,
        "vocab_size": config.vocab_size,
    }
    if isinstance(config, PlainConfig):
        if config.learned_positions or config.rotary_fraction or config.tie_embeddings:
            raise ValueError(
                "the authors' plain model has no positions and an untied head; this one cannot be written."
            )
        return {"num_prefix": 0, "block_size": config.max_length} | shared
    if config.encoder_mlp_dim != 2048:
        raise ValueError(f"encoder_mlp_dim is {config.encoder_mlp_dim}; the authors' code has 2048 only.")
    return shared | {
        "num_prefix": config.prefixes,
        "n_e2e_head": config.encoder_heads,
        "n_e2e_layer": config.unit_layers,
        "block_size": config.max_words,
        "canvas_size": config.max_units,
        "jaxtok_prefix_ids": config.prefix_ids,
        "jaxtok_mask_pads": config.mask_pads,
        "jaxtok_loss_on_pads": config.loss_on_pads,
    }


def _switches(official: Mapping[str, Any]) -> dict[str, Any]:
    names = ("prefix_ids", "mask_pads", "loss_on_pads")
    return {name: official[f"jaxtok_{name}"] for name in names if f"jaxtok_{name}" in official}


def params_to(config: Config, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The authors' tensors by name, from our parameters (or their gradient)."""
    tensors: dict[str, np.ndarray] = {}

    def put(theirs: str, leaves: Mapping[str, Any], layer: int | None = None) -> None:
        for name, leaf in leaves.items():
            array = np.asarray(leaf if layer is None else leaf[layer])
            suffix = "bias" if name == "bias" else "weight"
            tensors[f"{theirs}.{suffix}"] = np.ascontiguousarray(array.T if name == "kernel" else array)

    def stack(theirs: str, blocks: Mapping[str, Any], places: Mapping[tuple[str, ...], str], layers: int) -> None:
        for layer in range(layers):
            for place, name in places.items():
                put(f"{theirs}.{layer}.{name}", _at(blocks, place), layer)

    stack("blocks", params["stack"]["blocks"], _BLOCK, config.num_layers)
    put("ln_f", params["final_norm"])
    tensors["head.weight"] = np.asarray(params["head_matrix"])
    if isinstance(config, PlainConfig):
        tensors["in_emb.weight"] = np.asarray(params["embedding"])
        unused = (1, config.max_length, config.d_model)
        return tensors | {"in_pe": np.zeros(unused, tensors["head.weight"].dtype)}
    tensors["in_emb.weight"] = np.concatenate([params["embedding"], params["prefix_embedding"]])
    tensors["in_pe"] = np.asarray(params["unit_positions"])[None]
    tensors["word_pe"] = np.asarray(params["word_positions"])[None]
    stack("decoder_blocks", params["speller"]["blocks"], _BLOCK, config.unit_layers)
    blocks = params["encoder"]["blocks"]
    stack("wordenc.layers", blocks, _ENCODER_LAYER, config.unit_layers)
    for layer in range(config.unit_layers):
        parts = [blocks["attention"][group] for group in _PACKED]
        name = f"wordenc.layers.{layer}.self_attn.in_proj"
        packed = np.concatenate([np.asarray(part["kernel"][layer]).T for part in parts])
        tensors[f"{name}_weight"] = np.ascontiguousarray(packed)  # as safetensors takes them for granted
        tensors[f"{name}_bias"] = np.concatenate([np.asarray(part["bias"][layer]) for part in parts])
    return tensors


def params_from(config: Config, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Our parameters from the authors' tensors by name; their masks are passed over.

    Raises:
      ValueError: tensors are missing, unknown or of another shape; the message names them.
    """
    ours = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    expected = params_to(config, jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), ours))
    given = [name for name in tensors if not name.endswith("attn.mask")]
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is unknown" for name in given if name not in expected]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)} instead of {array.shape}"
        for name, array in expected.items()
        if name in tensors and tuple(tensors[name].shape) != array.shape
    ]
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise ValueError(f"the checkpoint does not fit its config: {'; '.join(problems[:8])}{more}.")

    def read(name: str) -> np.ndarray:
        return np.asarray(tensors[name]).astype(config.param_dtype, copy=False)

    def leaves(theirs: str, like: Mapping[str, Any]) -> dict[str, np.ndarray]:
        arrays = {name: read(f"{theirs}.{'bias' if name == 'bias' else 'weight'}") for name in like}
        return {name: array.T if name == "kernel" else array for name, array in arrays.items()}

    def stack(theirs: str, like: Mapping[str, Any], places: Mapping[tuple[str, ...], str], layers: int) -> dict:
        tree: dict[str, Any] = {}
        for place, name in places.items():
            rows = [leaves(f"{theirs}.{layer}.{name}", _at(like, place)) for layer in range(layers)]
            node = tree
            for key in place[:-1]:
                node = node.setdefault(key, {})
            node[place[-1]] = jax.tree.map(lambda *parts: np.stack(parts), *rows)
        return {"blocks": tree}

    tree = {
        "stack": stack("blocks", ours["stack"]["blocks"], _BLOCK, config.num_layers),
        "final_norm": leaves("ln_f", ours["final_norm"]),
        "head_matrix": read("head.weight"),
    }
    if isinstance(config, PlainConfig):
        return tree | {"embedding": read("in_emb.weight")}
    units = read("in_emb.weight")
    tree |= {
        "embedding": units[: config.vocab_size],
        "prefix_embedding": units[config.vocab_size :],
        "unit_positions": read("in_pe")[0],
        "word_positions": read("word_pe")[0],
        "speller": stack("decoder_blocks", ours["speller"]["blocks"], _BLOCK, config.unit_layers),
        "encoder": stack("wordenc.layers", ours["encoder"]["blocks"], _ENCODER_LAYER, config.unit_layers),
    }
    packed = [f"wordenc.layers.{layer}.self_attn.in_proj" for layer in range(config.unit_layers)]
    kernels = np.split(np.stack([read(f"{name}_weight") for name in packed]), 3, axis=1)
    biases = np.split(np.stack([read(f"{name}_bias") for name in packed]), 3, axis=1)
    for group, kernel, bias in zip(_PACKED, kernels, biases):
        tree["encoder"]["blocks"]["attention"][group] = {"kernel": kernel.swapaxes(1, 2), "bias": bias}
    return tree


def _at(tree: Any, place: tuple[str, ...]) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def read_folder(folder: str | Path, **overrides: Any) -> tuple[Config, dict[str, Any]]:
    """Config and parameters from a folder.

    Raises:
      FileNotFoundError: the folder, its config.json or its weights are missing.
      ValueError: config and tensors do not fit each other.
    """
    options = Path(folder) / "config.json"
    if not options.is_file():
        raise FileNotFoundError(f"{options} does not exist; give a folder with config.json and the weights.")
    config = config_from(json.loads(options.read_text()), **overrides)
    return config, params_from(config, read_tensors(Path(folder)))


def write_folder(folder: str | Path, config: Config, params: Mapping[str, Any]) -> Path:
    """Writes config.json and model.safetensors into the folder."""
    folder, options = Path(folder), config_to(config)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(params_to(config, params), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(options, indent=2) + "\n")
    return folder
