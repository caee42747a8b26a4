"""SmolLM2 with drafts of a width that is fitted to the batch: tokens a second beside plain decoding, B = 1, 4, 8.

    jaxtok study draft_width_study --questions SPEC_BENCH/question.jsonl

The speeds are those of the machine that it runs on; configs/decoding/README.md has them for two cores.
"""

from jaxtok.decoding import SuffixAutomaton, TokenRecycling, Union
from jaxtok.decoding.token_recycling import TEMPLATES
from jaxtok.studies.draft_width import WidthStudy

config = WidthStudy(drafter=Union((SuffixAutomaton(tokens=4), TokenRecycling(template=TEMPLATES["11"]))))
