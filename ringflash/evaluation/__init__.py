"""Evaluation of models on long contexts."""
