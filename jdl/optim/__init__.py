"""Second-order optimizers, each an optax transformation, and every optimizer by name.

Each module is named after its function. They are imported here at once: an import of the module
later on would put it in the place of the function.
"""

from jdl.optim.hessian_free import hessian_free as hessian_free
from jdl.optim.lbfgs import lbfgs as lbfgs
from jdl.optim.newton import newton as newton
from jdl.optim.nonlinear_cg import nonlinear_cg as nonlinear_cg
from jdl.optim.registry import by_name as by_name

__all__ = ["by_name", "hessian_free", "lbfgs", "newton", "nonlinear_cg"]
