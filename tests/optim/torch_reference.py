"""Writes `torch_reference.json`: ten steps of PyTorch's implementations on frozen gradients.

In an environment with torch, and with the files of their authors that are not in torch:

    git clone https://github.com/nikhilvyas/SOAP && git -C SOAP checkout a1e5535
    git clone https://github.com/facebookresearch/optimizers && git -C optimizers checkout f606606
    PYTHONPATH=optimizers python tests/optim/torch_reference.py SOAP/soap.py \
        > tests/optim/torch_reference.json

SOAP's casts factors to float32, which is left out here: the numbers are float64's.
"""

import functools
import inspect
import json
import math
import sys
from pathlib import Path

import distributed_shampoo as fb
import numpy as np
import torch
from distributed_shampoo.preconditioner import shampoo_preconditioner_list as fb_lists
from torch.optim import _muon

STEPS = 10
SHAPES = {"square": (3, 3), "another": (3, 3), "wide": (2, 4), "vector": (2,)}
SOAP = {"lr": 0.03, "betas": [0.9, 0.97], "shampoo_beta": 0.8, "weight_decay": 0.1,
        "precondition_frequency": 3, "max_precond_dim": 3}  # fmt: skip
MUON = {"lr": 0.03, "momentum": 0.9, "nesterov": False, "weight_decay": 0.1, "eps": 1e-30}
# In our names; theirs holds the rate in float32, in which this one is exact.
SHAMPOO = {
    "adam": {"exponent": 0.25, "grafting": "adam"},
    "adagrad": {"exponent": 0.25, "grafting": "adagrad", "shampoo_beta": 1.0, "b1": 0.0},
    "rmsprop": {"exponent": 0.5, "grafting": "rmsprop", "precondition_every": 1},
    "sgd": {"exponent": 0.5, "grafting": "sgd"},
    "none": {"exponent": 0.25, "grafting": None, "shampoo_beta": 1.0},
    "one_sided": {"exponent": 0.5, "grafting": "adam", "one_sided": True},
    "kl": {"exponent": 0.5, "grafting": None, "kl": True},
}
SHAMPOO_DEFAULTS = {"learning_rate": 0.03125, "b1": 0.9, "b2": 0.97, "shampoo_beta": 0.8,
                    "eps": 1e-8, "factors_eps": 1e-3, "weight_decay": 0.1,
                    "precondition_every": 3}  # fmt: skip


def run(make, gradients, start):
    """The parameters after each step."""
    params = {k: torch.nn.Parameter(torch.tensor(x)) for k, x in start.items()}
    optimizer = make(list(params.values()))
    for gradient in gradients:
        for k, p in params.items():
            p.grad = torch.tensor(gradient[k])
        optimizer.step()
    return {k: p.detach().tolist() for k, p in params.items()}


def shampoo(params, exponent, grafting, kl=False, one_sided=False, **options):
    o = {**SHAMPOO_DEFAULTS, **options}
    grafts = {
        "adam": lambda: fb.AdamPreconditionerConfig(beta2=o["b2"], epsilon=o["eps"]),
        "rmsprop": lambda: fb.RMSpropPreconditionerConfig(beta2=o["b2"], epsilon=o["eps"]),
        "adagrad": lambda: fb.AdaGradPreconditionerConfig(epsilon=o["eps"]),
        "sgd": fb.SGDPreconditionerConfig,
        None: lambda: None,
    }
    config = (
        fb.RootInvKLShampooPreconditionerConfig if kl else fb.RootInvShampooPreconditionerConfig
    )
    return fb.DistributedShampoo(
        params,
        lr=o["learning_rate"],
        betas=(o["b1"], o["shampoo_beta"]),
        epsilon=o["factors_eps"],
        weight_decay=o["weight_decay"],
        precondition_frequency=o["precondition_every"],
        grafting_config=grafts[grafting](),
        distributed_config=fb.SingleDeviceDistributedConfig(
            target_parameter_dimensionality=math.inf
        ),
        preconditioner_config=config(
            factor_matrix_dtype=torch.float64,
            inv_factor_matrix_dtype=torch.float64,
            inverse_exponent_override={2: {0: exponent, 1: 0.0 if one_sided else exponent}},
        ),
    )


def products_of_the_paper(theirs):
    """KL-Shampoo's G R⁻¹ Gᵀ, over the other side's size as in the paper, which theirs leaves out.

    Ours takes for R and L the root of the mean square of G until there are roots, theirs I.
    """

    @functools.wraps(theirs)
    def products(self, grad, order, preconditioned_dims_selector, kronecker_factors):
        found = theirs(self, grad, order, preconditioned_dims_selector, kronecker_factors)
        roots = kronecker_factors.get_unpacked_inv_factor_matrices()
        first = all(torch.equal(x, torch.eye(len(x))) for x in roots)
        size = grad.square().mean().sqrt() if first else 1.0
        return tuple(x * len(x) / (grad.numel() * size) for x in found)

    return products


def main(soap_py):
    torch.set_default_dtype(torch.float64)
    rng = np.random.default_rng(0)

    def draw():
        return {k: rng.normal(size=shape).round(2).tolist() for k, shape in SHAPES.items()}

    start, gradients = draw(), [draw() for _ in range(STEPS + 1)]
    theirs = {}
    exec(Path(soap_py).read_text().replace(".float()", ""), theirs)
    out = {"start": start, "gradients": gradients, "soap": {"options": SOAP}}
    for steps in (4, STEPS):  # its first gradient takes none
        make = lambda params: theirs["SOAP"](params, **SOAP)  # noqa: E731
        out["soap"][str(steps)] = run(make, gradients[: steps + 1], start)
    # Theirs iterates in bfloat16, and holds kernels as outputs × inputs.
    iterate = inspect.getsource(_muon._zeropower_via_newtonschulz).replace("bfloat16", "clone")
    exec(iterate, vars(_muon))
    turned = lambda tree: {k: np.transpose(tree[k]) for k in ("square", "another", "wide")}  # noqa: E731
    make = lambda params: torch.optim.Muon(params, **MUON)  # noqa: E731
    found = run(make, [turned(g) for g in gradients[:STEPS]], turned(start))
    out["muon"] = {
        "options": MUON,
        str(STEPS): {k: np.transpose(x).tolist() for k, x in found.items()},
    }
    kl = fb_lists.RootInvKLShampooPreconditionerList
    kl._compute_outer_product_list = products_of_the_paper(kl._compute_outer_product_list)
    start = {k: start[k] for k in ("square", "another", "wide")}
    out["shampoo"] = {
        name: {
            "options": {**SHAMPOO_DEFAULTS, **options},
            str(STEPS): run(functools.partial(shampoo, **options), gradients[:STEPS], start),
        }
        for name, options in SHAMPOO.items()
    }
    print(json.dumps(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
