"""Views on the device: pure JAX, per-sample keys, fixed shapes."""
