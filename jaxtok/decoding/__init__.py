"""Generation, token by token, from a CausalLM and from other models: one engine and the parts it is combined with."""

from jaxtok.decoding.aded import ADED, ADEDState
from jaxtok.decoding.awrs import AWRS, PRESETS, SMC, sample_texts
from jaxtok.decoding.byte_model import ByteMixture, ByteModel, Gap
from jaxtok.decoding.constraints import Constrained, Function, Grammar, Vocabulary, constrain, constraint
from jaxtok.decoding.draft_model import DraftModel
from jaxtok.decoding.engine import CachedTokens, Engine, Generation, Piece, State, generate
from jaxtok.decoding.eviction import Eviction, Scorer
from jaxtok.decoding.keyformer import Keyformer
from jaxtok.decoding.prompt_lookup import PromptLookup
from jaxtok.decoding.protocols import Chooser, Drafter, Evictor, TokenModel, Verified
from jaxtok.decoding.sampling import Sampling, sample
from jaxtok.decoding.scorers import parse_evictor
from jaxtok.decoding.skipdecode import Schedule, SkipDecode
from jaxtok.decoding.suffix_automaton import SuffixAutomaton
from jaxtok.decoding.token_recycling import TokenRecycling, TreeTemplate
from jaxtok.decoding.union import Union

__all__ = [
    "ADED",
    "AWRS",
    "PRESETS",
    "SMC",
    "ADEDState",
    "ByteMixture",
    "ByteModel",
    "CachedTokens",
    "Chooser",
    "Constrained",
    "DraftModel",
    "Drafter",
    "Engine",
    "Eviction",
    "Evictor",
    "Function",
    "Gap",
    "Generation",
    "Grammar",
    "Keyformer",
    "Piece",
    "PromptLookup",
    "Sampling",
    "Schedule",
    "Scorer",
    "SkipDecode",
    "State",
    "SuffixAutomaton",
    "TokenModel",
    "TokenRecycling",
    "TreeTemplate",
    "Union",
    "Verified",
    "Vocabulary",
    "constrain",
    "constraint",
    "generate",
    "parse_evictor",
    "sample",
    "sample_texts",
]
