"""The curvature of a loss around given parameters.

Small models: `hessian` and `jacobian`, exact, in chunks. Any size: an `operator` (Hessian,
Gauss-Newton, empirical Fisher, averaged over the batches of a data set), and `top_eigenpairs`,
`spectral_density` and `trace` from its products; also `noise_scale` and `sharpness`. Operators add,
scale, invert and have submatrices; `kfac_operator` and `decompose` give known eigenvectors.
"""

from jdl.curvature.dense import hessian, jacobian
from jdl.curvature.density import Density, spectral_density
from jdl.curvature.hutchinson import Trace, trace
from jdl.curvature.kronecker import kfac_operator
from jdl.curvature.lanczos import Eigenpairs, top_eigenpairs
from jdl.curvature.landscape import Landscape
from jdl.curvature.laplace import Laplace
from jdl.curvature.neighborhood import Sharpness, sharpness
from jdl.curvature.noise import NoiseScale, noise_scale
from jdl.curvature.operators import Operator, operator
from jdl.curvature.spectral import SpectralOperator, decompose
from jdl.curvature.surface import connect, filter_normalized, loss_plane
from jdl.curvature.tracking import SharpnessTracker, preconditioned

__all__ = [
    "Density",
    "Eigenpairs",
    "Landscape",
    "Laplace",
    "NoiseScale",
    "Operator",
    "Sharpness",
    "SharpnessTracker",
    "SpectralOperator",
    "Trace",
    "connect",
    "decompose",
    "filter_normalized",
    "hessian",
    "jacobian",
    "kfac_operator",
    "loss_plane",
    "noise_scale",
    "operator",
    "preconditioned",
    "sharpness",
    "spectral_density",
    "top_eigenpairs",
    "trace",
]
