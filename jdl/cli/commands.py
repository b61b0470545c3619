"""The commands of `jdl`, each in a file of its name, in the order of `jdl --help`."""

COMMANDS = {
    "demo": "compare five optimizers on the bundled digits with one CNN",
    "train": "train a model on a tar of images",
    "sweep": "train with every combination of some flags' values",
    "evaluate": "loss and metrics of a trained run on a tar of images",
    "curvature": "curvature at a trained run: eigenvalues, sharpness, gradient noise",
    "predict": "a trained run's predictions, as .npz, .jsonl or .csv",
    "sample": "new pictures or texts of a trained generative model",
    "summary": "a model's parameters, with shapes and counts, and its FLOPs",
    "activations": "what a network's layers respond to in a picture",
    "dream": "a picture changed until a network sees more in it; a class's picture",
    "style": "a picture in a painter's style, by optimization or by a network",
    "compare": "compare optimizers on the same problems and budgets, with a report",
    "index": "what a tar holds: members, classes, damage",
    "pack": "rewrite a folder, IDX files, an .npz or a tar as plain tars",
    "runs": "the runs below a folder, with their best metrics",
    "doctor": "this machine's devices, memory and optional packages",
    "completion": "completion for bash, zsh or fish",
    "bench": "how fast this machine loads data, trains, and optimizes",
}
