"""Anomaly detectors on frozen features, one file each."""
