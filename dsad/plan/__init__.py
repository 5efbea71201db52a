"""What a training step or a batch of an evaluation costs on accelerators that need not be there."""
