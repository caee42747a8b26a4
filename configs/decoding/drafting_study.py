"""Mean accepted tokens of SmolLM2 with each drafter, on four questions a category of Spec-Bench, 128 new tokens.

    jaxtok study drafting_study --questions SPEC_BENCH/question.jsonl

It resumes after each drafter. The whole table has not been measured yet; configs/decoding/README.md has what was.
"""

from jaxtok.studies.drafting import DraftingStudy

config = DraftingStudy()
