"""Attention over several devices: the plan of a step, the transport between ranks, and the hops."""
