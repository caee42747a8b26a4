"""Function calls of bfcl-eval with SmolLM2 under JSON schemas: validity, evidence, checks and time of each method.

    jaxtok study awrs_study

It goes on where it was stopped, and needs more than half an hour on two cores. Its page has the tables.
"""

from jaxtok.studies.constraints import Constraints

config = Constraints()
