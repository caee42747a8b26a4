"""Ensembles of language models with different tokenizers, byte by byte: bits a byte of held-out Python.

    jaxtok study byte_ensemble_study
    jaxtok study byte_ensemble_study --models runs/byte_lm_300 runs/byte_lm_1000 --weights 1,1

The models of byte_lm have to be trained before. Its time is not measured: it was stopped after eight minutes on two
shared cores.
"""

from jaxtok.studies.byte_exact import ByteEnsembles

config = ByteEnsembles(models=("smollm2", "runs/byte_lm"), weights=((0.9, 0.1), (0.5, 0.5)), spans=48)
