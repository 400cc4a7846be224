"""Checkpoints of a run.

checkpoint       when they are written and kept, saving, and resuming from the newest intact one
manifest         the files of each, and their digests
compatibility    the settings that a resumed run may change
reshard          loading on another number of ranks, or at another ZeRO stage
"""
