"""Speed of vision: optimizing images against PyTorch, a style network against optimization.

    make bench-vision

PyTorch takes part if it is installed; if it is in another environment, set JDL_PEERS_PYTHON to its
interpreter. It runs in a separate process, in turn with ours, with the same VGG16 weights, image,
layers, loss and Adam. Times are CPU time divided by the number of cores, which other processes
affect less, and wall time; medians of rounds, ratios of one run.

Lines: Gatys' and DeepDream's steps at 256×192; the time of a trained style network for one image,
against the time that L-BFGS and Adam on the pixels need to reach the same style loss; images per
second at 256² and 1024². Without --painter and --painting a network is trained first, for
--train-seconds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CORES = len(os.sched_getaffinity(0))
STYLE_LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
CONTENT_LAYERS = ("relu4_2",)
WEIGHTS = (1.0, 30.0, 5.0)  # content, style, variation
RATE = 0.02
DREAMT, STRIDE, JITTER = "relu4_3", 0.01, 16  # DeepDream's layer, step size and shifts
BLOCKS = (2, 2, 3, 3, 3)


def show(**line):
    print(json.dumps(line), flush=True)


# ---------------------------------------------------------------------- PyTorch, in its own process


def torch_features(given, form, wanted):
    """VGG16 up to the last requested layer, for images [1, 3, H, W]."""
    import torch
    from torch.nn import functional as F

    names = [f"conv{b}_{i}" for b, n in enumerate(BLOCKS, 1) for i in range(1, n + 1)]
    kernels = {
        n: torch.from_numpy(given[f"{n}.kernel"].transpose(3, 2, 0, 1).copy()).contiguous(
            memory_format=form
        )
        for n in names
        if f"{n}.kernel" in given
    }
    biases = {n: torch.from_numpy(given[f"{n}.bias"]) for n in kernels}
    mean = torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1)

    def features(x):
        x, found = (x - mean) / std, {}
        for block, count in enumerate(BLOCKS, 1):
            for i in range(1, count + 1):
                name = f"conv{block}_{i}"
                x = F.relu(F.conv2d(x, kernels[name], biases[name], padding=1))
                if (relu := f"relu{block}_{i}") in wanted:
                    found[relu] = x
                    if len(found) == len(wanted):
                        return found
            x = F.max_pool2d(x, 2)
        return found

    return features


def torch_peer(path, contest):
    """Reads numbers from standard input and makes that many steps for each, in plain PyTorch."""
    import torch

    torch.set_num_threads(CORES)
    given = dict(np.load(path))
    channels_last = os.environ.get("JDL_BENCH_FORMAT") == "channels_last"
    form = torch.channels_last if channels_last else torch.contiguous_format
    step = {"gatys": torch_gatys, "dream": torch_dream}[contest](given, form)
    for line in sys.stdin:
        start, processor = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            value = step()
        wall, processor = time.perf_counter() - start, time.process_time() - processor
        print(json.dumps({"loss": value, "wall": wall, "processor": processor}), flush=True)


def torch_dream(given, form):
    """A step of DeepDream: shift, gradient of mean(F²)/2, its size to 1, uphill, clip."""
    import torch

    features = torch_features(given, form, {DREAMT})
    x = torch.from_numpy(given["photograph"].transpose(2, 0, 1)[None].copy())
    x, rng = x.contiguous(memory_format=form), np.random.default_rng(0)

    def step():
        nonlocal x
        down, across = (int(n) for n in rng.integers(-JITTER, JITTER + 1, 2))
        shifted = torch.roll(x, (down, across), (2, 3)).requires_grad_(True)
        score = 0.5 * (features(shifted)[DREAMT] ** 2).mean()
        score.backward()
        slope = torch.roll(shifted.grad, (-down, -across), (2, 3))
        x = (x + STRIDE * slope / slope.abs().mean()).clamp(0, 1)
        return float(score.detach())

    return step


def torch_gatys(given, form):
    """A step of Adam on Gatys' loss."""
    import torch

    features = torch_features(given, form, {*STYLE_LAYERS, *CONTENT_LAYERS})

    def gram(x):
        flat = x.flatten(2)[0]
        return flat @ flat.T / flat.shape[1]

    def image_of(name):
        return torch.from_numpy(given[name].transpose(2, 0, 1)[None].copy())

    with torch.no_grad():
        of_painting = features(image_of("painting"))
        of_photograph = features(image_of("photograph"))
        grams = {n: gram(of_painting[n]) for n in STYLE_LAYERS}
        scales = {n: (g * g).sum() for n, g in grams.items()}
        energy = {n: (of_painting[n] ** 2).mean() for n in CONTENT_LAYERS}

    def loss_of(x):
        found = features(x)
        content = sum(
            ((found[n] - of_photograph[n]) ** 2).mean() / energy[n] for n in CONTENT_LAYERS
        ) / len(CONTENT_LAYERS)
        style = sum(
            ((gram(found[n]) - grams[n]) ** 2).sum() / scales[n] for n in STYLE_LAYERS
        ) / len(STYLE_LAYERS)
        smooth = (x.diff(dim=2) ** 2).mean() + (x.diff(dim=3) ** 2).mean()
        smooth = smooth + ((x - x.clamp(0, 1)) ** 2).mean()
        return WEIGHTS[0] * content + WEIGHTS[1] * style + WEIGHTS[2] * smooth

    x = image_of("photograph").contiguous(memory_format=form).requires_grad_(True)
    optimizer = torch.optim.Adam([x], lr=RATE)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(x)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


class Peer:
    """The PyTorch loop above, in a separate process."""

    def __init__(self, data, channels_last, contest):
        python = os.environ.get("JDL_PEERS_PYTHON", sys.executable)
        form = "channels_last" if channels_last else "contiguous"
        self._process = subprocess.Popen(
            [python, __file__, "--peer", str(data), "--contest", contest],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "JDL_BENCH_FORMAT": form},
        )

    def __call__(self, steps):
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("PyTorch's process ended: see above")
        found = json.loads(line)
        return found["loss"], found["wall"], found["processor"]

    def close(self):
        self._process.stdin.close()
        self._process.wait(timeout=30)


def has_torch():
    python = os.environ.get("JDL_PEERS_PYTHON", sys.executable)
    return subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 0


def timed(work):
    start, processor = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - start, time.process_time() - processor


# ---------------------------------------------------------------------- contests


def our_gatys(trunk, photograph, painting, optimizer):
    """`run(steps)` of our own optimization, as in `style.transfer`."""
    import jax

    from jdl.vision import style

    layers = style.Layers(CONTENT_LAYERS, STYLE_LAYERS)
    compiled = style._compiled(trunk.apply, layers, style.Weights(*WEIGHTS), optimizer)
    image = photograph[None]
    features = compiled.features(trunk.params, image)
    palette = style.palette(trunk, [painting], layers)
    target = style.target(palette, style.mixed(None, 1), features)
    image = jax.numpy.asarray(image)
    state = [image, compiled.init(image)]

    def run(steps):
        for _ in range(steps):
            *state[:], value = compiled.step(*state, (trunk.params, target))
            value = float(value)
        return value

    return run


def gatys(photograph, painting, rounds, steps):
    import optax

    from jdl.vision import pretrained

    trunk = pretrained.load_trunk("vgg16")
    ours = our_gatys(trunk, photograph, painting, optax.adam(RATE))
    pictures = {"photograph": photograph, "painting": painting}
    in_turn("Gatys, VGG16, 256x192, Adam", "gatys", trunk, ours, pictures, rounds, steps)


def dream(photograph, rounds, steps):
    import jax
    import jax.numpy as jnp

    from jdl.vision import dream as dreams
    from jdl.vision import pretrained

    trunk = pretrained.load_trunk("vgg16")
    goal = dreams.goal(trunk, DREAMT)
    how = dreams.Settings(
        octaves=1, steps=1, step_size=STRIDE, jitter=JITTER, smoothing=0.0, natural=False
    )
    rng, x = np.random.default_rng(0), jnp.asarray(photograph)

    def ours(count):
        nonlocal x
        for _ in range(count):
            before, drawn = x, rng.bit_generator.state
            x = jax.block_until_ready(dreams.step(trunk, x, goal, how, rng))
        return before, drawn

    def score(found):
        before, again = found[0], np.random.default_rng()
        again.bit_generator.state = found[1]
        shift = again.integers(-JITTER, JITTER + 1, 2)
        features = trunk.features(jnp.roll(before, shift, (0, 1))[None], goal.layers)
        return float(dreams.score(goal, features))

    title = f"DeepDream, VGG16 {DREAMT}, 256x192"
    in_turn(title, "dream", trunk, ours, {"photograph": photograph}, rounds, steps, score)


def in_turn(title, contest, trunk, ours, pictures, rounds, steps, value_of=float):
    """Runs `ours(steps)` and PyTorch in both layouts in turn; prints the ratios.

    `value_of` what ours gives is the last loss, to be compared with PyTorch's, off the clock.
    """

    def run_ours(count):
        found, wall, processor = timed(lambda: ours(count))
        return value_of(found), wall, processor

    contestants = {"jdl": run_ours}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "contest.npz"
        weights = {
            f"{layer}.{part}": np.asarray(value)
            for layer, parts in trunk.params.items()
            for part, value in parts.items()
        }
        np.savez(data, **pictures, **weights)
        if has_torch():
            contestants["torch"] = Peer(data, False, contest)
            contestants["torch_channels_last"] = Peer(data, True, contest)
        else:
            print("torch is not installed: set JDL_PEERS_PYTHON", flush=True)
        losses, walls, work = ({name: [] for name in contestants} for _ in range(3))
        for name, run in contestants.items():
            losses[name].append(run(2)[0])  # compiles and warms up
        for _ in range(rounds):
            for name, run in contestants.items():
                loss, wall, processor = run(steps)
                losses[name].append(loss)
                walls[name].append(steps / wall)
                work[name].append(steps * CORES / processor)
        for name, run in contestants.items():
            if name != "jdl":
                run.close()
    wall = {name: statistics.median(x) for name, x in walls.items()}
    busy = {name: statistics.median(x) for name, x in work.items()}
    show(
        case=title,
        steps_per_second={name: round(x, 3) for name, x in wall.items()},
        steps_per_second_by_processor={name: round(x, 3) for name, x in busy.items()},
        jdl_over={n: round(wall["jdl"] / x, 2) for n, x in wall.items() if n != "jdl"},
        jdl_over_by_processor={n: round(busy["jdl"] / x, 2) for n, x in busy.items() if n != "jdl"},
        first_losses={name: round(x[0], 4) for name, x in losses.items()},
        last_losses={name: round(x[-1], 4) for name, x in losses.items()},
        rounds=rounds,
    )


def network_against_pixels(painter, run, trunk, photograph, painting, most):
    """Seconds of one pass, and of optimizing the pixels until their style loss is as low."""
    import jax
    import optax

    from jdl.vision import style

    painted = painter(photograph)
    passes = [timed(lambda: painter(photograph)) for _ in range(9)]
    apply_wall, apply_busy = (statistics.median(x[i] for x in passes) for i in (1, 2))
    image = jax.numpy.asarray(photograph)[None]
    layers = style.Layers(run.content_layers, run.style_layers)
    weights = style.Weights(run.content, run.style, run.variation)
    palette = style.palette(trunk, [painting], layers)
    for name, optimizer in {"L-BFGS": style._usual_optimizer(), "Adam": optax.adam(RATE)}.items():
        compiled = style._compiled(trunk.apply, layers, weights, optimizer)
        features = compiled.features(trunk.params, image)
        fixed = trunk.params, style.target(palette, style.mixed(None, 1), features)

        def style_loss(x, compiled=compiled, fixed=fixed):
            return float(compiled.terms(jax.numpy.asarray(x), *fixed).style[0])

        goal, x, state = style_loss(painted[None]), image, compiled.init(image)
        jax.block_until_ready(compiled.step(x, state, fixed))  # compiles
        wall = busy = 0.0
        reached, steps = np.inf, 0
        while reached > goal and steps < most:
            (x, state, _), seconds, processor = timed(
                lambda now=(x, state), compiled=compiled, fixed=fixed: jax.block_until_ready(
                    compiled.step(*now, fixed)
                )
            )
            wall, busy, steps = wall + seconds, busy + processor, steps + 1
            reached = style_loss(x)
        show(
            case=f"painting {photograph.shape[1]}x{photograph.shape[0]}, network against {name}",
            style_loss_of_network=round(goal, 4),
            style_loss_of_photograph=round(style_loss(image), 4),
            style_loss_of_pixels=round(reached, 4),
            pixel_steps=steps,
            reached=reached <= goal,
            seconds={"network": round(apply_wall, 4), "pixels": round(wall, 2)},
            times_faster=round(wall / apply_wall, 1),
            times_faster_by_processor=round(busy / apply_busy, 1),
        )


def pictures_a_second(painter, label, rounds):
    for side in (256, 1024):
        picture = np.random.default_rng(0).uniform(size=(side, side, 3)).astype(np.float32)
        painter(picture)
        found = [timed(lambda x=picture: painter(x)) for _ in range(rounds)]
        show(
            case=f"style network {label}, {side}x{side}",
            images_per_second=round(1 / statistics.median(x[1] for x in found), 2),
            by_processor=round(CORES / statistics.median(x[2] for x in found), 2),
            rounds=rounds,
        )


def untrained(filters, blocks):
    """A network with random parameters, as fast as a trained one."""
    import jax
    import jax.numpy as jnp

    from jdl.vision import painter
    from jdl.vision.painter_net import StyleNet

    net = StyleNet(filters, blocks)
    init = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), jnp.ones((1, 1)))
    return painter.of_net(net, init["params"], ("random",))


def trained(folder, painting, seconds):
    """A small style network trained on crops of scikit-image's photographs."""
    import skimage.data

    from jdl.data import from_arrays
    from jdl.recipes.style_config import StyleConfig
    from jdl.vision import pretrained
    from jdl.vision.style_training import build_estimator, digest

    run = StyleConfig(
        styles=("painting",),
        paintings=(digest(painting),),
        trunk="vgg16",
        content_layers=("relu2_2",),
        style_layers=("relu1_2", "relu2_2", "relu3_3"),
        content=1.0,
        style=5.0,
        variation=5.0,
        filters=(16, 32, 64),
        blocks=3,
        learning_rate=2e-3,
        batch_size=2,
        size=128,
        seed=0,
    )
    rng, crops = np.random.default_rng(0), []
    for image in (skimage.data.astronaut(), skimage.data.coffee(), skimage.data.rocket()):
        for _ in range(64):
            top, left = (rng.integers(0, n - 128) for n in image.shape[:2])
            crops.append(image[top : top + 128, left : left + 128])
    labels = np.zeros(len(crops), np.int32)
    data = from_arrays(np.stack(crops), labels, batch_size=2, shuffle=True)
    run.save(folder)
    build_estimator(run, pretrained.load_trunk("vgg16"), [painting], folder).train(
        data, seconds=seconds
    )
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--contest", choices=("gatys", "dream"), help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of Gatys or DeepDream, a round")
    parser.add_argument("--parts", nargs="+", choices=("gatys", "dream", "apply", "rate"))
    parser.add_argument("--painter", type=Path, help="a run directory of `jdl style train`")
    parser.add_argument("--painting", type=Path, help="the painting of its first style")
    parser.add_argument("--style-size", type=int, default=256, help="its longer side in that run")
    parser.add_argument("--train-seconds", type=float, default=120.0)
    args = parser.parse_args()
    if args.peer:
        torch_peer(args.peer, args.contest)
        return
    import skimage.data

    from jdl.recipes.style_config import StyleConfig
    from jdl.vision import images, painter, pretrained

    parts = args.parts or ("gatys", "dream", "apply", "rate")
    photograph = images.resized(images.as_image(skimage.data.coffee()), (192, 256)).clip(0, 1)
    if args.painting:
        painting = images.read(args.painting, longest=args.style_size)
    else:
        colourful = images.as_image(skimage.data.immunohistochemistry())
        painting = images.resized(colourful, (256, 256)).clip(0, 1)
    if "gatys" in parts:
        gatys(photograph, painting, args.rounds, args.steps)
    if "dream" in parts:
        dream(photograph, args.rounds, args.steps)
    if "apply" in parts:
        with tempfile.TemporaryDirectory() as folder:
            path = args.painter or trained(Path(folder), painting, args.train_seconds)
            run, loaded = StyleConfig.load(path), painter.load_painter(path)
            square = images.resized(
                images.as_image(skimage.data.chelsea())[:300, 80:380], (256,) * 2
            )
            trunk = pretrained.load_trunk(run.trunk)
            network_against_pixels(loaded, run, trunk, square.clip(0, 1), painting, 300)
    if "rate" in parts:
        for filters, blocks in (((16, 32, 64), 3), ((32, 64, 128), 5)):
            label = f"{'-'.join(map(str, filters))}, {blocks} blocks"
            pictures_a_second(untrained(filters, blocks), label, args.rounds)


if __name__ == "__main__":
    main()
