"""Settings of every test."""

import torch

# One thread: tiny tensors are slower on several, and sums are the same on every machine.
torch.set_num_threads(1)
