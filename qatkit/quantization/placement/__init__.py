"""Find the activations to quantize so that a runtime computes with integers, and place their quantizers."""
