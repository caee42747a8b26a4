"""SmolLM2 on HumanEval's prompts, cut at random bytes: bits of the true next byte, exact against token healing.

    jaxtok study byte_exact_study

It takes about ten minutes on two cores, and goes on where it was stopped. configs/decoding/README.md has its table.
"""

from jaxtok.studies.byte_exact import ByteCuts

config = ByteCuts(begin=(0,))  # <|endoftext|>, which begins a document
