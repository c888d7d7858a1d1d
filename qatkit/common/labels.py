"""The label that marks ignored positions."""

IGNORED = -100
"""The label of a position that losses and metrics ignore, as in `torch.nn.functional.cross_entropy`."""
