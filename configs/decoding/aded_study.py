"""ADED beside prompt lookup on SmolLM2: mean accepted tokens on Spec-Bench's questions, greedy, 128 new tokens.

    jaxtok study aded_study --questions SPEC_BENCH/question.jsonl

The texts of 48 questions take about ... minutes on two cores, and are kept; a drafter is then replayed on them.
configs/decoding/README.md has the table.
"""

from jaxtok.decoding import ADED, PromptLookup
from jaxtok.studies.drafts import Arm, DraftStudy

config = DraftStudy(
    questions="question.jsonl",
    categories=("translation", "summarization", "qa", "math_reasoning", "rag"),
    others="mt_bench",
    arms=(
        Arm(name="prompt lookup", drafter=PromptLookup()),
        Arm(name="ADED", drafter=ADED(), corpus="python"),
        Arm(name="ADED, published reward", drafter=ADED(reward="published"), corpus="python"),
        Arm(name="ADED, best first", drafter=ADED(maker="best_first"), corpus="python"),
        Arm(name="ADED, best first, 8 nodes", drafter=ADED(maker="best_first", nodes=8), corpus="python"),
        Arm(name="ADED, does not adapt", drafter=ADED(increment=0), corpus="python"),
        Arm(name="ADED, empty table", drafter=ADED()),
        Arm(name="ADED, shared", drafter=ADED(shared=True), corpus="python", in_turn=True),
        Arm(name="ADED, shared, empty table", drafter=ADED(shared=True), in_turn=True),
    ),
    workdir="runs/aded_study",
)
