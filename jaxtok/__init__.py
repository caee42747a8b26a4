"""jaxtok: JAX / Flax reference implementations of published systems about tokens."""

__version__ = "0.1.0"
