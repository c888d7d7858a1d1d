"""`nn.LSTM`, `nn.GRU` and `nn.RNN` with fake-quantized weights, inputs and hidden states.

A part is one weight of one layer and direction: ``weight_ih_l0`` multiplies the input and ``weight_hh_l0`` the hidden
state. Each contains the rows of all gates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from qatkit.quantization.parts import QATParts

State = tuple[Tensor, ...]
"""Hidden state, and the cell state of an LSTM, each ``[batch, width]``."""


class QATRecurrent(QATParts, nn.RNNBase):
    """Base class of recurrent layers with fake-quantized weights for all gates.

    With weight-only quantization, torch's own kernels run with the fake-quantized weights. With quantized inputs and
    hidden states, steps run one at a time, because the hidden state is quantized before each product. Biases are added
    in floating point.
    """

    kind = "recurrent layers"

    def part_names(self) -> tuple[str, ...]:
        return tuple(name for name in self._flat_weights_names if name.startswith("weight"))

    def parameter(self, part: str) -> Tensor | None:
        weight: Tensor = getattr(self, part)
        return weight

    def matrix(self, part: str) -> Tensor:
        weight: Tensor = getattr(self, part)
        return weight

    def shipped(self) -> dict[str, Tensor]:
        return {part: self.with_scale(part)[0] for part in self.part_names()}

    def _update_flat_weights(self) -> None:
        """Keep the fake-quantized weights of `forward`: torch would replace them by the parameters."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        if any(self.input_quantizer(part) is not None for part in self.part_names()):
            return self._stepwise(input, hx)
        latent = self._flat_weights
        self._flat_weights = [
            self.with_scale(name)[0] if name.startswith("weight") else getattr(self, name)
            for name in self._flat_weights_names
        ]
        try:
            return super().forward(input, hx)  # the class that was swapped comes next
        finally:
            self._flat_weights = latent

    def _stepwise(self, input: Tensor | PackedSequence, hx: Any) -> tuple[Tensor | PackedSequence, Any]:
        """Compute as torch does, with the input of every product quantized."""
        lengths, packed = None, input if isinstance(input, PackedSequence) else None
        if packed is not None:
            x, lengths = pad_packed_sequence(packed)  # [time, batch, width], in the caller's order of the batch
        else:
            assert isinstance(input, Tensor)
            x = input
        batched = x.dim() == 3
        x = x if batched else x.unsqueeze(1)
        if batched and packed is None and self.batch_first:
            x = x.transpose(0, 1)
        states = self._initial(x, hx, batched)
        directions = 2 if self.bidirectional else 1
        last: list[State] = []
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                suffix = f"l{layer}{'_reverse' if direction else ''}"
                out, state = self._run(suffix, x, states[layer * directions + direction], lengths, bool(direction))
                outputs.append(out)
                last.append(state)
            x = torch.cat(outputs, dim=-1)
            if layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        final = [torch.stack(parts) for parts in zip(*last, strict=True)]
        hidden = [state if batched else state.squeeze(1) for state in final]
        result: Tensor | PackedSequence = x
        if packed is not None:
            assert lengths is not None
            result = pack_padded_sequence(x, lengths, enforce_sorted=packed.sorted_indices is None)
        elif not batched:
            result = x.squeeze(1)
        elif self.batch_first:
            result = x.transpose(0, 1)
        return result, tuple(hidden) if self.mode == "LSTM" else hidden[0]

    def _initial(self, x: Tensor, hx: Any, batched: bool) -> list[State]:
        """Return the first state of every layer and direction."""
        runs = self.num_layers * (2 if self.bidirectional else 1)
        widths = (self.proj_size or self.hidden_size, self.hidden_size)[: 2 if self.mode == "LSTM" else 1]
        if hx is None:
            given = [x.new_zeros(runs, x.shape[1], width) for width in widths]
        else:
            given = list(hx) if self.mode == "LSTM" else [hx]
            given = given if batched else [state.unsqueeze(1) for state in given]
            for state, width in zip(given, widths, strict=True):
                if state.shape != (runs, x.shape[1], width):
                    raise RuntimeError(f"Expected hidden size {(runs, x.shape[1], width)}, got {list(state.shape)}")
        return list(zip(*(state.unbind() for state in given), strict=True))

    def _run(
        self, suffix: str, x: Tensor, state: State, lengths: Tensor | None, backwards: bool
    ) -> tuple[Tensor, State]:
        """Run one layer in one direction over ``[time, batch, width]``."""
        from_input = self._product(f"ih_{suffix}")(x)
        product = self._product(f"hh_{suffix}")
        project = self._product(f"hr_{suffix}") if self.proj_size else None
        outputs: list[Tensor] = [x] * len(x)
        for time in reversed(range(len(x))) if backwards else range(len(x)):
            following = next_state(self.mode, from_input[time], product(state[0]), state)
            if project is not None:
                following = (project(following[0]), *following[1:])
            if lengths is not None:  # a sequence that is over, or not begun backwards, keeps its state
                runs = (time < lengths).to(x.device).unsqueeze(1)
                following = tuple(torch.where(runs, new, old) for new, old in zip(following, state, strict=True))
            outputs[time], state = following[0], following
        return torch.stack(outputs), state

    def _product(self, name: str) -> Callable[[Tensor], Tensor]:
        """Return the product with one weight, which is quantized once for all steps."""
        weight, bias = self.with_scale(f"weight_{name}")[0], getattr(self, f"bias_{name}", None)
        inputs = self.input_quantizer(f"weight_{name}")
        return lambda x: F.linear(x if inputs is None else inputs(x), weight, bias)


def next_state(mode: str, from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    """Compute one step of a cell (equations of torch's `nn.LSTM`, `nn.GRU` and `nn.RNN`).

    Args:
        mode: torch's name of the cell.
        from_input: Product of the input and its weights, with the bias, ``[batch, gates * hidden]``.
        from_hidden: Product of the hidden state and its weights, with the bias, in the same shape.
        state: The state before the step.
    """
    if mode == "LSTM":
        i, f, g, o = (from_input + from_hidden).chunk(4, dim=-1)
        cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell
    if mode == "GRU":
        (r, z, n), (hr, hz, hn) = from_input.chunk(3, dim=-1), from_hidden.chunk(3, dim=-1)
        new, update = (n + (r + hr).sigmoid() * hn).tanh(), (z + hz).sigmoid()
        return ((1 - update) * new + update * state[0],)
    total = from_input + from_hidden
    return (total.tanh() if mode == "RNN_TANH" else total.relu(),)


class QATLSTM(QATRecurrent, nn.LSTM):
    """`nn.LSTM` with fake-quantized weights, inputs and hidden states."""


class QATGRU(QATRecurrent, nn.GRU):
    """`nn.GRU` with fake-quantized weights, inputs and hidden states."""


class QATRNN(QATRecurrent, nn.RNN):
    """`nn.RNN` with fake-quantized weights, inputs and hidden states."""
