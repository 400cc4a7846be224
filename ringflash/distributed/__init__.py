"""The ranks of a program: training, generating and evaluating start on them in the same way.

launcher           what torchrun, deepspeed or Slurm says about this rank
parallel           the settings of context parallelism: the grid of ring, Ulysses and replicas, and the layouts
world              the ranks, connected
without_timeout    work that takes some ranks hours while the others wait
failure            how a program fails: one line, from one rank
"""
