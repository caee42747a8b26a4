"""Mean accepted tokens of SmolLM2 with each drafter, on four questions a category of Spec-Bench, 128 new tokens.

    jaxtok study drafting_study --questions SPEC_BENCH/question.jsonl

It takes half an hour on two cores and resumes after each drafter. Expect what configs/decoding/token_recycling.md has
as a table.
"""

from jaxtok.studies.drafting import DraftingStudy

config = DraftingStudy()
