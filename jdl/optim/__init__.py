"""Second-order optimizers, SOAP, Shampoo and Muon as optax transformations; all by name.

Each optimizer is a file of its name. `transformation` is their common skeleton, `context` the
arguments of an update, `kronecker` the factors of K-FAC. The modules are all imported here, since
importing one later would replace the function of the same name.
"""

from jdl.optim.bfgs import bfgs as bfgs
from jdl.optim.gauss_newton import gauss_newton as gauss_newton
from jdl.optim.hessian_free import hessian_free as hessian_free
from jdl.optim.kfac import kfac as kfac
from jdl.optim.kfac import kfac_for as kfac_for
from jdl.optim.lbfgs import lbfgs as lbfgs
from jdl.optim.levenberg_marquardt import levenberg_marquardt as levenberg_marquardt
from jdl.optim.muon import muon as muon
from jdl.optim.natural_gradient import natural_gradient as natural_gradient
from jdl.optim.newton import newton as newton
from jdl.optim.nonlinear_cg import nonlinear_cg as nonlinear_cg
from jdl.optim.registry import by_name as by_name
from jdl.optim.residuals import Residuals as Residuals
from jdl.optim.shampoo import shampoo as shampoo
from jdl.optim.soap import soap as soap

__all__ = [
    "Residuals",
    "bfgs",
    "by_name",
    "gauss_newton",
    "hessian_free",
    "kfac",
    "kfac_for",
    "lbfgs",
    "levenberg_marquardt",
    "muon",
    "natural_gradient",
    "newton",
    "nonlinear_cg",
    "shampoo",
    "soap",
]
