"""PEFT's LoRA adapters against its own numbers, for whatever model and options a file has; and what is refused."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtok
from jaxtok.cli import main
from jaxtok.interop.huggingface import params_from, params_to, read_config, read_folder, write_folder
from jaxtok.interop.peft import (
    adapter_from,
    adapter_to,
    apply_adapter,
    read_adapter,
    scale_of,
    targeted,
    untie,
    write_adapter,
)
from jaxtok.lm.decoder import Decoder, init_params
from jaxtok.lm.gpt2 import GPT2Config
from jaxtok.lm.llama import LlamaConfig
from jaxtok.nn.lora import LoraConfig, find_sites, init_adapter, merge, nested, saved_paths
from jaxtok.nn.losses import cross_entropy, masked_mean
from jaxtok.runs import open_run

FILES = "llama_gpt2_bricks/lora_*.npz"
GOLDENS = Path(__file__).parents[1] / "goldens" / "llama_gpt2_bricks"


def load(golden):
    tensors = golden.under("params")
    options = golden.config
    model = read_config(options, options.get("tie_word_embeddings", "lm_head.weight" not in tensors))
    adapter_options = json.loads(str(golden["adapter_config"]))
    return model, params_from(model, tensors), adapter_options


@functools.partial(jax.jit, static_argnames=("model", "sites"))
def run(model, sites, params, adapter, arrays):
    def loss(adapter):
        logits, _ = Decoder(model).apply({"params": merge(params, sites, adapter)}, arrays["input_ids"])
        labels = arrays["labels"][:, 1:]
        nats = cross_entropy(logits[:, :-1], jnp.maximum(labels, 0))
        return masked_mean(nats, labels >= 0), logits

    return jax.value_and_grad(loss, has_aux=True)(adapter)


@pytest.mark.parity(FILES)
def test_adapter(golden, parity):
    model, params, options = load(golden)
    tensors = golden.under("adapter")
    model, params = untie(model, params, tensors)
    sites, adapter = adapter_from(model, options, tensors)
    arrays = golden.under("in")
    arrays = {name: arrays[name] for name in ("input_ids", "labels")}
    (loss, logits), gradient = run(model, sites, params, adapter, arrays)
    parity("logits", logits, golden["out/logits_lora"])
    parity("loss", loss, golden["out/loss"], rtol=1e-5)
    _, ours = adapter_to(model, sites, gradient)
    parity("gradient", ours, golden.under("grad"), rtol=1e-3)
    merged = params_to(model, merge(params, sites, adapter))
    theirs = golden.under("out/merged")
    parity("merged weights", {name: merged[name] for name in theirs}, theirs)
    base, _ = jax.jit(Decoder(model).apply)({"params": params}, arrays["input_ids"])
    parity("logits of the base", base, golden["out/logits_base"])
    for name, scale in json.loads(str(golden["in/scaling"])).items():
        assert scale_of(name.removeprefix("base_model.model."), options)[1] == pytest.approx(scale)


@pytest.mark.parity(FILES)
def test_read_then_written_is_the_same(golden, tmp_path):
    model, params, options = load(golden)
    tensors = golden.under("adapter")
    model, _ = untie(model, params, tensors)
    sites, adapter = adapter_from(model, options, tensors)
    folder = write_adapter(tmp_path / "a", model, sites, adapter, rslora=options["use_rslora"])
    written = json.loads((folder / "adapter_config.json").read_text())
    for name in ("peft_type", "use_rslora", "fan_in_fan_out"):
        assert written[name] == options[name]
    again_sites, again = read_adapter(folder, model)
    assert again_sites == sites
    back = adapter_to(model, again_sites, again)[1]
    assert back.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.parity("llama_gpt2_bricks/hf_folder_llama_expected.npz")
def test_folders(golden, parity, request):
    folder = request.config.getoption("--goldens") / "llama_gpt2_bricks"
    model, params = apply_adapter(folder / "hf_folder_llama_lora", *read_folder(folder / "hf_folder_llama"))
    text = json.loads(str(golden["in/texts"] if "in/texts" in golden.arrays else golden["texts"]))[0]
    ids = jaxtok.open(folder / "hf_folder_llama").ids(text)[None]
    logits, _ = jax.jit(Decoder(model).apply)({"params": params}, ids)
    parity("logits with the adapter", logits.reshape(golden["out/lora_logits_0"].shape), golden["out/lora_logits_0"])


@pytest.mark.parity(FILES)
def test_what_does_not_fit_is_named(golden, tmp_path):
    model, _, options = load(golden)
    tensors = golden.under("adapter")
    with pytest.raises(ValueError, match=r"use_dora is True"):
        adapter_from(model, options | {"use_dora": True}, tensors)
    with pytest.raises(ValueError, match=r"peft_type is 'IA3'; it must be LORA"):
        adapter_from(model, options | {"peft_type": "IA3"}, tensors)
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    with pytest.raises(ValueError, match=r"lora_A of .* has shape \(\d+, 5\); this model and rank need"):
        adapter_from(model, options, tensors | {name: tensors[name][:, :5]})
    with pytest.raises(ValueError, match=r"lora_A of .* is missing"):
        adapter_from(model, options, {n: a for n, a in tensors.items() if n != name})
    with pytest.raises(ValueError, match=r"the adapter has odd\.lora_A\.weight, which the model does not have"):
        adapter_from(model, options, tensors | {"base_model.model.odd.lora_A.weight": tensors[name]})
    both = {n: a for n, a in tensors.items() if n.rsplit(".lora_", 1)[0] != name.rsplit(".lora_", 1)[0]}
    with pytest.raises(ValueError, match=r"targets .*, but the adapter has no tensors of it"):
        adapter_from(model, options, both)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json does not exist"):
        read_adapter(tmp_path, model)


def test_which_modules_are_meant():
    name = "model.layers.3.self_attn.q_proj"
    for wanted in (["q_proj"], ["self_attn.q_proj"], [name], r".*\.(q|v)_proj", "all-linear", ["x", "q_proj"]):
        assert targeted(name, {"target_modules": wanted}, linear=True), wanted
    for wanted in (["proj"], ["attn.q_proj"], "q_proj", r".*\.q", [], None):
        assert not targeted(name, {"target_modules": wanted}, linear=True), wanted
    assert not targeted("lm_head", {"target_modules": "all-linear"}, linear=False)
    options = {"target_modules": ["q_proj"], "layers_to_transform": [1, 3]}
    assert targeted(name, options, linear=True)
    assert not targeted(name, options | {"layers_to_transform": 2}, linear=True)
    assert not targeted(name, options | {"exclude_modules": ["q_proj"]}, linear=True)


def test_ranks_and_scales():
    options = {"r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.0\..*": 6}}
    assert scale_of("model.layers.0.self_attn.q_proj", options) == (2, 3.0)
    assert scale_of("model.layers.1.self_attn.q_proj", options) == (2, 8.0)
    assert scale_of("model.layers.1.self_attn.v_proj", options) == (8, 2.0)
    assert scale_of("model.layers.1.self_attn.v_proj", options | {"use_rslora": True})[1] == pytest.approx(16 / 8**0.5)
    with pytest.raises(ValueError, match="r is 0 for x"):
        scale_of("x", {"r": 0})


TINY = {"num_layers": 2, "d_model": 16, "num_heads": 2, "mlp_dim": 24, "vocab_size": 32, "max_length": 16}
JOINT = r".*/attention/(query|key|value)/kernel"
OURS = {
    "llama, all-linear": (LlamaConfig(**TINY), LoraConfig(rank=3, alpha=5)),
    "llama, tables": (
        LlamaConfig(**TINY),
        LoraConfig(rank=2, targets=("embedding", "head_matrix"), saved=("final_norm/.*",)),
    ),
    "gpt2, joint": (
        GPT2Config(**TINY),
        LoraConfig(joint=(JOINT,), targets=(r".*/down/kernel",), ranks=((r".*down.*", 2),), rank_stabilized=True),
    ),
    "gpt2, all biases": (
        GPT2Config(**TINY),
        LoraConfig(joint=(JOINT,), targets=(r".*/up/kernel",), saved=(".*bias", r".*final_norm/scale")),
    ),
    "qwen2, biases of what is adapted": (
        LlamaConfig(**TINY, qkv_bias=True, mlp_bias=False),
        LoraConfig(targets=(r".*/query/kernel", r".*/up/kernel"), saved=(".*/query/bias",)),
    ),
}


def noisy(name):
    """Parameters, sites and an adapter without zeros."""
    model, lora = OURS[name]
    shapes = jax.eval_shape(lambda: init_params(Decoder(model), jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(scale=0.2, size=x.shape).astype(np.float32), shapes)
    sites = find_sites(lora, params)
    adapter = init_adapter(jax.random.key(1), sites, saved_paths(lora, params), params)
    return params, sites, jax.tree.map(lambda x: rng.normal(scale=0.2, size=x.shape).astype(np.float32), adapter)


@pytest.mark.parametrize("name", OURS)
def test_trained_here_then_written_is_the_same(name, tmp_path):
    model, lora = OURS[name]
    params, sites, adapter = noisy(name)
    folder = write_adapter(tmp_path / "a", model, sites, adapter, rslora=lora.rank_stabilized)
    sites_read, read = read_adapter(folder, model)
    ours, theirs = merge(params, sites, adapter), merge(params, sites_read, read)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_what_peft_has_no_name_for():
    model = GPT2Config(**TINY)
    params = jax.eval_shape(lambda: init_params(Decoder(model), jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    lora = LoraConfig(targets=(r".*/query/kernel",))
    sites = find_sites(lora, params)
    pairs = {sites[0].name: {"in": np.zeros((2, 16, 8)), "out": np.zeros((2, 8, 16))}}
    with pytest.raises(ValueError, match=r"query/kernel cannot be written for PEFT; target .*key/kernel.* together"):
        adapter_to(model, sites, {"pairs": pairs, "saved": {}})
    name = "stack/blocks/attention/query/bias"
    with pytest.raises(ValueError, match=r"c_attn\.bias .*cannot be written for PEFT; train all biases"):
        adapter_to(model, (), {"pairs": {}, "saved": nested({name: np.zeros((2, 16))})})


@pytest.mark.parametrize("name", OURS)
def test_peft_reads_what_is_written(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model, lora = OURS[name]
    params, sites, adapter = noisy(name)
    write_folder(tmp_path / "base", model, params)
    write_adapter(tmp_path / "adapter", model, sites, adapter, rslora=lora.rank_stabilized)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    ids = np.arange(10).reshape(2, 5)
    ours, _ = jax.jit(Decoder(model).apply)({"params": merge(params, sites, adapter)}, ids)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())
    plain, _ = jax.jit(Decoder(model).apply)({"params": params}, ids)
    assert np.abs(ours - plain).max() > 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["difference of the table", "difference of the head", "saved"])
def test_a_head_that_is_the_embedding_comes_apart_as_in_peft(kind, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model, rng = GPT2Config(**TINY), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(Decoder(model), jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    params = jax.tree.map(lambda x: rng.normal(scale=0.2, size=x.shape).astype(np.float32), shapes)
    write_folder(tmp_path / "base", model, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    options = {
        "difference of the table": {"target_modules": ["wte"]},
        "difference of the head": {"target_modules": ["lm_head"]},
        "saved": {"target_modules": ["mlp.c_fc"], "modules_to_save": ["wte"], "fan_in_fan_out": True},
    }[kind]
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=3, lora_alpha=5, **options)).eval()
    for tensor in theirs.parameters():
        if tensor.requires_grad:
            tensor.data = torch.tensor(rng.normal(scale=0.2, size=tensor.shape), dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "adapter")
    ids = np.arange(10).reshape(2, 5)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    untied, merged = apply_adapter(tmp_path / "adapter", model, params)
    assert not untied.tie_embeddings
    ours, _ = jax.jit(Decoder(untied).apply)({"params": merged}, ids)
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())
    with pytest.raises(ValueError, match="head"):
        read_adapter(tmp_path / "adapter", model)


PEFTS = {
    "pissa": ("llama", {"init_lora_weights": "pissa", "target_modules": ["q_proj", "down_proj", "lm_head"]}),
    "pissa, patterns": (
        "gpt2",
        {
            "init_lora_weights": "pissa",
            "target_modules": ["c_attn", "mlp.c_proj"],
            "rank_pattern": {"c_attn": 2},
            "alpha_pattern": {r"h\.1\.mlp\.c_proj": 7},
            "use_rslora": True,
        },
    ),
    "olora": ("llama", {"init_lora_weights": "olora", "target_modules": "all-linear", "use_rslora": True}),
    "olora, joined": ("gpt2", {"init_lora_weights": "olora", "target_modules": ["attn.c_proj"]}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal", "target_modules": ["q_proj"]}),
    "all biases": ("gpt2", {"bias": "all", "target_modules": ["c_attn"], "modules_to_save": ["ln_f"]}),
    "biases of what is adapted": (
        "qwen2",
        {"bias": "lora_only", "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    ),
}


@pytest.mark.parametrize("name", PEFTS)
def test_the_model_that_peft_trained_by_the_verb(name, tmp_path):
    """What PEFT computes after training, for adapters that are more than a difference of what the base has."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    kind, options = PEFTS[name]
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "initializer_range": 0.2}
    if kind != "gpt2":
        sizes |= {"intermediate_size": 24, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=384, eos_token_id=381, bos_token_id=380, **sizes)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    theirs.save_pretrained(tmp_path / "base")
    shutil.copyfile(GOLDENS / "hf_folder_llama" / "tokenizer.json", tmp_path / "base" / "tokenizer.json")
    options = {"r": 4, "lora_alpha": 6, "fan_in_fan_out": kind == "gpt2", "task_type": "CAUSAL_LM"} | options
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**options)).eval()
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad and "original_module" not in n}
    assert "bias" not in options or any(n.endswith("bias") for n in trained)
    for parameter in trained.values():
        parameter.data += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "adapter")
    command = ["convert", str(tmp_path / "adapter"), str(tmp_path / "run"), "--base", str(tmp_path / "base")]
    assert main(command) == 0
    ids = np.arange(24).reshape(2, 12)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
        with theirs.disable_adapter():
            plain = theirs(torch.tensor(ids)).logits.numpy()
    ours = open_run(tmp_path / "run").logits(ids)
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(ours - plain).max() > 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"use_dora": True}, "use_dora is True in adapter_config.json; it must be off, as in plain LoRA."),
        ({"arrow_config": {"top_k": 3}}, "arrow_config is {'top_k': 3} in adapter_config.json; it must be off"),
        ({"an_option_of_tomorrow": 2}, "an_option_of_tomorrow is 2 in adapter_config.json; it must be off"),
        *(
            (
                {"init_lora_weights": init},
                f"init_lora_weights is '{init}' in adapter_config.json, which changed the base",
            )
            for init in ("loftq", "corda", "lora_ga", "pissa_niter_4")
        ),
        ({"r": "8"}, "adapter_config.json; it must be a whole number."),
        ({"target_modules": 3}, "adapter_config.json cannot be used (TypeError"),
        ({"bias": "some"}, "bias is 'some' in adapter_config.json; it must be one of none, all, lora_only."),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save has 'lm_head', but the adapter has no tensors of it."),
    ],
)
def test_what_changes_a_result_is_refused_by_name(changed, message, tmp_path, capsys):
    for name in ("hf_folder_llama", "hf_folder_llama_lora"):
        shutil.copytree(GOLDENS / name, tmp_path / name, copy_function=shutil.copyfile)
    file = tmp_path / "hf_folder_llama_lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    adapter, run = tmp_path / "hf_folder_llama_lora", tmp_path / "run"
    assert main(["convert", str(adapter), str(run), "--base", str(tmp_path / "hf_folder_llama")]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not run.exists()
