"""The operators: registration, autograd, and the choice between the two backends.

`registration` holds what they share, `backend` which backend serves, `losses` and `scores` the operators themselves.
Eager calls go straight through a `torch.autograd.Function` (the dispatcher costs a registered operator some 30
microseconds a call); under `torch.compile`, export and for tensor subclasses the same functions run as operators of the
library `ood_fast`, `torch.ops.ood_fast.elogitnorm` and so on. The gradient formula of both is one and the same code.
"""

from . import losses, scores
from .backend import BACKENDS, backend_name, has_triton, use_backend

__all__ = ["BACKENDS", "backend_name", "has_triton", "losses", "scores", "use_backend"]
