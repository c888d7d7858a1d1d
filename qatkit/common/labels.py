"""The label that marks ignored positions."""

IGNORED = -100
"""The label of a position that counts neither in a loss nor in a metric, as in `torch.nn.functional.cross_entropy`."""
