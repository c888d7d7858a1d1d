"""Tasks: the loss, the predictions and the metrics of a model on a batch; see `qatkit.tasks.table`.

A pair ``(inputs, labels)`` is treated as a classification batch unless the data declares another task. A mapping in the
format of transformers models has

- one label per sequence ``[batch]`` for text classification;
- one label per token ``[batch, tokens]`` for language modeling: the same IDs as the inputs for next-token prediction
  or, with ``"task": "masked"``, the masked tokens;
- one mapping with boxes per image for object detection;
- ``"task": "pairs"`` for embeddings, where each text is trained to be closer to its own partner than to the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qatkit.common.lazy import lazy_exports

if TYPE_CHECKING:
    from qatkit.tasks.batches import agree as agree
    from qatkit.tasks.batches import answers as answers
    from qatkit.tasks.batches import call as call
    from qatkit.tasks.batches import counted_loss as counted_loss
    from qatkit.tasks.batches import mean_loss as mean_loss
    from qatkit.tasks.batches import model_inputs as model_inputs
    from qatkit.tasks.batches import one_sample as one_sample
    from qatkit.tasks.batches import row_loss as row_loss
    from qatkit.tasks.batches import to_logits as to_logits
    from qatkit.tasks.batches import token_loss as token_loss
    from qatkit.tasks.inputs import InputCheck as InputCheck
    from qatkit.tasks.metrics import METRICS as METRICS
    from qatkit.tasks.metrics import Metric as Metric
    from qatkit.tasks.scores import Scores as Scores
    from qatkit.tasks.scores import evaluate as evaluate
    from qatkit.tasks.scores import perplexity as perplexity
    from qatkit.tasks.table import TASKS as TASKS
    from qatkit.tasks.table import Task as Task
    from qatkit.tasks.table import declared_task as declared_task
    from qatkit.tasks.table import task_of as task_of

_HOMES = {
    "qatkit.tasks.batches": [
        "agree",
        "answers",
        "call",
        "counted_loss",
        "mean_loss",
        "model_inputs",
        "one_sample",
        "row_loss",
        "to_logits",
        "token_loss",
    ],
    "qatkit.tasks.inputs": ["InputCheck"],
    "qatkit.tasks.metrics": ["METRICS", "Metric"],
    "qatkit.tasks.scores": ["Scores", "evaluate", "perplexity"],
    "qatkit.tasks.table": ["TASKS", "Task", "declared_task", "task_of"],
}
__all__, __getattr__, __dir__ = lazy_exports(__name__, _HOMES)  # lazy_exports returns a list
