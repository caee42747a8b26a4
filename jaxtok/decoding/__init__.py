"""Generation, token by token, from a CausalLM and from other models: one engine and the parts it is combined with."""

from jaxtok.decoding.awrs import AWRS, PRESETS, SMC, sample_texts
from jaxtok.decoding.constraints import Constrained, Function, Grammar, Vocabulary, constrain, constraint
from jaxtok.decoding.engine import CachedTokens, Engine, Generation, Piece, State, generate
from jaxtok.decoding.prompt_lookup import PromptLookup
from jaxtok.decoding.protocols import Chooser, Drafter, Evictor, TokenModel, Verified
from jaxtok.decoding.sampling import Sampling, sample
from jaxtok.decoding.sinks import SinksAndRecent

__all__ = [
    "AWRS",
    "PRESETS",
    "SMC",
    "CachedTokens",
    "Chooser",
    "Constrained",
    "Drafter",
    "Engine",
    "Evictor",
    "Function",
    "Generation",
    "Grammar",
    "Piece",
    "PromptLookup",
    "Sampling",
    "SinksAndRecent",
    "State",
    "TokenModel",
    "Verified",
    "Vocabulary",
    "constrain",
    "constraint",
    "generate",
    "sample",
    "sample_texts",
]
