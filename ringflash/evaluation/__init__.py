"""Evaluation of models on long contexts.

needle       needle in a haystack, from the command line
harness      lm-eval's tasks
"""
