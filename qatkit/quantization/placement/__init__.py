"""Which activations are quantized, so that a runtime computes with integers: found in one forward pass, and placed."""
