"""Networks, their functional form and published weights. The only package that knows Flax."""

from dsad.models.backbone import Backbone, backbone

__all__ = ["Backbone", "backbone"]
