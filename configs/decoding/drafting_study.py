"""Mean accepted tokens of SmolLM2 with each drafter, and with several in one tree, on questions of Spec-Bench.

    jaxtok study drafting_study --questions SPEC_BENCH/question.jsonl

Eight questions of each of six categories, greedy, 128 new tokens. All trees have at most 81 nodes, as many as that of
Token Recycling. Arms that run with the model take most of the time; it resumes after each of their questions, and
`--only` chooses some. It has not been run whole yet; configs/decoding/README.md has what was.
"""

from jaxtok.decoding import ADED, PromptLookup, SuffixAutomaton, TokenRecycling, Union
from jaxtok.studies.drafting import Arm, DraftStudy

BUDGET = TokenRecycling().nodes


def union(*drafters) -> dict:
    return {"drafter": Union(drafters, budget=BUDGET), "in_turn": True, "with_model": True}


config = DraftStudy(
    questions="question.jsonl",
    arms=(
        Arm(name="prompt lookup", drafter=PromptLookup()),
        Arm(name="suffix automaton", drafter=SuffixAutomaton()),
        Arm(name="ADED", drafter=ADED(), corpus="python"),
        Arm(name="ADED, shared", drafter=ADED(shared=True), corpus="python", in_turn=True),
        Arm(name="Token Recycling, cold", drafter=TokenRecycling(), with_model=True),
        Arm(name="Token Recycling, hot", drafter=TokenRecycling(), with_model=True, in_turn=True),
        Arm(name="suffix automaton + Token Recycling", **union(SuffixAutomaton(), TokenRecycling())),
    ),
    workdir="runs/drafting",
)
