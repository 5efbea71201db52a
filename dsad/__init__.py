"""dsad: dense pretraining and localization for industrial anomaly detection, in JAX.

The package imports nothing heavy by itself; import the part you need, for example
``from dsad.models import backbone``.
"""

__version__ = "0.1.0"
