"""What a step of a config costs on accelerators that need not be there: memory, time, traffic."""
