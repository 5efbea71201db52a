"""Metrics, the localization run, the protocol stamp and the report."""
