"""Mean accepted tokens of SmolLM2 with each drafter, and with several in one tree, on questions of Spec-Bench.

    jaxtok study drafting_study --questions SPEC_BENCH/question.jsonl

Eight questions of each of six categories, greedy, 128 new tokens. All trees have at most 81 nodes, as many as that of
Token Recycling. Arms that run with the model take most of the time; they resume after each batch, and `--only` chooses
some. Hot arms answer one question after the other with one matrix. In batches of six, one question of each category,
rows that share a matrix write over what it has for each other, which costs many tokens; cold rows have a matrix each,
and so the steps that they have alone. Not all arms have been run yet; configs/decoding/README.md has what was.
"""

from jaxtok.decoding import ADED, PromptLookup, SuffixAutomaton, TokenRecycling, Union
from jaxtok.studies.drafting import Arm, DraftStudy

BUDGET = TokenRecycling().nodes
HOT = {"with_model": True, "in_turn": True}
SIX_ROWS = {"with_model": True, "rows": 6}
COPY_AND_RECYCLING = Union((SuffixAutomaton(), TokenRecycling()), budget=BUDGET)
COPIES = SuffixAutomaton(matches=3, tokens=12)
COPIES_AND_RECYCLING = Union((COPIES, TokenRecycling()), budget=BUDGET)
ALL_THREE = Union((COPIES, TokenRecycling(), ADED()), budget=BUDGET)

config = DraftStudy(
    questions="question.jsonl",
    arms=(
        Arm(name="prompt lookup", drafter=PromptLookup()),
        Arm(name="suffix automaton", drafter=SuffixAutomaton()),
        Arm(name="three copies", drafter=COPIES),
        Arm(name="ADED", drafter=ADED(), corpus="python"),
        Arm(name="ADED, shared", drafter=ADED(shared=True), corpus="python", in_turn=True),
        Arm(name="Token Recycling, cold", drafter=TokenRecycling(shared=False), **SIX_ROWS),
        Arm(name="Token Recycling, hot", drafter=TokenRecycling(), **HOT),
        Arm(name="suffix automaton + Token Recycling", drafter=COPY_AND_RECYCLING, **HOT),
        Arm(name="three copies + Token Recycling", drafter=COPIES_AND_RECYCLING, **HOT),
        Arm(name="three copies + Token Recycling + ADED", drafter=ALL_THREE, corpus="python", **HOT),
        Arm(name="Token Recycling, of six rows", drafter=TokenRecycling(), in_turn=True, **SIX_ROWS),
        Arm(name="three copies + Token Recycling, of six rows", drafter=COPIES_AND_RECYCLING, in_turn=True, **SIX_ROWS),
    ),
    workdir="runs/drafting",
)
