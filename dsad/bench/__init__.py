"""Speed and memory, side by side with the peers that are installed: one module a topic."""
