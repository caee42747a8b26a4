"""The ViT block, and the block with DiT's modulation, against numbers made by timm's and TokenBridge's code."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.interop.tensors import Source, read_params, shapes_of, write_params
from jaxtok.nn.linear import LinearStack
from jaxtok.nn.norms import Norm
from jaxtok.nn.transformer import ModulatedBlock, Stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTStack(LinearStack):
    """timm's `Block` is an ordinary pre-norm block, with these options."""

    norm_eps: float = 1e-6
    causal: bool = False
    rotary_fraction: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalStack(ViTStack):
    causal: bool = True
    qk_norm: bool = True

    def head_norm(self, name=None):
        return self.norm_module(name)

    def block(self):
        return ModulatedBlock


def table(config, name):
    """The places of a stack of one block, and their names in the fixture's block."""
    parts = {
        "norm_attention": "norm1",
        "norm_ffn": "norm2",
        "attention/output": "attn.proj",
        "ffn/up": "mlp.fc1",
        "ffn/down": "mlp.fc2",
    }
    if isinstance(config, CausalStack):
        parts |= {"modulation": "adaLN_modulation.1"}
        parts |= {"attention/query_norm": "attn.q_norm", "attention/key_norm": "attn.k_norm"}
    found = {}
    for ours, theirs in parts.items():
        place, norm = ("blocks", *ours.split("/")), "norm" in ours
        found[*place, "scale" if norm else "kernel"] = Source(f"{name}.{theirs}.weight", transpose=not norm)
        found[*place, "bias"] = Source(f"{name}.{theirs}.bias")
    for part, group in enumerate(("query", "key", "value")):
        for leaf, transpose in (("kernel", True), ("bias", False)):
            theirs = f"{name}.attn.qkv.{'weight' if leaf == 'kernel' else 'bias'}"
            found["blocks", "attention", group, leaf] = Source(theirs, transpose=transpose, part=part, axis=0)
    return found


@pytest.mark.parity("visual_bricks/adaln_blocks_dit_order*.npz")
def test_blocks(golden, parity):
    c, x = golden.config, jnp.asarray(golden["in/x"])
    condition, cotangent = golden["in/c"], golden["in/cotangent"]
    sizes = {"num_layers": 1, "d_model": c["dim"], "num_heads": c["heads"], "norm_eps": c["eps"]}

    def read(config, name):
        module = Stack(config)
        given = golden.under("params")
        shapes = shapes_of(lambda: module.init(jax.random.key(0), x, None, condition=x)["params"])
        held = {key: value for key, value in given.items() if key.startswith(f"{name}.")}

        shapes = {place: shape[1:] for place, shape in shapes.items()}
        return module, jax.tree.map(lambda leaf: leaf[None], read_params(table(config, name), shapes, held))

    mlp = golden["params/vit_block.mlp.fc1.weight"].shape[0]
    module, params = read(ViTStack(**sizes, mlp_dim=mlp), "vit_block")
    parity("ViT block", module.apply({"params": params}, x, None)[0], golden["out/vit_block"], 2e-5)

    mlp = golden["params/causal_block.mlp.fc1.weight"].shape[0]
    config = CausalStack(**sizes, mlp_dim=mlp)
    module, params = read(config, "causal_block")
    final = {
        "kernel": golden["params/final_layer.adaLN_modulation.1.weight"].T,
        "bias": golden["params/final_layer.adaLN_modulation.1.bias"],
    }

    def objective(params, final, x):
        y, _ = module.apply({"params": params}, x, None, condition=condition)
        scale, shift = jnp.split(jax.nn.silu(condition) @ final["kernel"] + final["bias"], 2, -1)
        z = Norm("layernorm_nonparam", eps=c["eps"]).apply({}, y) * (1 + scale) + shift
        return jnp.sum(z * cotangent), (y, z)

    (_, (y, z)), grads = jax.jit(jax.value_and_grad(objective, (0, 1, 2), has_aux=True))(params, final, x)
    parity("modulated block", y, golden["out/causal_block"], 2e-5)
    parity("final layer", z, golden["out/final_layer"], 2e-5)
    theirs = write_params(table(config, "causal_block"), jax.tree.map(lambda leaf: leaf[0], grads[0]))
    found = {name: theirs[name] for name in theirs if f"grad/{name}" in golden.arrays}
    found |= {
        "final_layer.adaLN_modulation.1.weight": np.asarray(grads[1]["kernel"]).T,
        "final_layer.adaLN_modulation.1.bias": grads[1]["bias"],
        "x": grads[2],
    }
    parity("gradients", found, golden.under("grad"))


def test_a_modulated_block_is_the_identity_at_first():
    config = CausalStack(num_layers=2, d_model=16, num_heads=2, mlp_dim=32)
    x = jax.random.normal(jax.random.key(0), (2, 5, 16))
    module = Stack(config)
    params = module.init(jax.random.key(1), x, None, condition=x)
    assert np.array_equal(module.apply(params, x, None, condition=x)[0], x)
