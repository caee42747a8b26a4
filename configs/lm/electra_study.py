"""ELECTRA's claim on Python's standard library: replaced tokens against masked words at the same compute.

    jaxtok study electra_study

The models are encoders of bytes, of 2 layers of width 64, on rows of 64 bytes. The model of masked words trains for
more steps than ELECTRA, so that both spend the same FLOPs. ELECTRA 15% has its loss at the chosen positions only. The
probes tell from which package of the library a text comes (`jaxtok.studies.probes`). Expect an AUC of 0.596 for
replaced tokens, and 0.532 for ELECTRA 15%; configs/lm/README.md has the whole table.
"""

import dataclasses

from jaxtok.data.encoders import EncoderData
from jaxtok.lm.electra import ElectraConfig, ReplacedTokens
from jaxtok.lm.masked_words import MaskedWords, Masking
from jaxtok.studies.comparison import Comparison
from jaxtok.studies.probes import PackageProbe
from jaxtok.training.checkpoints import example_batch
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.optimizer import OptimizerConfig

STEPS = 600
PAD, CLS, SEP, MASK = range(257, 261)  # above the tokenizer's ids
sizes = ElectraConfig(
    vocab_size=264,
    num_layers=2,
    d_model=64,
    num_heads=2,
    mlp_dim=256,
    embedding_size=64,
    max_positions=64,
    pad_id=PAD,
)
masking = Masking(mask_id=MASK, kept_ids=(CLS, SEP))
electra = ReplacedTokens(model=sizes, masking=masking, generator_width=0.5)
words = MaskedWords(model=dataclasses.replace(sizes, mask_head=True, replaced_head=False), masking=masking)
base = Experiment(
    name="ELECTRA",
    task=electra,
    data=EncoderData(
        tokenizer="bytes",
        length=64,
        batch_size=32,
        pad_id=PAD,
        cls_id=CLS,
        sep_id=SEP,
        eval_limit=16,
    ),
    train=TrainConfig(
        steps=STEPS,
        log_every=50,
        eval_every=200,
        checkpoint_every=1000,
        tensorboard=False,
        optimizer=OptimizerConfig(
            learning_rate=3e-3,
            min_learning_rate=0.0,
            schedule="linear",
            warmup=0.1,
            b2=0.999,
            eps=1e-6,
            weight_decay=0.01,
        ),
    ),
)
batch = example_batch(base.data)
longer = round(STEPS * electra.flops(batch) / words.flops(batch))

config = Comparison(
    arms=(
        base,
        dataclasses.replace(base, name="masked words", task=words, train=dataclasses.replace(base.train, steps=longer)),
        dataclasses.replace(base, name="ELECTRA 15%", task=dataclasses.replace(electra, objective="replaced_masked")),
    ),
    seeds=(0,),
    test_batches=32,
    measures=(PackageProbe(rows=128, steps=60),),
    columns=("bits_per_byte", "auc", "accuracy", "baseline_accuracy", "linear_accuracy", "finetuned_accuracy"),
    curve="bits_per_byte",
    title="ELECTRA against masked words",
    workdir="runs/electra_study",
)
