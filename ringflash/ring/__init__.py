"""Attention over several devices: the plan of a step, the transport between ranks, and the hops.

attention                       ring_attention: autograd around a forward and a backward
plan, routes, ranges            once per step: what each hop computes, and which keys and gradients are sent
key_hops                        whose keys a hop brings, and where they lie in a buffer
schedule, compiler              once per shape of layers: the steps of both passes, and how they follow from a plan
execution, passes, streams      once per layer: run the steps, on one or two CUDA streams
transport, copy_engine          the ring between processes, by NCCL, gloo or copy engines, or within one process
message                         what ranks send to each other
collectives                     whether all ranks were given the same; all ranks' tensors
watchdog, heartbeat             how long ranks wait, and which rank a hang waits for
cost, simulation                predicted times, by which layouts and Ulysses ranks are chosen
ulysses, heads, sequences       exchanges of tokens for heads; whole sequences for layers with a recurrence
recompute                       attention results that checkpointed layers keep
decode, cache_plan              generation over a KV cache that the ranks share
checks                          what ring_attention refuses
"""
