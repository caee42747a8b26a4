"""Mean accepted tokens of SmolLM2 with each drafter, and with several in one tree, on questions of Spec-Bench.

    jaxtok study drafting_study --questions SPEC_BENCH/question.jsonl

Eight questions of each of six categories, greedy, 128 new tokens. All trees have at most 81 nodes, as many as that of
Token Recycling. Arms that run with the model take most of the time. They answer one question of each category as a
batch, and resume after each batch; `--only` chooses some. Those that begin hot keep one matrix for all rows from batch
to batch; cold rows have a matrix each, and so the steps that they have alone. Not all arms have been run yet;
configs/decoding/README.md has what was.
"""

from jaxtok.decoding import ADED, Drafter, PromptLookup, SuffixAutomaton, TokenRecycling, Union
from jaxtok.studies.drafting import Arm, DraftStudy

BUDGET = TokenRecycling().nodes
IN_BATCHES = {"with_model": True, "rows": 6}  # one question of each category
HOT = IN_BATCHES | {"in_turn": True}
COPIES = SuffixAutomaton(matches=3, tokens=12)


def union(name: str, *drafters: Drafter) -> Arm:
    return Arm(name=name, drafter=Union(drafters, budget=BUDGET), **HOT)


config = DraftStudy(
    questions="question.jsonl",
    arms=(
        Arm(name="prompt lookup", drafter=PromptLookup()),
        Arm(name="suffix automaton", drafter=SuffixAutomaton()),
        Arm(name="three copies", drafter=COPIES),
        Arm(name="ADED", drafter=ADED(), corpus="python"),
        Arm(name="ADED, shared", drafter=ADED(shared=True), corpus="python", in_turn=True),
        Arm(name="Token Recycling, cold", drafter=TokenRecycling(shared=False), **IN_BATCHES),
        Arm(name="Token Recycling, hot", drafter=TokenRecycling(), **HOT),
        Arm(name="Token Recycling, hot, one at a time", drafter=TokenRecycling(), with_model=True, in_turn=True),
        union("suffix automaton + Token Recycling", SuffixAutomaton(), TokenRecycling()),
        union("three copies + Token Recycling", COPIES, TokenRecycling()),
    ),
    workdir="runs/drafting",
)
