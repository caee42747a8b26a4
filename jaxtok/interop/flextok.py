"""FlexTok's released models: config.json and model.safetensors, or a safetensors file with its config inside.

The authors' config says which modules there are, in which order, under which names; it is what Hydra builds objects
from. Here it is read as data: each module must be one that is known, in its place, with options that mean the same
here, and whatever is not is refused by its name. Tensors are `encoder.module_dict.MODULE.PARAMETER`,
`decoder.module_dict...` and, of the VAE, `vae.vae....` (diffusers' layout).

The weights are not free software: they are under Apple's Machine Learning Research Model licence, for research only,
and what is made from them is, too.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import logging
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.interop.files import has_tensors, write_file
from jaxtok.interop.kl_vae import vae_params, vae_tensors
from jaxtok.interop.tensors import Place, Source, read_params, read_tensors, shapes_of, write_params
from jaxtok.model import Model
from jaxtok.nn.flex_blocks import grid_waves
from jaxtok.protocols import FROZEN, Params
from jaxtok.tokenizers.hub_files import read_json
from jaxtok.vision.flextok import FlexTok, FlexTokConfig, FlexTokenizer
from jaxtok.vision.kl_vae import diffusers_vae
from jaxtok.weights import read_weights

LICENCE = (
    "if these are FlexTok's released weights, they are under the Apple Machine Learning Research Model Licence: for "
    "research only, and so is whatever is made from them"
)

Tensors = Mapping[str, np.ndarray]
_VAE = "vae.vae."
_VAE_SIZES = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
_ENCODER, _DECODER = "encoder.module_dict.", "decoder.module_dict."
_POSITIONS = {
    "encoder": f"{_ENCODER}enc_posemb_module.posembs",
    "decoder": f"{_DECODER}dec_patches_posemb_module.posembs",
}


def _linear(ours: Place, theirs: str) -> dict[Place, Source]:
    return {
        (*ours, "kernel"): Source(f"{theirs}.weight", transpose=True),
        (*ours, "bias"): Source(f"{theirs}.bias"),
    }


def _blocks(tower: str, theirs: str, modulated: bool) -> dict[Place, Source]:
    blocks, inside = (tower, "stack", "blocks"), f"{theirs}.blocks.{{layer}}"
    table = {}
    for ours, name in {"query": "wq", "key": "wk", "value": "wv", "output": "proj"}.items():
        table[*blocks, "attention", ours, "kernel"] = Source(f"{inside}.attn.{name}.weight", transpose=True)
    for ours, name in {"gate": "fc1", "down": "fc2", "up": "fc3"}.items():
        table[*blocks, "ffn", ours, "kernel"] = Source(f"{inside}.mlp.{name}.weight", transpose=True)
    return table | (_linear((*blocks, "modulation"), f"{inside}.adaLN_modulation.1") if modulated else {})


def names(config: FlexTokConfig) -> dict[Place, Source]:
    """Returns the table of our parameters."""
    table = _linear(("encoder", "patch"), f"{_ENCODER}enc_patch_emb.patch_proj")
    table["encoder", "registers"] = Source(f"{_ENCODER}enc_register_module.registers")
    table |= _blocks("encoder", f"{_ENCODER}enc_transformer", modulated=False)
    table |= _linear(("encoder", "head", "proj"), f"{_ENCODER}enc_to_latents.proj")
    table |= _linear(("decoder", "codes"), f"{_DECODER}dec_from_latents.proj")
    positions = f"{_DECODER}dec_registers_posemb_module.posembs"
    table["decoder", "register_positions"] = Source(positions, transpose=True, ones=2)
    table["decoder", "mask_token"] = Source(f"{_DECODER}dec_nested_dropout.dropout_mask_token")
    if config.null == "learned":
        table["decoder", "null_token"] = Source(f"{_DECODER}dec_latent_dropout.nullcond")
    table |= _linear(("decoder", "patch"), f"{_DECODER}dec_noise_patch_emb.patch_proj")
    for ours, number in {"in": 0, "out": 2}.items():
        table |= _linear(("decoder", "time", ours), f"{_DECODER}dec_time_embedder.mlp.{number}")
    table |= _blocks("decoder", f"{_DECODER}dec_transformer", modulated=True)
    table |= _linear(("decoder", "head", "proj"), f"{_DECODER}dec_to_patches.proj")
    if config.head_modulation:
        table |= _linear(("decoder", "head", "modulation"), f"{_DECODER}dec_to_patches.adaLN_modulation.1")
    return table


def _fixed_tables(config: FlexTokConfig) -> dict[str, np.ndarray]:
    """Returns the position tables that are tensors there and computed here."""
    size, unscrambled = config.table or config.grid, config.unscrambled
    widths = {"encoder": config.encoder_width, "decoder": config.decoder_width}
    return {
        name: grid_waves(*size, widths[tower], unscrambled).transpose(2, 0, 1)[None]
        for tower, name in _POSITIONS.items()
    }


def params_from(config: FlexTokConfig, tensors: Tensors) -> Params:
    """Returns the parameters of `FlexTok` from tensors in which those of the VAE may be, too.

    Raises:
      ValueError: as `read_params`; or a fixed position table is not the one that is computed here.
    """
    fixed = _fixed_tables(config)
    for name, ours in fixed.items():
        if name not in tensors:
            continue
        theirs = np.asarray(tensors[name], np.float32)
        if theirs.shape != ours.shape:
            raise ValueError(
                f"{name} has shape {theirs.shape} instead of {ours.shape}; set latent_size, patch and table to the "
                "checkpoint's."
            )
        if np.abs(theirs - ours).max() > 1e-4:
            raise ValueError(
                f"{name} is not the table of sines and cosines that is computed here with unscrambled = "
                f"{config.unscrambled}; only these tables are known here."
            )
    latents = jnp.zeros((1, *config.latent_size, config.channels))
    shapes = shapes_of(lambda: FlexTok(config).init(jax.random.key(0), latents, jnp.zeros(1))["params"])

    def ignored(name: str) -> bool:
        return name in fixed or name.startswith("vae.")

    return read_params(names(config), shapes, tensors, dtype=np.float32, ignored=ignored)


def params_to(config: FlexTokConfig, params: Params, tables: bool = True) -> dict[str, np.ndarray]:
    """Returns the inverse, with the fixed position tables if `tables` (a gradient has none)."""
    return write_params(names(config), params) | (_fixed_tables(config) if tables else {})


# The authors' config, which names a class and its options for each module.

_NORM = {"bias": (False,), "elementwise_affine": (False,), "eps": "norm_eps"}
_HEAD = {
    "dim": None,
    "use_mup_readout": (False,),
    "weight_init_style": None,
    "norm_layer": _NORM,
    "dtype_override": None,
    "adaLN_emb_read_key": None,
    "adaLN_packing_fn_read_key": (None,),
    "adaLN_bias": (True,),
    "proj_bias": (True,),
}
_POSITION_OPTIONS = {
    "dim": None,
    "max_sizes": None,
    "posemb_type": None,
    "posemb_scaling": ("absolute",),
    "posemb_write_key": (None,),
}
_PACKER = {
    "mask_mode": None,
    "max_seq_len": None,
    "pad_to_multiple": None,
    "per_subseq_embs": None,
    "compile_block_mask": None,
    "return_materialized_mask": None,
}
_TRANSFORMER = {
    "dim": None,
    "depth": None,
    "head_dim": None,
    "mlp_ratio": None,
    "qkv_bias": (False,),
    "proj_bias": (False,),
    "mlp_bias": (False,),
    "drop": (0, 0.0),
    "drop_path_rate": (0, 0.0),
    "act_layer": ("SiLU",),
    "norm_layer": _NORM,
    "gated_mlp": (True,),
    "qk_norm": (True,),
    "use_act_checkpoint": None,
    "weight_init_style": None,
    "zero_init_query_proj": None,
    "score_mod_read_key": (None,),
    "adaLN_emb_read_key": None,
    "adaLN_packing_fn_read_key": None,
    "adaLN_expansion": (1, 2),
    "rope_forward_read_key": (None,),
    "intermediate_layer_write_key": None,
    "intermediate_layers": None,
}
_CLASSES: dict[str, dict[str, Any]] = {
    "PerSampleOp": {"per_sample_op": None},
    "PatchEmbedder": {
        "patch_sizes": None,
        "channels_in": None,
        "dim": None,
        "flatten_patches": None,
        "weight_init_style": None,
    },
    "PositionalEmbeddingAdder": _POSITION_OPTIONS,
    "Registers1D": {
        "dim": None,
        "n_min": None,
        "n_max": None,
        "n_eval": None,
        "size_sampling_mode": None,
        "ordering_mode": ("nested",),
        "extra_registers_write_key": (None,),
        "extra_registers_dim": (None,),
    },
    "BlockWiseSequencePacker": _PACKER,
    "FlexTransformer": _TRANSFORMER,
    "SequenceUnpacker": {},
    "LinearHead": _HEAD | {"dim_out": None},
    "ToPatchesLinearHead": _HEAD | {"channels_out": None, "patch_sizes": None},
    "LinearLayer": {
        "dim_in": None,
        "dim": None,
        "weight_init_style": None,
        "dtype_override": None,
        "proj_bias": (True,),
    },
    "MaskedNestedDropout": {"dim": None, "size_sampling_mode": ("uniform", "pow2", "uniform_pow2")},
    "LearnedNullCond": {"dim": None, "dropout_prob": None, "replace_with_single_token": (False,)},
    "ZeroNullCond": {"dropout_prob": None},
    "TimestepEmbedder": {
        "dim": None,
        "frequency_embedding_size": None,
        "weight_init_style": None,
        "max_timestep": None,
        "temb_as_tokens": (False,),
    },
    "StableDiffusionVAE": {
        "latent_channels": None,
        "scaling_factor": None,
        "dtype_override": None,
        "hf_hub_path": None,
        "sample_posterior": None,
        "learnable_logvar": (False,),
        "logvar_init": None,
        "compile_encode_fn": None,
        "force_vae_encode": None,
        "frozen": None,
    },
    "FSQ": {
        "levels": None,
        "drop_quant_p": None,
        "corrupt_tokens_p": None,
        "min_corrupt_tokens_p": None,
        "apply_corrupt_tokens_p": None,
        "packed_call": None,
    },
}
"""The classes that are known: their options, each with the values that mean the same here, or None if any value does.
Besides them, each may have options that name entries of the authors' dictionary (`..._key`, `..._keys`)."""

_MODULES = {
    "encoder": {
        "enc_channels_to_last": ("PerSampleOp",),
        "enc_patch_emb": ("PatchEmbedder",),
        "enc_posemb_module": ("PositionalEmbeddingAdder",),
        "enc_register_module": ("Registers1D",),
        "enc_seq_packer": ("BlockWiseSequencePacker",),
        "enc_transformer": ("FlexTransformer",),
        "enc_unpacker": ("SequenceUnpacker",),
        "enc_to_latents": ("LinearHead",),
    },
    "decoder": {
        "dec_from_latents": ("LinearLayer",),
        "dec_registers_posemb_module": ("PositionalEmbeddingAdder",),
        "dec_nested_dropout": ("MaskedNestedDropout",),
        "dec_latent_dropout": ("LearnedNullCond", "ZeroNullCond"),
        "dec_noise_channels_to_last": ("PerSampleOp",),
        "dec_noise_patch_emb": ("PatchEmbedder",),
        "dec_patches_posemb_module": ("PositionalEmbeddingAdder",),
        "dec_seq_packer": ("BlockWiseSequencePacker",),
        "dec_time_embedder": ("TimestepEmbedder",),
        "dec_transformer": ("FlexTransformer",),
        "dec_unpacker": ("SequenceUnpacker",),
        "dec_repa_unpacker": ("SequenceUnpacker",),
        "dec_to_patches": ("ToPatchesLinearHead",),
    },
}
"""The modules that are known, in their order, with the classes that each may be of."""
_MAY_LACK = ("dec_repa_unpacker",)


def _class(entry: Any, where: str) -> str:
    if not isinstance(entry, Mapping) or "_target_" not in entry:
        raise ValueError(f"the config of {where} names no class (_target_); give the released config.json.")
    return str(entry["_target_"]).rpartition(".")[2]


def _checked(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the options of a module, of which each is known."""
    kind = _class(entry, where)
    known = _CLASSES[kind]
    for name, value in entry.items():
        if name.startswith("_") or (name.endswith(("_key", "_keys")) and name not in known):
            continue
        if name not in known:
            raise ValueError(f"the config of {where} has the option {name} = {value!r}, which is not known here.")
        allowed = known[name]
        if isinstance(allowed, Mapping):
            _check_norm(value, where, name)
        elif isinstance(allowed, tuple):
            held = _class(value, f"{where}.{name}") if isinstance(value, Mapping) else value
            held = held.rpartition(".")[2] if isinstance(held, str) and "." in held else held
            if held not in allowed:
                raise ValueError(
                    f"the config of {where} has {name} = {held!r}; only {', '.join(map(repr, allowed))} is known here."
                )
    return dict(entry)


def _check_norm(value: Any, where: str, name: str) -> None:
    if value is None:
        raise ValueError(
            f"the config of {where} has {name} = None; only a layer norm without parameters is known here."
        )
    kind = _class(value, f"{where}.{name}")
    options = {key: option for key, option in value.items() if not key.startswith("_")}
    if kind not in ("Fp32LayerNorm", "LayerNorm"):
        raise ValueError(f"the config of {where} has {name} = {kind}; only Fp32LayerNorm is known here.")
    for key, option in options.items():
        if key not in _NORM or (isinstance(_NORM[key], tuple) and option not in _NORM[key]):
            raise ValueError(f"the config of {where} has {name}.{key} = {option!r}, which is not known here.")
    if kind == "LayerNorm" and options.get("elementwise_affine", True):
        raise ValueError(f"the config of {where} has {name} with parameters; only one without is known here.")


def _modules(config: Mapping[str, Any], tower: str) -> dict[str, dict[str, Any]]:
    """Returns the checked modules of the encoder or the decoder."""
    if not isinstance(config.get(tower), Mapping) or "module_dict" not in config[tower]:
        raise ValueError(f"the config has no {tower}.module_dict; give the released config.json.")
    modules, known = dict(config[tower]["module_dict"]), _MODULES[tower]
    modules.pop("_target_", None)
    found = {}
    for name, entry in modules.items():
        where, kind = f"{tower}.{name}", _class(entry, f"{tower}.{name}")
        last = kind == "PerSampleOp" and list(known)[-1] in found  # latents back to channels first
        if name not in known and not last:
            raise ValueError(f"the config has the module {where} ({kind}), which is not known here.")
        if name in known and kind not in known[name]:
            raise ValueError(
                f"the config has {where} of the class {kind}; only {' or '.join(known[name])} is known here."
            )
        found[name] = _checked(entry, where)
    if missing := [name for name in known if name not in found and name not in _MAY_LACK]:
        raise ValueError(f"the config has no module {tower}.{missing[0]}, without which it is not known here.")
    order = [name for name in found if name in known]
    if order != [name for name in known if name in found]:
        raise ValueError(f"the config has the modules of {tower} in the order {', '.join(order)}, which is not known.")
    return found


def config_from(config: Mapping[str, Any]) -> tuple[FlexTokConfig, dict[str, Any]]:
    """Returns the model's config from the authors', and the options of the task that it tells.

    Raises:
      ValueError: a module, a class or an option is not known here; the message names it.
    """
    config = config.get("config", config)
    encoder, decoder = _modules(config, "encoder"), _modules(config, "decoder")
    regularizer = config.get("regularizer")
    if _class(regularizer, "regularizer") != "FSQ":
        raise ValueError(
            f"the config has the regularizer {_class(regularizer, 'regularizer')}; only FSQ is known here."
        )
    fsq = _checked(regularizer, "regularizer")

    def agree(what: str, *values: Any) -> Any:
        if any(value != values[0] for value in values):
            raise ValueError(f"the config has {what} of {', '.join(map(str, values))}, which must be equal.")
        return values[0]

    trunk, other = encoder["enc_transformer"], decoder["dec_transformer"]
    if trunk.get("adaLN_emb_read_key") is not None:
        raise ValueError("the config of encoder.enc_transformer has adaLN_emb_read_key; only None is known here.")
    if other.get("adaLN_emb_read_key") is None:
        raise ValueError("the config of decoder.dec_transformer has no adaLN_emb_read_key, which is not known here.")
    if encoder["enc_to_latents"].get("adaLN_emb_read_key") is not None:
        raise ValueError("the config of encoder.enc_to_latents has adaLN_emb_read_key; only None is known here.")
    for tower, packer, mode in (
        ("encoder", encoder["enc_seq_packer"], "causal_last"),
        ("decoder", decoder["dec_seq_packer"], "full"),
    ):
        if packer.get("mask_mode", "full") != mode:
            raise ValueError(
                f"the config of {tower} has mask_mode = {packer.get('mask_mode')!r}; only {mode} is known."
            )
    registers, positions = encoder["enc_register_module"], decoder["dec_registers_posemb_module"]
    count = agree("numbers of registers", registers["n_max"], *positions["max_sizes"])
    if registers.get("n_eval") not in (None, count) or registers["n_min"] != count:
        raise ValueError("the config of encoder.enc_register_module drops registers, which is not known here.")
    learned = ("learnable_sum", "learnable_prod")  # which are the same in one dimension
    for name, module, known in (
        ("decoder.dec_registers_posemb_module", positions, learned),
        ("encoder.enc_posemb_module", encoder["enc_posemb_module"], ("sincos",)),
        ("decoder.dec_patches_posemb_module", decoder["dec_patches_posemb_module"], ("sincos",)),
    ):
        if (kind := module.get("posemb_type", "sincos")) not in known:
            names = " or ".join(known)
            raise ValueError(f"the config of {name} has posemb_type = {kind!r}; only {names} is known here.")
    embedders = encoder["enc_patch_emb"], decoder["dec_noise_patch_emb"], decoder["dec_to_patches"]
    patch = agree("patch_sizes", *(tuple(module["patch_sizes"]) for module in embedders))
    channels = agree(
        "channels", *(module[name] for module, name in zip(embedders, ("channels_in", "channels_in", "channels_out")))
    )
    tables = encoder["enc_posemb_module"], decoder["dec_patches_posemb_module"]
    grid = agree("max_sizes", *(tuple(table["max_sizes"]) for table in tables))
    norms = [m["norm_layer"] for m in (trunk, other, encoder["enc_to_latents"], embedders[2]) if "norm_layer" in m]
    time, null = decoder["dec_time_embedder"], decoder["dec_latent_dropout"]
    model = FlexTokConfig(
        latent_size=(grid[0] * patch[0], grid[1] * patch[1]),
        channels=channels,
        patch=patch,
        registers=count,
        levels=agree("numbers of levels", tuple(fsq["levels"])),
        encoder_width=trunk.get("dim", 768),
        encoder_depth=trunk.get("depth", 12),
        decoder_width=other.get("dim", 768),
        decoder_depth=other.get("depth", 12),
        head_dim=agree("head_dim", trunk.get("head_dim", 64), other.get("head_dim", 64)),
        mlp_ratio=agree("mlp_ratio", trunk.get("mlp_ratio", 4.0), other.get("mlp_ratio", 4.0)),
        norm_eps=agree("norm eps", *(norm.get("eps", 1e-5) for norm in norms)) if norms else 1e-5,
        modulation_sets=other.get("adaLN_expansion", 1),
        head_modulation=embedders[2].get("adaLN_emb_read_key") is not None,
        null="learned" if _class(null, "null") == "LearnedNullCond" else "zero",
        time_channels=time.get("frequency_embedding_size", 256),
        max_time=float(time.get("max_timestep", 1000.0)),
    )
    options = {
        "dropout": decoder["dec_nested_dropout"].get("size_sampling_mode", "uniform"),
        "null_probability": float(null.get("dropout_prob", 0.0)),
        "drop_rounding": float(fsq.get("drop_quant_p") or 0.0),
        "corrupt": float(fsq.get("corrupt_tokens_p") or 0.0),
    }
    if (least := fsq.get("min_corrupt_tokens_p")) is not None:
        options["corrupt_least"] = float(least) or None
    return model, options | {"corrupt_probability": float(fsq.get("apply_corrupt_tokens_p", 0.2))}


def stored_config(path: Path) -> dict[str, Any]:
    """Returns the authors' config: config.json of a folder, or what is written into the head of a safetensors file.

    Raises:
      FileNotFoundError, ValueError: there is none.
    """
    if path.is_dir():
        return read_json(path / "config.json")
    with open(path, "rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        written = json.loads(file.read(size)).get("__metadata__", {})
    config = {}
    for name, text in written.items():
        try:
            config[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            config[name] = text
    if not isinstance(config.get("encoder"), Mapping):
        raise ValueError(f"{path} has no config of FlexTok in its head; give the folder with config.json, or --config.")
    return config


@dataclasses.dataclass(frozen=True)
class FlexTokFiles:
    """A folder or file of released weights, or one that `write` has written."""

    name: str = "flextok"
    holds: str = "FlexTok"
    is_file: bool = True

    def owns(self, task: Any) -> bool:
        return isinstance(task, FlexTokenizer)

    def recognises(self, path: Path) -> bool:
        path = Path(path)
        if path.is_dir():
            try:
                config = read_json(path / "config.json")
            except (ValueError, OSError):
                return False
            return isinstance(config, Mapping) and "module_dict" in str(config.get("config", config).get("encoder", ""))
        return has_tensors(path, lambda held: f"{_DECODER}dec_nested_dropout.dropout_mask_token" in held)

    def read(self, path: Path, like: Any = None) -> Model:
        """Returns the model in a folder or file.

        Args:
          path: a folder of config.json and model.safetensors; or a file, whose config is in its head unless `like` is
            given.
          like: a task whose model has the file's sizes.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the config has something that is not known here, or the tensors do not fit it.
        """
        path = Path(path)
        tensors = read_tensors(path) if path.is_dir() else read_weights(path, "")
        if like is None:
            stored = stored_config(path)
            model, options = config_from(stored)
            like = FlexTokenizer(model=model, **options, **latents_of(stored.get("config", stored), model))
        logging.getLogger("jaxtok").warning("%s: %s.", path, LICENCE)
        params = {"flextok": params_from(like.model, tensors)}
        if like.vae is not None:
            of_vae = {name.removeprefix(_VAE): x for name, x in _part(tensors, _VAE)}
            if not of_vae:
                raise ValueError(f"{path} has no tensors {_VAE}...; give the file with those of the KL-VAE.")
            params[FROZEN] = {"vae": {"autoencoder": vae_params(like.vae, of_vae, "diffusers")}}
        return Model(task=like, params=params, data=None, path=path)

    def write(self, path: Path, model: Model) -> Path:
        """Writes a file of tensors under the authors' names.

        Raises:
          FileExistsError: there is such a file already.
        """
        tensors = params_to(model.task.model, model.params["flextok"])
        if model.task.vae is not None:
            vae = vae_tensors(model.task.vae, model.params[FROZEN]["vae"]["autoencoder"], "diffusers")
            tensors |= {f"{_VAE}{name}": x for name, x in vae.items()}
        return write_file(path, tensors)


def _part(tensors: Tensors, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    return ((name, tensors[name]) for name in tensors if name.startswith(prefix))


def latents_of(config: Mapping[str, Any], model: FlexTokConfig) -> dict[str, Any]:
    """Returns the options of the task that say what the latents are.

    Raises:
      ValueError: the config has another autoencoder than a KL-VAE, or does not say how its latents are scaled.
    """
    vae = config.get("vae")
    if vae is None:
        kinds = {1: "grey", 3: "colour"}
        if model.channels not in kinds:
            raise ValueError(f"the config has no vae, and latents of {model.channels} channels; give it with its vae.")
        return {"latents": kinds[model.channels]}
    if (kind := _class(vae, "vae")) != "StableDiffusionVAE":
        raise ValueError(f"the config has the vae {kind}; only StableDiffusionVAE is known here.")
    options = _checked(vae, "vae")
    if not options.get("scaling_factor"):
        raise ValueError(
            f"the config of vae has no scaling_factor (it is in the config.json of {options.get('hf_hub_path')}); give "
            "a config with it (--config)."
        )
    if options.get("latent_channels", 16) != model.channels or model.latent_size[0] != model.latent_size[1]:
        raise ValueError(
            f"the config of vae has latent_channels = {options.get('latent_channels', 16)}, but the latents are "
            f"{model.latent_size} of {model.channels} channels; they must be square, with the same channels."
        )
    own = diffusers_vae(**_VAE_SIZES, latent_channels=model.channels, image_size=8 * model.latent_size[0])
    own = dataclasses.replace(own, scaling=float(options["scaling_factor"]))
    return {"latents": "vae", "vae": own, "sample_latents": bool(options.get("sample_posterior", True))}


FLEXTOK = FlexTokFiles()
