"""TokenFormer (arXiv 2410.23168) in the published sizes, with the authors' recipe for text of GPT-NeoX.

    jaxtok train tokenformer_pile_150m --data.corpus arrayrecord:/path/to/records

All need the tokenizer.json of GPT-NeoX-20B (--data.tokenizer FILE). Those on the Pile train for 143,000 steps of
1,024 x 2,048 tokens (300B); the perplexities are the paper's.

tokenformer_pile_150m  150M parameters on the Pile: perplexity 10.45
tokenformer_pile_450m  450M parameters on the Pile: perplexity 8.28
tokenformer_pile_900m  900M parameters on the Pile: perplexity 7.38
tokenformer_pile_1_5b  1.5B parameters on the Pile: perplexity 6.91
tokenformer_pile_7b  6.6B parameters with the same recipe, for `jaxtok plan`; not a published model, so no loss is known
tokenformer_openwebtext2_354m_757m  354M for 600,000 steps of 524,288 tokens, grown to 757M for 120,000 more
    This is the authors' PyTorch run. They report perplexity 11.9 before the growth and 10.7 after it. As in their run,
    new rows are random and tau follows the number of tokens, so the loss jumps and then falls; `--stages.0.init
    zero_keys` preserves the function instead.
tokenformer_openwebtext_124m_1_4b  124M on OpenWebText, grown to 354M, 757M and 1.4B with 60B tokens a stage
    This is the study of incremental scaling. Expect perplexities of about 16.4 at 124M, 13.6 at 354M, 12.3 at 757M and
    11.6 at 1.4B, which are read off the authors' figure. The token counts of the last two sizes are not public; those
    here give the published numbers of parameters to within one per cent.
"""

import dataclasses
from typing import Any

from jaxtok.data.text import TextData
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.tokenformer import PUBLISHED, TokenFormerConfig, uniform_counts
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.transfer.growth import Growth


def recipe(
    name: str,
    model: TokenFormerConfig,
    *,
    corpus: str = "pile",
    steps: int = 143_000,
    batch_size: int = 1024,
    remat: str = "projections",
    fsdp: int = 16,
    **options: Any,
) -> Experiment:
    """The authors' GPT-NeoX recipe: AdamW 0.9/0.95, decay 0.1, clip 1, 6e-4 to 6e-5 for every size, 1 % warm-up.

    Rows are cut from documents laid end to end, and attention crosses from one to the next. bfloat16 compute stands in
    for the authors' float16 with loss scaling. Of each block, the inputs and outputs of attention are kept for the
    backward pass, and all else is computed again. Parameters are divided 16 ways; on fewer devices, set --mesh.fsdp.
    """
    return Experiment(
        name=name,
        task=LanguageModeling(model=dataclasses.replace(model, dtype="bfloat16", remat=remat)),
        data=TextData(
            corpus=f"arrayrecord:data/{corpus}",
            tokenizer="data/gpt-neox-20b/tokenizer.json",
            length=model.max_length,
            batch_size=batch_size,
            isolate_documents=False,
            eval_limit=16,
            workers=8,
            streams=256,
        ),
        train=TrainConfig(
            steps=steps,
            optimizer=OptimizerConfig(),
            log_every=20,
            eval_every=1000,
            checkpoint_every=1000,
            keep_checkpoints=3,
        ),
        mesh=MeshConfig(fsdp=fsdp),
        **options,
    )


def grown(name: str, first: str, corpus: str, stages: tuple[Growth, ...]) -> Experiment:
    return recipe(name, PUBLISHED[first], corpus=corpus, steps=600_000, batch_size=512, stages=stages)


configs = {
    "tokenformer_pile_150m": lambda: recipe("tokenformer_pile_150m", PUBLISHED["150m"]),
    "tokenformer_pile_450m": lambda: recipe("tokenformer_pile_450m", PUBLISHED["450m"]),
    "tokenformer_pile_900m": lambda: recipe("tokenformer_pile_900m", PUBLISHED["900m"]),
    "tokenformer_pile_1_5b": lambda: recipe("tokenformer_pile_1_5b", PUBLISHED["1.5b"]),
    "tokenformer_pile_7b": lambda: recipe(
        "tokenformer_pile_7b",
        dataclasses.replace(
            PUBLISHED["1.5b"],
            num_layers=32,
            d_model=4096,
            num_heads=32,
            tokens=uniform_counts(attention=3072, ffn=12288),
        ),
        remat="full",
        fsdp=64,
    ),
    "tokenformer_openwebtext2_354m_757m": lambda: grown(
        "tokenformer_openwebtext2_354m_757m",
        "owt-354m",
        "openwebtext2",
        (Growth(to=PUBLISHED["owt-757m"].tokens, steps=120_000, init="random"),),
    ),
    "tokenformer_openwebtext_124m_1_4b": lambda: grown(
        "tokenformer_openwebtext_124m_1_4b",
        "124m",
        "openwebtext",
        tuple(Growth(to=PUBLISHED[size].tokens, steps=120_000) for size in ("354m", "757m", "1.4b")),
    ),
}
