r"""A training script for accelerators, with its own model: copy it and change it.

    python notebooks/train_script.py                                   # the bundled digits
    python notebooks/train_script.py --data 'photos-*.tar' --size 64 --batch-size 512 \
        --max-steps 20000 --compute-dtype bfloat16 --workdir runs/photos

It trains a small vision transformer on images streamed from tar archives, on all available devices.
Started again with the same flags it resumes from its last checkpoint, at the same place in the
data; on SIGTERM it saves and ends with exit code 75. `--evaluate` only evaluates.

Members of the archives are named `train/<class>/<name>` and `test/<class>/<name>`. Without these
folders, a tenth is held out by a hash of the names.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import optax

import jdl
from jdl.core.check import UserError
from jdl.core.files import write_atomically
from jdl.data import from_tar, resolve, splits
from jdl.train import distributed

# ------------------------------------------------------------------ the model


class Block(nn.Module):
    """Attention, then two dense layers, each added to its input (Vaswani et al. 2017)."""

    heads: int
    dropout: float

    @nn.compact
    def __call__(self, x, train):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(y, y)
        y = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        y = nn.Dropout(self.dropout, deterministic=not train)(nn.Dense(x.shape[-1])(y))
        return x + y


class VisionTransformer(nn.Module):
    """A transformer on patches of an image (Dosovitskiy et al. 2021)."""

    num_classes: int
    patch: int
    width: int
    depth: int
    heads: int
    dropout: float

    @nn.compact
    def __call__(self, image, train=False):
        """Logits [B, num_classes] of images [B, H, W, C], values in [0, 1]."""
        if self.patch > min(image.shape[1:3]):
            height, width = image.shape[1:3]
            raise UserError(f"--patch {self.patch} is larger than the images, {height}×{width}.")
        side = (self.patch, self.patch)
        x = nn.Conv(self.width, side, strides=side, padding="VALID", name="patches")(image - 0.5)
        x = x.reshape(x.shape[0], -1, self.width)
        x = x + self.param("places", nn.initializers.normal(0.02), x.shape[1:])[None]
        for i in range(self.depth):
            x = Block(self.heads, self.dropout, name=f"block_{i}")(x, train)
        return nn.Dense(self.num_classes, name="logits")(nn.LayerNorm()(x).mean(axis=1))


# ------------------------------------------------------------------ optimizer, data, estimator


def optimizer(flags):
    """AdamW on clipped gradients; the learning rate warms up, then decays along a cosine."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, flags.learning_rate, min(flags.warmup, flags.max_steps // 2), flags.max_steps
    )

    def matrices(params):
        return jax.tree.map(lambda x: x.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, weight_decay=flags.weight_decay, mask=matrices),
    )


def data(flags):
    """(training data, held-out data), as batches of {"image", "label"}."""
    paths = resolve(flags.data)
    apart = {"train", "test"} <= set(splits(paths))
    train_split, test_split = ("train", "test") if apart else ("train:0.1", "test:0.1")
    size = None if flags.size is None else (flags.size, flags.size)
    options = {"size": size, "grayscale": flags.grayscale, "batch_size": flags.batch_size}
    train = from_tar(
        paths,
        split=train_split,
        epochs=None,
        shuffle=True,
        seed=flags.seed,
        crop=flags.crop,
        flip=flags.flip,
        **options,
    )
    crop = "center" if flags.crop else None
    test = from_tar(paths, split=test_split, classes=train.classes, crop=crop, **options)
    return train, test


def estimator(flags, classes, hooks=()):
    """Model, loss, optimizer and run directory together."""
    model = VisionTransformer(
        classes, flags.patch, flags.width, flags.depth, flags.heads, flags.dropout
    )
    return jdl.classifier(
        model,
        optimizer(flags),
        workdir=flags.workdir,
        seed=flags.seed,
        ema=flags.ema,
        compute_dtype=None if flags.compute_dtype == "float32" else flags.compute_dtype,
        parallel=flags.parallel,
        microbatches=flags.microbatches,
        log_every=flags.log_every,
        save_every=flags.save_every,
        on_nonfinite="skip",
        hooks=hooks,
    )


def teller(batch_size):
    """A hook that prints each row of the log."""
    last = None

    def tell(row):
        nonlocal last
        rate = ""
        if row["split"] == "train":
            if last is not None and row["seconds"] > last[1]:
                images = (row["step"] - last[0]) * batch_size / (row["seconds"] - last[1])
                rate = f"  {images:.0f} images/s"
            last = row["step"], row["seconds"]
        if jax.process_index() == 0:
            values = f"loss {row['loss']:.4f}  accuracy {row['accuracy']:.3f}"
            print(f"step {row['step']:>6}  {row['split']:<10}  {values}{rate}", flush=True)

    return tell


# ------------------------------------------------------------------ the command line


def parsed(argv):
    """The flags."""
    about, _, _ = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flag = parser.add_argument
    flag("--data", default="digits", help="tar archives: a path, glob or brace range; or digits")
    flag("--workdir", type=Path, default=Path("runs/script"), help="logs and checkpoints")
    flag("--size", type=int, help="side that images are resized to; optional if all have one size")
    flag("--grayscale", action="store_true", help="one channel")
    flag("--crop", choices=("random", "center"), help="crop images instead of stretching them")
    flag("--flip", action="store_true", help="mirror half of the training images")
    flag("--batch-size", type=int, default=64, help="examples of a step, on all devices together")
    flag("--max-steps", type=int, default=1000, help="total of the run; the schedule ends there")
    flag("--learning-rate", type=float, default=2e-3, help="after the warmup")
    flag("--warmup", type=int, default=100, help="steps until the learning rate is reached")
    flag("--weight-decay", type=float, default=0.05, help="AdamW's, of matrices only")
    flag("--dropout", type=float, default=0.1, help="fraction of units dropped in training")
    flag("--ema", type=float, default=0.99, help="decay of the average that is evaluated")
    flag("--patch", type=int, default=2, help="side of a patch; 8 for images of 64")
    flag("--width", type=int, default=64, help="features of each patch; a multiple of --heads")
    flag("--depth", type=int, default=3, help="number of blocks")
    flag("--heads", type=int, default=4, help="attention heads of each block")
    flag("--compute-dtype", choices=("float32", "bfloat16"), default="float32", help="of the model")
    flag("--parallel", choices=("jit", "fsdp", "pmap"), default="jit", help="see Estimator")
    flag("--microbatches", type=int, default=1, help="slices of a batch, to bound memory")
    flag("--log-every", type=int, default=50, help="steps between two rows of the log")
    flag("--validate-every", type=int, default=250, help="steps between two validations")
    flag("--save-every", type=int, default=250, help="steps between two checkpoints")
    flag("--seed", type=int, default=0, help="of parameters, shuffle and dropout")
    flag("--evaluate", action="store_true", help="evaluate the last checkpoint and end")
    flag("--distributed", action="store_true", help="one of several processes; see distributed.md")
    return parser.parse_args(argv)


def run(flags):
    """Trains, unless `--evaluate` is given, and prints the final metrics as one JSON object."""
    train, test = data(flags)
    fitted = estimator(flags, len(train.classes), [teller(flags.batch_size)])
    if not flags.evaluate:
        if jax.process_index() == 0:
            shown = {name: str(value) for name, value in vars(flags).items()}
            write_atomically(flags.workdir / "flags.json", json.dumps(shown, indent=2) + "\n")
            print(
                f"{train.num_records} training images of {len(train.classes)} classes, "
                f"{jax.device_count()} device(s)",
                flush=True,
            )
        fitted.initialize(train)
        parameters = sum(x.size for x in jax.tree.leaves(fitted.params))
        if jax.process_index() == 0:
            print(
                f"{parameters:,} parameters; at step {fitted.step} of {flags.max_steps}", flush=True
            )
        fitted.train(
            train, max_steps=flags.max_steps, validation=test, validate_every=flags.validate_every
        )
    start = time.perf_counter()
    values = fitted.evaluate(test, name="test")
    if jax.process_index() == 0:
        seconds = {"train_seconds": fitted.seconds, "test_seconds": time.perf_counter() - start}
        print(json.dumps({"step": fitted.step, **values, **seconds}))


def main(argv=None):
    """Exit code 0, or 2 for a user error, whose message says how to fix it."""
    flags = parsed(argv)
    try:
        if flags.distributed:
            distributed.initialize()
        run(flags)
    except UserError as error:
        distributed.announce(error, code=2)
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
