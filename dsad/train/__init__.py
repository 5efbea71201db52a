"""State, step, loop, optimiser, checkpoints and metric files."""
