"""Optimizers under DeepSpeed.

config           the settings of optim
learning_rate    the schedules
build            AdamW or SGD for a model: parameter groups, clipping, skipped steps
split_adamw      memory.optimizer_states=bf16: fp32 master weights as two 16-bit halves
host_adamw       memory.optimizer_states=host: fp32 states in host memory, streamed through the GPU
one_rank         on one GPU, both update the weights in place, without flat copies
"""
