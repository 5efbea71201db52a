"""Miniature map wrappers, one file each."""
