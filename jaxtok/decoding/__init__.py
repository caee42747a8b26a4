"""Generation, token by token, from a CausalLM and from other models: one engine and the parts it is combined with."""

from jaxtok.decoding.engine import CachedTokens, Engine, Generation, Piece, State, generate
from jaxtok.decoding.prompt_lookup import PromptLookup
from jaxtok.decoding.protocols import Chooser, Drafter, Evictor, TokenModel, Verified
from jaxtok.decoding.sampling import Sampling, sample
from jaxtok.decoding.sinks import SinksAndRecent
from jaxtok.decoding.skipdecode import Schedule, SkipDecode

__all__ = [
    "CachedTokens",
    "Chooser",
    "Drafter",
    "Engine",
    "Evictor",
    "Generation",
    "Piece",
    "PromptLookup",
    "Sampling",
    "Schedule",
    "SinksAndRecent",
    "SkipDecode",
    "State",
    "TokenModel",
    "Verified",
    "generate",
    "sample",
]
