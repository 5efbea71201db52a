"""Pure array functions: geometry, similarity, neighbour search."""
