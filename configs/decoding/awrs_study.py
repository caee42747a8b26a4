"""Function calls of bfcl-eval with SmolLM2 under JSON schemas: validity, evidence, checks and time of each method.

    jaxtok study awrs_study

It takes about fifteen minutes on two cores, and goes on where it was stopped. Its page has the tables.
"""

from jaxtok.studies.constraints import Constraints

config = Constraints()
