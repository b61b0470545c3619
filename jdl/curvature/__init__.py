"""The curvature of a loss around given parameters.

Small models: `hessian` and `jacobian`, exact, in chunks. Any size: an `operator` (Hessian,
Gauss-Newton, empirical Fisher, averaged over the batches of a data set), and `top_eigenpairs`,
`spectral_density` and `trace` from its products; also `noise_scale` and `sharpness`.
"""

from jdl.curvature.dense import hessian as hessian
from jdl.curvature.dense import jacobian as jacobian
from jdl.curvature.density import Density as Density
from jdl.curvature.density import spectral_density as spectral_density
from jdl.curvature.hutchinson import Trace as Trace
from jdl.curvature.hutchinson import trace as trace
from jdl.curvature.lanczos import Eigenpairs as Eigenpairs
from jdl.curvature.lanczos import top_eigenpairs as top_eigenpairs
from jdl.curvature.landscape import Landscape as Landscape
from jdl.curvature.neighborhood import Sharpness as Sharpness
from jdl.curvature.neighborhood import sharpness as sharpness
from jdl.curvature.noise import NoiseScale as NoiseScale
from jdl.curvature.noise import noise_scale as noise_scale
from jdl.curvature.operators import Operator as Operator
from jdl.curvature.operators import operator as operator

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
