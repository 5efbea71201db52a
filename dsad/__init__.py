"""dsad: dense pretraining and localization for industrial anomaly detection, in JAX.

    model = dsad.fit("photos/good", backbone="resnet18", weights="resnet18.npz")
    model.save("models/mine")
    prediction = dsad.load("models/mine").predict("photos/new.jpg")

All names are those of ``dsad.assembly.api``, imported when they are first asked for: the package
imports nothing heavy by itself. Faults of input are a ``DsadError``, whose message says what to do.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["DsadError", "FittedModel", "Prediction", "evaluate", "fit", "load", "pretrain"]

if TYPE_CHECKING:
    from dsad.assembly.api import (
        DsadError,
        FittedModel,
        Prediction,
        evaluate,
        fit,
        load,
        pretrain,
    )
else:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from dsad.assembly import api

        return getattr(api, name)
