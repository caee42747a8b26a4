"""Extensible Tokenization (arXiv 2401.07793): k tokens of the past become one input of a frozen language model.

extensible_small  a byte model of 3 layers, trained for 1,200 steps and then frozen; its first 2 layers are copied

    jaxtok train extensible_small && jaxtok generate extensible_small --prompt "def " --max-new-tokens 400

    It takes about five minutes on two cores. The text that it generates may be five times as long as the window.

extensible_llama2  the paper's: Llama 2 7B Chat and its first 8 layers, 90,000 samples of RedPajama

    jaxtok train extensible_llama2 --start /path/to/Llama-2-7b-chat-hf --data.corpus arrayrecord:/path/to/records

    The paper then trains on 10,000 samples of LongAlpaca, and reports a perplexity on PG19 (of the last 512 tokens, at
    32K tokens of context) of 7.31 with k = 16 and 7.69 with k = 32; Llama 2 alone has 7.77 with its 4K. It does not say
    how long samples are: 7,680 tokens, 15 chunks, is the most that the window holds at k = 2.
"""

import dataclasses

from jaxtok.data.text import TextData
from jaxtok.lm.extensible import ExtensibleConfig, ExtensibleModeling
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.llama import PUBLISHED, LlamaConfig
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.transfer.extensible import AddExtensibleTokenizer


def small() -> Experiment:
    lm = LanguageModeling(
        model=LlamaConfig(
            num_layers=3, d_model=96, num_heads=4, mlp_dim=256, vocab_size=384, max_length=128, tie_embeddings=True
        )
    )
    extensible = ExtensibleModeling(
        model=ExtensibleConfig(lm=lm, layers=2, session=32, scale=8), chunk=32, scales=(2, 4, 8)
    )
    return Experiment(
        name="extensible_small",
        task=lm,
        data=TextData(length=128, batch_size=8, eval_limit=32),
        train=TrainConfig(
            steps=1200,
            log_every=50,
            eval_every=400,
            checkpoint_every=400,
            optimizer=OptimizerConfig(
                learning_rate=2e-3, min_learning_rate=0.0, schedule="linear", b2=0.999, weight_decay=0.0
            ),
        ),
        mesh=MeshConfig(data=1),
        stages=(AddExtensibleTokenizer(to=extensible, length=224, steps=1000),),
    )


def llama2() -> Experiment:
    model = dataclasses.replace(PUBLISHED["llama-2-7b"], dtype="bfloat16", param_dtype="bfloat16", remat="full")
    return Experiment(
        name="extensible_llama2",
        task=ExtensibleModeling(model=ExtensibleConfig(lm=LanguageModeling(model=model))),
        data=TextData(corpus="arrayrecord:data/redpajama", tokenizer="data/llama2", length=7680, batch_size=8),
        train=TrainConfig(
            steps=11_250,
            log_every=20,
            eval_every=1000,
            checkpoint_every=1000,
            optimizer=OptimizerConfig(
                learning_rate=5e-5,
                min_learning_rate=0.0,
                schedule="linear",
                warmup=0.0,
                b2=0.999,
                weight_decay=0.0,
            ),
        ),
        mesh=MeshConfig(fsdp=8),
        start=AddExtensibleTokenizer(),
    )


configs = {"extensible_small": small, "extensible_llama2": llama2}
