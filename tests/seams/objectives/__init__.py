"""Miniature methods, one file each, that show what the seams of an objective carry."""
