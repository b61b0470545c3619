"""The commands of `jdl`, each in a file of its name, in the order of `jdl --help`."""

COMMANDS = {
    "demo": "five optimizers train one CNN on the bundled digits; a report",
    "train": "train a model on a tar of images",
    "evaluate": "loss and metrics of a trained run on a tar of images",
    "curvature": "a trained run's loss landscape: eigenvalues, sharpness, noise",
    "predict": "a trained run's predictions, as .npz, .jsonl or .csv",
    "summary": "a model's parameters, with shapes and counts, and its FLOPs",
    "activations": "what a network's layers see in a picture, and what they prefer",
    "dream": "a picture dreamt over by a network; a class's own picture",
    "style": "a picture in a painter's style, by optimisation or a network",
    "compare": "several optimizers, the same problems and budgets; a report",
    "index": "what a tar holds: members, classes, damage",
    "pack": "rewrite a folder, IDX files, an .npz or a tar as plain tars",
    "runs": "the runs below a folder, with their best metrics",
    "doctor": "what this machine has, and how to get the rest",
    "completion": "completion for bash, zsh or fish",
    "bench": "how fast this machine is: data, train, optim",
}
