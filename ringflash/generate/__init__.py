"""Answering prompts on a long document, and what other commands that read long text share with that.

__main__            python -m ringflash.generate
answers, turn       reading the document and answering the prompts; the chat template around them
command, settings   commands: run on ranks; their settings of key=value
loading             the text of a file; a model, its tokenizer and cache, from folders
"""
