"""Vision: steps a second of Gatys' style transfer and of DeepDream, on VGG-16 with random weights.

PyTorch, where it is installed, runs the same net and sums in a process of its own, in float32 with
its default precision of convolutions, channels last.
"""

import importlib.util
import json
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from nets import Vgg

STYLE = ("conv1_1", "conv2_1", "conv3_1", "conv4_1", "conv5_1")
CONTENT = "conv4_2"
DREAMT, STRIDE, JITTER = "conv4_3", 0.01, 16


def run(results, *, tiny, data):
    del data
    side, steps = (32, 4) if tiny else (512, 40)
    width = 4 if tiny else 64
    with results.guard("vision, jdl"):
        ours = {"style": style_rate(side, width, steps), "dream": dream_rate(side, width, steps)}
        results.add(f"jdl, {side}²", steps_per_second=ours)
    if importlib.util.find_spec("torch") is None:
        results.add("torch", skipped="not installed")
        return
    with results.guard("vision, PyTorch"):
        command = [sys.executable, __file__, str(side), str(width), str(steps)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=results.left())
        if done.returncode:
            raise RuntimeError(done.stderr[-1000:])
        theirs = json.loads(done.stdout.splitlines()[-1])
        ratios = {k: ours[k] / theirs[k] for k in ours}
        results.add(f"torch, {side}²", steps_per_second=theirs, jdl_over_torch=ratios)


def rate(seconds):
    """Steps a second, by the median of what steps took."""
    return 1 / statistics.median(seconds)


def trunk_of(side, width):
    from jdl.vision.trunk import of_linen

    net = Vgg(width=width)
    params = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]
    return of_linen(net, params, image_shape=(side, side, 3), name="random VGG-16")


def pictures(side):
    rng = np.random.default_rng(0)
    return rng.uniform(size=(2, side, side, 3)).astype(np.float32)


def style_rate(side, width, steps):
    """Adam on the pixels; each step's loss is read, as `transfer` does."""
    from jdl.vision import style

    photograph, painting = pictures(side)
    marks = []
    style.transfer(
        trunk_of(side, width),
        photograph,
        [painting],
        layers=style.Layers((CONTENT,), STYLE),
        optimizer=optax.adam(0.02),
        steps=steps,
        hook=lambda step, loss: marks.append(time.perf_counter()),
    )
    return rate(np.diff(marks)[1:])


def dream_rate(side, width, steps):
    """One octave."""
    from jdl.vision import dream

    trunk, marks = trunk_of(side, width), []
    goal = dream.goal(trunk, DREAMT)
    how = dream.Settings(
        octaves=1, steps=steps, step_size=STRIDE, jitter=JITTER, smoothing=0.0, natural=False
    )
    dream.dream(trunk, pictures(side)[0], goal, how)  # compiles
    start = time.perf_counter()
    dream.dream(trunk, pictures(side)[0], goal, how)
    marks.append(time.perf_counter() - start)
    return steps / marks[0]


# ---------------------------------------------------------------------- PyTorch


def torch_net(width, device):
    """`features(x)`: the outputs of the convolutions by name."""
    import torch

    blocks, channels, kernels = (2, 2, 3, 3, 3), 3, {}
    torch.manual_seed(0)
    for b, count in enumerate(blocks):
        for i in range(count):
            features = width * min(2**b, 8)
            conv = torch.nn.Conv2d(channels, features, 3, padding=1)
            torch.nn.init.kaiming_normal_(conv.weight)
            conv = conv.to(device, memory_format=torch.channels_last).requires_grad_(False)
            kernels[f"conv{b + 1}_{i + 1}"] = conv
            channels = features

    def features(x, wanted):
        found = {}
        for b, count in enumerate(blocks):
            for i in range(count):
                x = kernels[name := f"conv{b + 1}_{i + 1}"](x)
                if name in wanted:
                    found[name] = x
                    if len(found) == len(wanted):
                        return found
                x = torch.relu(x)
            x = torch.nn.functional.max_pool2d(x, 2)
        return found

    return features


def torch_rates(side, width, steps):
    """The same two, in PyTorch."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    features = torch_net(width, device)
    both = torch.from_numpy(pictures(side)).permute(0, 3, 1, 2).to(device)
    photograph, painting = (x[None].contiguous(memory_format=torch.channels_last) for x in both)

    def gram(x):
        flat = x.flatten(2)[0]
        return flat @ flat.T / flat.shape[1]

    with torch.no_grad():
        grams = {n: gram(x) for n, x in features(painting, STYLE).items()}
        content = features(photograph, (CONTENT,))[CONTENT]
    x = photograph.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([x], lr=0.02)

    def style_step():
        found = features(x, (*STYLE, CONTENT))
        loss = ((found[CONTENT] - content) ** 2).mean() / (content**2).mean()
        for n, g in grams.items():
            loss = loss + 6 * ((gram(found[n]) - g) ** 2).sum() / (g * g).sum()
        loss = loss + 5 * (x.diff(dim=2) ** 2).mean() + 5 * (x.diff(dim=3) ** 2).mean()
        loss = loss + 5 * ((x - x.clamp(0, 1)) ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    state, rng = [photograph.clone()], np.random.default_rng(0)

    def dream_step():
        down, across = (int(n) for n in rng.integers(-JITTER, JITTER + 1, 2))
        shifted = torch.roll(state[0], (down, across), (2, 3)).requires_grad_(True)
        (0.5 * (features(shifted, (DREAMT,))[DREAMT] ** 2).mean()).backward()
        slope = torch.roll(shifted.grad, (-down, -across), (2, 3))
        state[0] = (state[0] + STRIDE * slope / slope.abs().mean()).clamp(0, 1).detach()

    found = {}
    for name, step in {"style": style_step, "dream": dream_step}.items():
        for _ in range(3):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found[name] = steps / (time.perf_counter() - start)
    return found


if __name__ == "__main__":
    print(json.dumps(torch_rates(*map(int, sys.argv[1:]))))
