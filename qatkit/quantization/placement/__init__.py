"""Where activations are quantized, so that a runtime computes with integers: found from one forward pass, and placed."""
