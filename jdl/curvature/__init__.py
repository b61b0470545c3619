"""Instruments for curvature: what a loss looks like around given parameters.

Small models: `hessian` and `jacobian`, exact, in chunks. Any size: an `operator` (Hessian,
Gauss-Newton, empirical Fisher; averaged over the batches of a data set) and what its products tell:
`top_eigenpairs`, `spectral_density`, `trace`; besides `noise_scale` and `sharpness`.
"""

from jdl.curvature.dense import hessian as hessian
from jdl.curvature.dense import jacobian as jacobian
from jdl.curvature.density import Density as Density
from jdl.curvature.density import spectral_density as spectral_density
from jdl.curvature.lanczos import Eigenpairs as Eigenpairs
from jdl.curvature.lanczos import top_eigenpairs as top_eigenpairs
from jdl.curvature.landscape import Landscape as Landscape
from jdl.curvature.noise import NoiseScale as NoiseScale
from jdl.curvature.noise import noise_scale as noise_scale
from jdl.curvature.operators import Operator as Operator
from jdl.curvature.operators import operator as operator
from jdl.curvature.sharpness import Sharpness as Sharpness
from jdl.curvature.sharpness import sharpness as sharpness
from jdl.curvature.trace import Trace as Trace
from jdl.curvature.trace import trace as trace

__all__ = [
    "Density",
    "Eigenpairs",
    "Landscape",
    "NoiseScale",
    "Operator",
    "Sharpness",
    "Trace",
    "hessian",
    "jacobian",
    "noise_scale",
    "operator",
    "sharpness",
    "spectral_density",
    "top_eigenpairs",
    "trace",
]
