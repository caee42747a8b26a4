"""Small Llamas on Python's standard library, in bytes and in pieces of two vocabularies: the parts of ensembles.

byte_lm        bytes
byte_lm_300    300 SentencePiece pieces
byte_lm_1000   1000 SentencePiece pieces

    jaxtok train byte_lm
    jaxtok tokenizer runs/byte_exact/1000.model --vocab-size 1000 --model-type bpe
    jaxtok train byte_lm_1000

byte_lm reaches 2.36 bits a byte on validation files after its 1,000 steps; the others are not measured.
byte_ensemble_study scores them.
"""

from jaxtok.data.text import TextData
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.llama import LlamaConfig
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.optimizer import OptimizerConfig


def _experiment(name: str, tokenizer: str, length: int) -> Experiment:
    model = LlamaConfig(
        num_layers=3, d_model=96, num_heads=3, mlp_dim=256, vocab_size=0, max_length=512, tie_embeddings=True
    )
    return Experiment(
        name=name,
        task=LanguageModeling(model=model),
        data=TextData(tokenizer=tokenizer, length=length, batch_size=8, eval_limit=16),
        train=TrainConfig(
            steps=1000,
            log_every=100,
            eval_every=500,
            checkpoint_every=500,
            optimizer=OptimizerConfig(learning_rate=2e-3, min_learning_rate=2e-4),
            tensorboard=False,
        ),
    )


configs = {
    "byte_lm": lambda: _experiment("byte_lm", "bytes", 256),
    "byte_lm_300": lambda: _experiment("byte_lm_300", "runs/byte_exact/300.model", 160),
    "byte_lm_1000": lambda: _experiment("byte_lm_1000", "runs/byte_exact/1000.model", 96),
}
