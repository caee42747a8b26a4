"""What a frozen language model gains from context: none, raw bytes, embeddings of more than its window holds.

    jaxtok study extensible_study

The text is the documentation of Python's topics; the model is that of extensible_small. Measured are the nats of the
last 31 bytes of rows of 224. Expect 1.50 without context, 1.39 after raw bytes, 1.42 to 1.44 after extensible
embeddings at k = 2 to 32 (training never saw 16 and 32), and 1.48 to 1.49 with a tokenizer that has not learned.
"""

import dataclasses

from jaxtok.configuration import load_config
from jaxtok.studies.extensible import ExtensibleStudy, ValueOfContext

small = load_config("extensible_small")

config = ExtensibleStudy(
    arms=(dataclasses.replace(small, data=dataclasses.replace(small.data, eval_limit=8)),),
    measures=(ValueOfContext(raw=(32, 96), scales=(2, 4, 8, 16, 32), sessions=(96,)),),
    columns=(
        "no_context",
        "raw_32",
        "raw_96",
        "ets_2",
        "ets_4",
        "ets_8",
        "ets_16",
        "ets_32",
        "untrained_2",
        "untrained_8",
    ),
    curve="loss",
    title="Nats a byte of the last chunk, by what comes before it",
    workdir="runs/extensible_study",
)
