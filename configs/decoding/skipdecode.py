"""SkipDecode (arXiv 2307.02628): a language model on Python's sources, trained under a schedule of layers.

    jaxtok train skipdecode
    jaxtok train skipdecode --start RUN      # begins with the parameters of a run of LanguageModeling of the same sizes
    jaxtok eval skipdecode
    jaxtok generate skipdecode --prompt "def " --max-new-tokens 96

Five of eight layers run for the first 64 bytes of a row; then their number falls to 3 while 96 more bytes follow. The
loss counts these only. skipdecode_study has the comparison with other ways to run fewer layers.
"""

from jaxtok.data.text import TextData
from jaxtok.decoding.skipdecode import Schedule
from jaxtok.lm.llama import LlamaConfig
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.transfer.skipdecode import SkipDecoding, SkipLayers

schedule = Schedule(max_layers=5, min_layers=3, warmup=1, prompt=64, length=160)

config = Experiment(
    name="skipdecode",
    task=SkipDecoding(
        model=LlamaConfig(num_layers=8, d_model=96, num_heads=4, mlp_dim=256, max_length=1024, vocab_size=384),
        schedule=schedule,
    ),
    data=TextData(length=160, batch_size=12, isolate_documents=False, eval_limit=16),
    train=TrainConfig(
        steps=400,
        log_every=20,
        eval_every=200,
        checkpoint_every=200,
        optimizer=OptimizerConfig(learning_rate=2e-3, min_learning_rate=2e-4, warmup=0.05),
    ),
    start=SkipLayers(schedule=schedule),
)
