"""Ensembles of language models with different tokenizers, byte by byte: bits a byte of held-out Python.

    jaxtok train byte_lm --train.steps 6000
    jaxtok study byte_ensemble_study
    jaxtok study byte_ensemble_study --models runs/byte_lm_300 runs/byte_lm_1000

It goes on where it was stopped. configs/decoding/README.md has its table and its time.
"""

from jaxtok.studies.byte_exact import ByteEnsembles

config = ByteEnsembles(models=("smollm2", "runs/byte_lm"))
