"""ADED beside prompt lookup on SmolLM2: mean accepted tokens of its greedy texts of 128 new tokens.

    jaxtok study aded_study --questions SPEC_BENCH/question.jsonl     48 questions, through the chat template
    jaxtok study aded_corpus_study                                    24 held-out documents of Python's library

The model's texts take most of the time, and are kept; drafters are then replayed on them.

aded_study         48 questions of Spec-Bench, with a table of Python's library
aded_corpus_study  documents of Python's library, with tables of parts of it
"""

from jaxtok.decoding import ADED, PromptLookup
from jaxtok.studies.drafting import Arm, DraftStudy


def questions() -> DraftStudy:
    """Chat: the table of Python's library is of another domain."""
    return DraftStudy(
        questions="question.jsonl",
        arms=(
            Arm(name="prompt lookup", drafter=PromptLookup()),
            Arm(name="ADED", drafter=ADED(), corpus="python"),
            Arm(name="ADED, published reward", drafter=ADED(reward="published"), corpus="python"),
            Arm(name="ADED, best first", drafter=ADED(maker="best_first"), corpus="python"),
            Arm(name="ADED, best first, 8 nodes", drafter=ADED(maker="best_first", nodes=8), corpus="python"),
            Arm(name="ADED, not adapting", drafter=ADED(increment=0), corpus="python"),
            Arm(name="ADED, empty table", drafter=ADED()),
            Arm(name="ADED, shared", drafter=ADED(shared=True), corpus="python", in_turn=True),
            Arm(name="ADED, shared, empty table", drafter=ADED(shared=True), in_turn=True),
        ),
        workdir="runs/aded_study",
    )


def documents() -> DraftStudy:
    """Code: tables of growing shares of the training documents, adapting or not."""
    shares = (0.002, 0.02, 0.25, 1.0)
    return DraftStudy(
        corpus="python",
        each=24,
        arms=(
            Arm(name="prompt lookup", drafter=PromptLookup()),
            Arm(name="empty table", drafter=ADED()),
            *(Arm(name=f"{share:.1%}", drafter=ADED(), corpus="python", share=share) for share in shares),
            *(
                Arm(name=f"{share:.1%}, not adapting", drafter=ADED(increment=0), corpus="python", share=share)
                for share in shares
            ),
            *(
                Arm(name=f"{share:.1%}, shared", drafter=ADED(shared=True), corpus="python", share=share, in_turn=True)
                for share in (0.002, 0.02, 1.0)
            ),
            Arm(name="100.0%, published reward", drafter=ADED(reward="published"), corpus="python"),
            Arm(name="100.0%, best first", drafter=ADED(maker="best_first"), corpus="python"),
        ),
        workdir="runs/aded_corpus_study",
    )


configs = {"aded_study": questions, "aded_corpus_study": documents}
