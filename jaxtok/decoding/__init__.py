"""Generation, token by token, from a CausalLM and from other models: one engine and the parts it is combined with."""

from jaxtok.decoding.engine import CachedTokens, Engine, Generation, Piece, State, generate
from jaxtok.decoding.eviction import Eviction, Scorer
from jaxtok.decoding.keyformer import Keyformer
from jaxtok.decoding.prompt_lookup import PromptLookup
from jaxtok.decoding.protocols import Chooser, Drafter, Evictor, TokenModel, Verified
from jaxtok.decoding.sampling import Sampling, sample
from jaxtok.decoding.scorers import parse_evictor
from jaxtok.decoding.sinks import SinksAndRecent

__all__ = [
    "CachedTokens",
    "Chooser",
    "Drafter",
    "Engine",
    "Eviction",
    "Evictor",
    "Generation",
    "Keyformer",
    "Piece",
    "PromptLookup",
    "Sampling",
    "Scorer",
    "SinksAndRecent",
    "State",
    "TokenModel",
    "Verified",
    "generate",
    "parse_evictor",
    "sample",
]
