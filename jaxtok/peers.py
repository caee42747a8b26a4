"""What users would run instead, on the same cores: eager PyTorch, and `transformers`. See `jaxtok bench --what peers`.

The programs of a row alternate in one process, so that other work on the machine slows all of them down.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from jaxtok.decoding import CachedTokens, Engine, Sampling, generate
from jaxtok.door import open_model
from jaxtok.lm.decoder import DecoderConfig
from jaxtok.nn.rotary import rotary_dim, rotary_frequencies
from jaxtok.training.optimizer import OptimizerConfig


def _parameter(array: Any) -> nn.Parameter:
    return nn.Parameter(torch.tensor(np.array(array, np.float32)))


def _linear(kernel: Any) -> nn.Linear:
    layer = nn.Linear(*kernel.shape, bias=False)
    layer.weight = _parameter(np.asarray(kernel).T.copy())
    return layer


class Pattention(nn.Module):
    """TokenFormer's parameter attention, with `l2_norm_gelu`."""

    def __init__(self, params: Mapping[str, Any]):
        super().__init__()
        self.keys, self.values = _parameter(params["keys"]), _parameter(params["values"])

    def forward(self, x):
        scores = F.linear(x, self.keys)
        weights = F.gelu(scores / scores.norm(dim=-1, keepdim=True) * len(self.keys) ** 0.5)
        return weights @ self.values


def _projection(params: Mapping[str, Any]) -> nn.Module:
    if "keys" in params:
        return Pattention(params)
    if "kernel" in params:
        return _linear(params["kernel"])
    return nn.Sequential(_linear(params["up"]["kernel"]), nn.GELU(), _linear(params["down"]["kernel"]))


def _norm(width: int, params: Mapping[str, Any] | None) -> nn.LayerNorm:
    norm = nn.LayerNorm(width, elementwise_affine=params is not None)
    if params is not None:
        norm.weight, norm.bias = _parameter(params["scale"]), _parameter(params["bias"])
    return norm


class TorchBlock(nn.Module):
    """A pre-norm block with causal attention and rotary positions."""

    def __init__(self, config: DecoderConfig, params: Mapping[str, Any]):
        super().__init__()
        self.heads = config.num_heads
        self.norm_attention = _norm(config.d_model, params.get("norm_attention"))
        self.norm_ffn = _norm(config.d_model, params.get("norm_ffn"))
        self.query, self.key, self.value, self.output = (
            _projection(params["attention"][name]) for name in ("query", "key", "value", "output")
        )
        self.ffn = _projection(params["ffn"])

    def forward(self, x, cos, sin):
        y = self.norm_attention(x)
        q, k, v = (
            project(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.query, self.key, self.value)
        )
        q, k = (_rotated(part, cos, sin) for part in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(y.transpose(1, 2).flatten(2))
        return x + self.ffn(self.norm_ffn(x))


def _rotated(x, cos, sin):
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    left, right = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-right, left], -1) * sin, rest], -1)


class TorchDecoder(nn.Module):
    """A TokenFormer or the Transformer that it is compared with, as one writes it in PyTorch.

    Args:
      config: of the decoder; its options other than sizes are the defaults of these two systems.
      params: jaxtok's parameters, from which the model's own are copied.
    """

    def __init__(self, config: DecoderConfig, params: Mapping[str, Any]):
        super().__init__()
        stacked = params["stack"]["blocks"]
        self.embedding = _parameter(params["embedding"])
        self.blocks = nn.ModuleList(
            TorchBlock(config, jax.tree.map(lambda x, i=i: x[i], stacked)) for i in range(config.num_layers)
        )
        self.norm = _norm(config.d_model, params["final_norm"])
        pairs, _ = rotary_frequencies(rotary_dim(config.head_dim, config.rotary_fraction), config.rotary_base)
        self.register_buffer("frequency", torch.tensor(np.tile(pairs, 2)))

    def forward(self, tokens):
        angle = torch.arange(tokens.shape[1])[:, None] * self.frequency
        cos, sin = angle.cos(), angle.sin()
        x = F.embedding(tokens, self.embedding)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.linear(self.norm(x), self.embedding)


class TorchTrainStep:
    """A training step in PyTorch: loss, gradient, clipping and AdamW, with the numbers of `OptimizerConfig`."""

    def __init__(self, config: DecoderConfig, params: Mapping[str, Any], batch: Mapping[str, np.ndarray]):
        recipe = OptimizerConfig()
        self.model, self.clip = TorchDecoder(config, params), recipe.clip
        self.tokens, self.targets = (torch.tensor(batch[name]).long() for name in ("tokens", "targets"))
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=recipe.learning_rate,
            betas=(recipe.b1, recipe.b2),
            eps=recipe.eps,
            fused=True,
        )

    def loss(self) -> torch.Tensor:
        return F.cross_entropy(self.model(self.tokens).flatten(0, 1), self.targets.flatten())

    def __call__(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss.item()


class Products:
    """The matrix products of a block's projections alone, forward and backward, in jaxtok and in PyTorch.

    No step can be faster than its products, so their ratio says how much of a step's is XLA's.

    Args:
      widths: for each matrix, the columns of what it multiplies and its own.
    """

    def __init__(self, rows: int, widths: Sequence[tuple[int, int]]):
        draw = np.random.default_rng(0).standard_normal
        made = [[draw(shape, np.float32) for shape in ((rows, k), (k, n), (rows, n))] for k, n in widths]
        self.arrays = jax.device_put(made)
        self.tensors = [[torch.tensor(x), torch.tensor(w.T.copy()), torch.tensor(dy)] for x, w, dy in made]
        self.compiled = jax.jit(lambda arrays: [(x @ w, dy @ w.T, x.T @ dy) for x, w, dy in arrays])

    def __call__(self) -> Any:
        return self.compiled(self.arrays)

    @torch.inference_mode()
    def peer(self) -> Any:
        return [(F.linear(x, w), dy @ w, dy.T @ x) for x, w, dy in self.tensors]


class Pretrained:
    """A pretrained model, as jaxtok and as transformers run it in float32, on random prompts."""

    def __init__(self, name: str = "smollm2"):
        model = open_model(name)
        self.module, self.params = model.module, jax.device_put(model.params)
        self.peer = transformers.AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).eval()
        self.prompts = np.random.default_rng(0).integers(300, 40000, size=(8, 512))

    def decode(self, rows: int, prompt: int, new: int) -> list[list[int]]:
        """The new tokens of a greedy generation, none of which ends it."""
        prompts, greedy = self.prompts[:rows, :prompt].tolist(), Sampling(temperature=0)
        return generate(self.module, self.params, prompts, max_new_tokens=new, chooser=greedy).tokens

    @torch.inference_mode()
    def peer_decode(self, rows: int, prompt: int, new: int) -> list[list[int]]:
        ids = torch.tensor(self.prompts[:rows, :prompt])
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        return self.peer.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, prompt:].tolist()

    def decoding_step(self, rows: int, prompt: int) -> tuple[Any, ...]:
        """A pass over a new token of each row, as a function and its arguments."""
        cache = self.module.init_cache(rows, prompt + 64)
        tokens = jnp.zeros((rows, 1), jnp.int32)
        return lambda params: self.module.apply({"params": params}, tokens, cache=cache), self.params

    def reading(self, length: int) -> tuple[Any, ...]:
        """A pass over a prompt without the head, as a function and its arguments."""
        cache = self.module.init_cache(1, length + 1)
        embedded = jnp.zeros((1, length, self.module.config.d_model))
        return lambda params: self.module.apply({"params": params}, embedded, cache=cache, method="hidden"), self.params

    def prefill(self, length: int) -> jax.Array:
        engine = Engine(model=CachedTokens(self.module), chooser=Sampling(temperature=0))
        tokens = self.prompts[:1, :length].astype(np.int32)
        return engine.prefill(self.params, tokens, np.array([length], np.int32), new=1).model.keys

    @torch.inference_mode()
    def peer_prefill(self, length: int) -> None:
        self.peer(torch.tensor(self.prompts[:1, :length]), use_cache=True, logits_to_keep=1)


def first_token(name: str = "smollm2") -> float:
    """The seconds that the command takes for one new token, in a process of its own, with what is cached by then."""
    command = [sys.executable, "-m", "jaxtok.cli", "generate", name, "--prompt", "The capital of France is"]
    start = time.perf_counter()
    subprocess.run([*command, "--max-new-tokens", "1"], check=True, capture_output=True)
    return time.perf_counter() - start
