"""Generation, token by token, from a CausalLM and from other models: one engine and the parts it is combined with."""

from jaxtok.decoding.byte_model import ByteMixture, ByteModel, Gap
from jaxtok.decoding.engine import CachedTokens, Engine, Generation, Piece, State, generate
from jaxtok.decoding.prompt_lookup import PromptLookup
from jaxtok.decoding.protocols import Chooser, Drafter, Evictor, TokenModel, Verified
from jaxtok.decoding.sampling import Sampling, sample
from jaxtok.decoding.sinks import SinksAndRecent

__all__ = [
    "ByteMixture",
    "ByteModel",
    "CachedTokens",
    "Chooser",
    "Drafter",
    "Engine",
    "Evictor",
    "Gap",
    "Generation",
    "Piece",
    "PromptLookup",
    "Sampling",
    "SinksAndRecent",
    "State",
    "TokenModel",
    "Verified",
    "generate",
    "sample",
]
