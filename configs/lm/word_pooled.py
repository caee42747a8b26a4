"""Learn Your Tokens (arXiv 2310.11628): the units of a word become four vectors; 8 layers of width 512 over words.

    jaxtok train word_pooled_ebyte --data.corpus data/wikitext-2

Training makes 50 passes over the text, as in the paper, whose code has AdamW at a constant 1e-4 and rows of 192 words.
The batch of 256 rows is for a TPU slice; --data.batch-size 2 --train.steps 272000 --mesh.fsdp 1 gives the authors'. The
paper has no table that we could check; expect a higher next-word accuracy than that of a plain model of the same body,
above all for rare words.

word_pooled_ebyte  the bytes of the 2M words of WikiText-2
word_pooled_echar  the characters of the 0.3M words of tiny Shakespeare; those not in the alphabet are spelled in bytes
word_pooled_esub  GPT-2's tokens of the words of WikiText-2
    It needs GPT-2's tokenizer.json (--data.tokenizer FILE). The end mark has the id of GPT-2's
    end-of-text token; in the authors' code it clashes with "!". A word includes the space before it, as in GPT-2.
"""

import dataclasses
import string

from jaxtok.data.word_units import WordUnitText
from jaxtok.lm.word_pooled import PUBLISHED, WordPooling
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig

ALPHABET = "characters:" + string.ascii_letters + string.digits + string.punctuation


def word_pooled(
    base: str, tokenizer: str, corpus: str = "data/wikitext-2", streams: int = 8, steps: int = 2_125, eval_every=250
) -> Experiment:
    model = dataclasses.replace(PUBLISHED[base], dtype="bfloat16", remat="projections")
    return Experiment(
        name=f"word_pooled_{base}",
        task=WordPooling(model=model),
        data=WordUnitText(
            corpus=corpus,
            tokenizer=tokenizer,
            rule="paper",
            length=model.max_words,
            max_units=model.max_units,
            batch_size=256,
            streams=streams,
            eval_limit=16,
        ),
        train=TrainConfig(
            steps=steps,
            eval_every=eval_every,
            optimizer=OptimizerConfig(learning_rate=1e-4, min_learning_rate=0.0, schedule="constant", warmup=0.0),
        ),
        mesh=MeshConfig(fsdp=16),
    )


configs = {
    "word_pooled_ebyte": lambda: word_pooled("ebyte", "bytes"),
    "word_pooled_echar": lambda: word_pooled("echar", ALPHABET, "tfds:tiny_shakespeare", 1, 300, 50),
    "word_pooled_esub": lambda: word_pooled("esub", "data/gpt2/tokenizer.json"),
}
