"""Exempt learned scales from weight decay, regardless of the optimizer's parameter groups."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from qatkit.quantization.prepare import fake_quantizers


class DecayExemption:
    """Move learned scales and offsets out of parameter groups with weight decay during one optimizer step.

    Weight decay would pull scales toward zero and thereby shrink the quantization range. Between steps, the groups are
    unchanged, so learning-rate schedulers and optimizer checkpoints are not affected.
    """

    def __init__(self) -> None:
        self._whole: list[tuple[dict[str, Any], list[nn.Parameter]]] = []
        self._apart: list[dict[str, Any]] = []
        self._optimizer: Optimizer | None = None
        self._hook: RemovableHandle | None = None

    def split(self, optimizer: Optimizer, module: LightningModule) -> None:
        """Move the scales of `module` into groups without decay; call it before the step.

        The first call moves the scales of all callbacks; later calls do nothing.
        """
        self.join()
        decaying = [group for group in optimizer.param_groups if group.get("weight_decay")]
        if not decaying:
            return
        scales = {id(learned) for _, fq in fake_quantizers(module) for learned in fq.parameters(recurse=False)}
        for group in decaying:
            inside = [parameter for parameter in group["params"] if id(parameter) in scales]
            if inside:
                self._whole.append((group, group["params"]))
                self._apart.append({**group, "params": inside, "weight_decay": 0.0})
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in scales]
        if self._whole:
            optimizer.param_groups.extend(self._apart)
            self._optimizer = optimizer
            self._hook = optimizer.register_step_post_hook(lambda *_: self.join())

    def join(self) -> None:
        """Restore the groups after the step, even if the step was skipped. Further calls do nothing."""
        if self._optimizer is None:
            return
        for group, parameters in self._whole:
            group["params"] = parameters
        apart = {id(group) for group in self._apart}
        self._optimizer.param_groups[:] = [g for g in self._optimizer.param_groups if id(g) not in apart]
        self._whole, self._apart, self._optimizer = [], [], None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
