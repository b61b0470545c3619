r"""Kronecker-factored curvature, for `kfac` and for `hessian_free(preconditioner="kronecker")`.

From a model to a step, in this order:

- `layers`: which parameters are layers; `recognize`: by which products, `views`: through which
  changes of layout, `tags`: or as declared; `blocks`: their normal form
- `output_hessian`: random vectors to pull back through the model; `probes`: what a layer gathers on
  the way; `moments`: both, over a batch
- `factors`: running means of the moments, their inverses applied to a gradient; `inverses`
- `cg_preconditioner`: the factors as a preconditioner
- `summary`: `describe`, what was found, in words
"""

from jdl.optim.kronecker.cg_preconditioner import preconditioner as preconditioner
from jdl.optim.kronecker.factors import told as told
from jdl.optim.kronecker.summary import describe as describe
from jdl.optim.kronecker.tags import tag_conv as tag_conv
from jdl.optim.kronecker.tags import tag_dense as tag_dense
