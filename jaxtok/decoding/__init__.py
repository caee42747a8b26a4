"""Ways to generate from a CausalLM."""

from jaxtok.decoding.sampling import Sampling, generate, sample

__all__ = ["Sampling", "generate", "sample"]
