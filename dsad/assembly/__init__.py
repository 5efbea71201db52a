"""Joins the floors without a command line: runs from configs, opened runs, evaluations."""
