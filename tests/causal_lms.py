"""What the tiny models of the CausalLM waist share. The models are in their systems' test files, as `CAUSAL_LMS`."""

from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp

from jaxtok.lm.decoder import init_params

# untied, because a tied model of random weights repeats its last token for ever
SIZES = {
    "num_layers": 2,
    "d_model": 16,
    "num_heads": 2,
    "rotary_fraction": 0.5,
    "vocab_size": 32,
    "max_length": 80,
    "tie_embeddings": False,
}

LLAMA = SIZES | {"rotary_fraction": 1.0, "num_heads": 4}
TIED = {"tie_embeddings": True, "mlp_dim": 24}


def noisy_params(model) -> Any:
    """Parameters of a model, none of them zero."""

    @jax.jit
    def noisy_init():
        params = init_params(model, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
        flat, unflatten = jax.flatten_util.ravel_pytree(params)
        return unflatten(flat + 0.4 * jax.random.normal(jax.random.key(1), flat.shape))

    return noisy_init()
