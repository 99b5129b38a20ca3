"""Training: data, loss, optimiser, one step for one device or many, checkpoints, and the loop that joins them.

Training knows loss functions and pytrees of parameters, not models.
"""

from jaxattn.train.checkpoint import Checkpoints, Loaded, Restored, check_config, load
from jaxattn.train.data import (
    BOS,
    EOS,
    VOCABULARY,
    Document,
    Drawn,
    Windows,
    decode,
    encode,
    read_documents,
    split,
    standard_library,
)
from jaxattn.train.hooks import csv_log, tensorboard_log
from jaxattn.train.language import (
    imitation_loss,
    language_loss,
    masked_language_loss,
    module_loss,
    sequence_loss,
    with_params,
)
from jaxattn.train.loop import Result, TrainConfig, fit
from jaxattn.train.losses import (
    bits_per_byte,
    classification_loss,
    contrastive_loss,
    distillation_loss,
    hidden_loss,
    next_token_loss,
    squared_error_loss,
)
from jaxattn.train.optimizer import (
    OptimizerConfig,
    decay_mask,
    evaluation_params,
    learning_rate,
    loss_scaling,
    make_optimizer,
    parameter_roles,
)
from jaxattn.train.sources import Batched, batches, ordered_batches, packed
from jaxattn.train.step import (
    State,
    batch_shardings,
    data_mesh,
    init_state,
    make_evaluation,
    make_step,
    on_mesh,
    on_one_device,
    on_pmap,
    repeated,
)
from jaxattn.train.tasks import drawn, prompt_loss
from jaxattn.train.tokenizer import Tokenizer

__all__ = [
    "BOS",
    "EOS",
    "VOCABULARY",
    "Batched",
    "Checkpoints",
    "Document",
    "Drawn",
    "Loaded",
    "OptimizerConfig",
    "Restored",
    "Result",
    "State",
    "Tokenizer",
    "TrainConfig",
    "Windows",
    "batch_shardings",
    "batches",
    "bits_per_byte",
    "check_config",
    "classification_loss",
    "contrastive_loss",
    "csv_log",
    "data_mesh",
    "decay_mask",
    "decode",
    "distillation_loss",
    "drawn",
    "encode",
    "evaluation_params",
    "fit",
    "hidden_loss",
    "imitation_loss",
    "init_state",
    "language_loss",
    "learning_rate",
    "load",
    "loss_scaling",
    "make_evaluation",
    "make_optimizer",
    "make_step",
    "masked_language_loss",
    "module_loss",
    "next_token_loss",
    "on_mesh",
    "on_one_device",
    "on_pmap",
    "ordered_batches",
    "packed",
    "parameter_roles",
    "prompt_loss",
    "read_documents",
    "repeated",
    "sequence_loss",
    "split",
    "squared_error_loss",
    "standard_library",
    "tensorboard_log",
    "with_params",
]
