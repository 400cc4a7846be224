"""Fused elementwise passes: what a layer does between its matrix products and its attention, in one kernel each.

    norm                 RMSNorm, with the addition to the residual stream before it
    rotary               rotary positions of queries or keys, with the RMSNorm of each head before them
    gated                act(gate) * up of a gated MLP
    gated_norm           RMSNorm of x silu(gate), in groups of channels, of Mamba-2 layers
    cross_entropy        losses of a tile of logits, and their gradient in place of them
    float8               casts of operands to 8 bits, by rows and by columns
    adamw                the optimizer's step on weights that are kept as two 16-bit halves
    launch               what the launches share

Each reads its inputs once, computes in fp32 and rounds once. PyTorch runs the same as 4 to 15 passes over memory, most
of them in fp32. All are Triton kernels with their own backward; `models.fused` puts them into a model.
"""
