"""Generation, token by token, from a CausalLM and from other models: one engine and the parts it is combined with."""

from jaxtok.decoding.aded import ADED, ADEDState
from jaxtok.decoding.draft_model import DraftModel
from jaxtok.decoding.engine import CachedTokens, Engine, Generation, Piece, State, generate
from jaxtok.decoding.prompt_lookup import PromptLookup
from jaxtok.decoding.protocols import Chooser, Drafter, Evictor, TokenModel, Verified
from jaxtok.decoding.sampling import Sampling, sample
from jaxtok.decoding.sinks import SinksAndRecent
from jaxtok.decoding.suffix_automaton import SuffixAutomaton
from jaxtok.decoding.token_recycling import TokenRecycling, TreeTemplate
from jaxtok.decoding.union import Union

__all__ = [
    "ADED",
    "ADEDState",
    "CachedTokens",
    "Chooser",
    "DraftModel",
    "Drafter",
    "Engine",
    "Evictor",
    "Generation",
    "Piece",
    "PromptLookup",
    "Sampling",
    "SinksAndRecent",
    "State",
    "SuffixAutomaton",
    "TokenModel",
    "TokenRecycling",
    "TreeTemplate",
    "Union",
    "Verified",
    "generate",
    "sample",
]
