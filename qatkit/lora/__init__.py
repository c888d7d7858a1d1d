"""Low-rank adapters: attached through peft, or inside the weight where it is rounded or sparse; merged without loss."""
