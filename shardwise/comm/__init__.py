"""Communication between ranks. Importing this package does not import torch.

`base.Communicator` is the one meaning; `create()` in `strategy.py` picks a transport for it.
"""
