"""Types, errors, configuration, keys and mesh: what every other package may import."""
