"""Evaluation of models on long contexts.

haystack     needle in a haystack: what is hidden, and what counts as found
needle       the same, from the command line
harness      lm-eval's tasks
"""
