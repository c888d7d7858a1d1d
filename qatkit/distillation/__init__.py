"""Knowledge distillation: losses, live and cached teachers, student construction, and generated training data.

Losses are functions of tensors for any training loop; `qatkit.callbacks.KnowledgeDistillation` adds them to a
LightningModule. Importing the package is cheap: each name loads its module on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qatkit.common.lazy import lazy_exports

if TYPE_CHECKING:
    from qatkit.distillation.cache import CachedTeacher as CachedTeacher
    from qatkit.distillation.cache import cache_teacher as cache_teacher
    from qatkit.distillation.cache import model_hash as model_hash
    from qatkit.distillation.chunked import linear_kd_loss as linear_kd_loss
    from qatkit.distillation.divergences import DIVERGENCES as DIVERGENCES
    from qatkit.distillation.features import Projections as Projections
    from qatkit.distillation.features import attention_transfer_loss as attention_transfer_loss
    from qatkit.distillation.features import hidden_cosine_loss as hidden_cosine_loss
    from qatkit.distillation.features import hidden_mse_loss as hidden_mse_loss
    from qatkit.distillation.features import layer_map as layer_map
    from qatkit.distillation.features import relation_loss as relation_loss
    from qatkit.distillation.losses import jsd_loss as jsd_loss
    from qatkit.distillation.losses import kd_loss as kd_loss
    from qatkit.distillation.losses import mse_loss as mse_loss
    from qatkit.distillation.losses import reverse_kl_loss as reverse_kl_loss
    from qatkit.distillation.sparse import sparse_kd_loss as sparse_kd_loss
    from qatkit.distillation.sparse import top_k_kd_loss as top_k_kd_loss
    from qatkit.distillation.sparse import top_k_log_probabilities as top_k_log_probabilities
    from qatkit.distillation.students import student_from_teacher as student_from_teacher
    from qatkit.distillation.teacher import Teacher as Teacher
    from qatkit.distillation.vocabulary import shared_vocab_size as shared_vocab_size
    from qatkit.distillation.vocabulary import trim_to_vocabulary as trim_to_vocabulary

_HOMES = {
    "qatkit.distillation.cache": ["CachedTeacher", "cache_teacher", "model_hash"],
    "qatkit.distillation.chunked": ["linear_kd_loss"],
    "qatkit.distillation.divergences": ["DIVERGENCES"],
    "qatkit.distillation.features": [
        "Projections", "attention_transfer_loss", "hidden_cosine_loss", "hidden_mse_loss", "layer_map", "relation_loss",
    ],
    "qatkit.distillation.losses": ["jsd_loss", "kd_loss", "mse_loss", "reverse_kl_loss"],
    "qatkit.distillation.sparse": ["sparse_kd_loss", "top_k_kd_loss", "top_k_log_probabilities"],
    "qatkit.distillation.students": ["student_from_teacher"],
    "qatkit.distillation.teacher": ["Teacher"],
    "qatkit.distillation.vocabulary": ["shared_vocab_size", "trim_to_vocabulary"],
}  # fmt: skip
__all__, __getattr__, __dir__ = lazy_exports(__name__, _HOMES)  # lazy_exports returns a list
