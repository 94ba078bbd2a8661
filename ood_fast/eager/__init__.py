"""The analytic forward and backward passes in plain PyTorch: the path of CPUs, of devices without Triton, of float64.

The notation, the formulas and the files are those of `ood_fast.kernels` (see `kernels/README.md`), which offers the
same functions; `ood_fast.ops` chooses between the two, and has checked shapes, dtypes and devices before anything here
runs, and n >= 1.

What is worth knowing before reading:

- Rows are worked in chunks that stay in a core's cache, so the temporaries of a batch are a few megabytes whatever n
  is.
- The gaps g_j = f_p - f_j carry the whole computation: softmax is shift-invariant, so exp(-g_j / T) needs no second
  maximum.
- Most batches have no masked class, no coincident rows and no tied row. Whether that is so falls out of the distances
  themselves (`rows.is_plain`), and only the other batches pay for the `where`s.
- Nothing autograd records is run: every function is called below autograd, and returns gradients in closed form.
"""

from .boundary import boundary_distance_backward, boundary_distance_forward
from .distances import distance_table
from .linear import linear_elogitnorm
from .nci import nci_backward, nci_forward
from .precision import compute_dtype
from .shards import shard_affine, shard_boundary_sums, shard_distances, shard_gradients, shard_pull, shard_softmax_sums
from .statistics import row_statistics
from .tempered import elogitnorm_backward, elogitnorm_forward, logitnorm_backward, logitnorm_forward

__all__ = ["boundary_distance_backward", "boundary_distance_forward", "compute_dtype", "distance_table"]
__all__ += ["elogitnorm_backward", "elogitnorm_forward", "linear_elogitnorm", "logitnorm_backward"]
__all__ += ["logitnorm_forward", "nci_backward", "nci_forward", "row_statistics", "shard_affine"]
__all__ += ["shard_boundary_sums", "shard_distances", "shard_gradients", "shard_pull", "shard_softmax_sums"]
