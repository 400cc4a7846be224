"""Training on pairs of a chosen and a rejected answer, such as DPO.

formulas          the losses, each from the log-probabilities of both answers
preference_loss   their gradients, from hidden states that are spread over the ranks of a sequence
reference         the file of the reference's log-probabilities
reference_pass    the pass before training that computes them
"""
