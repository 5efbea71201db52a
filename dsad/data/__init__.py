"""Data sets, their checks and the input pipeline: numpy only, never device arrays."""
