"""Writes `torch_reference.json`: ten steps of PyTorch's implementations on frozen gradients.

In an environment with torch, and with the file of its authors that is not in torch:

    git clone https://github.com/nikhilvyas/SOAP && git -C SOAP checkout a1e5535
    python tests/optim/torch_reference.py SOAP/soap.py > tests/optim/torch_reference.json

Theirs casts factors to float32, which is left out here: the numbers are float64's.
"""

import inspect
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.optim import _muon

STEPS = 10
SHAPES = {"square": (3, 3), "another": (3, 3), "wide": (2, 4), "vector": (2,)}
SOAP = {"lr": 0.03, "betas": [0.9, 0.97], "shampoo_beta": 0.8, "weight_decay": 0.1,
        "precondition_frequency": 3, "max_precond_dim": 3}  # fmt: skip
MUON = {"lr": 0.03, "momentum": 0.9, "nesterov": False, "weight_decay": 0.1, "eps": 1e-30}


def run(make, gradients, start):
    """The parameters after each step."""
    params = {k: torch.nn.Parameter(torch.tensor(x)) for k, x in start.items()}
    optimizer = make(list(params.values()))
    for gradient in gradients:
        for k, p in params.items():
            p.grad = torch.tensor(gradient[k])
        optimizer.step()
    return {k: p.detach().tolist() for k, p in params.items()}


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
    print(json.dumps(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
