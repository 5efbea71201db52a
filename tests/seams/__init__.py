"""Miniature methods, one file each, that show what the seams carry."""
