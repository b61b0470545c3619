"""The published networks once more, in NumPy and float64, written from their papers' tables.

Convolutions are sums over the window of matrix products, pooling loops over windows; layouts are
PyTorch's, [N, C, H, W] and [D, C, h, w].
"""

import math

import numpy as np

MEAN = np.array([0.485, 0.456, 0.406])[:, None, None]
STD = np.array([0.229, 0.224, 0.225])[:, None, None]


def conv(x, weight, bias=None, stride=1, pads=(0, 0, 0, 0)):
    x = np.pad(x, ((0, 0), (0, 0), pads[:2], pads[2:]))
    _, _, high, wide = weight.shape
    rows, columns = ((n - k) // stride + 1 for n, k in zip(x.shape[2:], (high, wide), strict=True))
    out = np.zeros((x.shape[0], weight.shape[0], rows, columns))
    for i in range(high):
        for j in range(wide):
            seen = x[:, :, i : i + stride * rows : stride, j : j + stride * columns : stride]
            out += np.einsum("dc,nchw->ndhw", weight[:, :, i, j], seen, optimize=True)
    return out if bias is None else out + bias[:, None, None]


def same(x, weight, bias, stride=1):
    pads = []
    for n, k in zip(x.shape[2:], weight.shape[2:], strict=True):
        total = max((math.ceil(n / stride) - 1) * stride + k - n, 0)
        pads += [total // 2, total - total // 2]
    return conv(x, weight, bias, stride, pads)


def pool(x, window, stride=2, ceil=False, pad=0):
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)), constant_values=-np.inf)
    round_ = math.ceil if ceil else math.floor
    rows, columns = (round_((n - window) / stride) + 1 for n in x.shape[2:])
    out = np.empty((*x.shape[:2], rows, columns))
    for i in range(rows):
        for j in range(columns):
            at = x[:, :, i * stride : i * stride + window, j * stride : j * stride + window]
            out[:, :, i, j] = at.max(axis=(2, 3))
    return out


def adaptive_mean(x, size):
    h, w = x.shape[2:]
    out = np.empty((*x.shape[:2], size, size))
    for i in range(size):
        for j in range(size):
            rows = slice(i * h // size, math.ceil((i + 1) * h / size))
            columns = slice(j * w // size, math.ceil((j + 1) * w / size))
            out[:, :, i, j] = x[:, :, rows, columns].mean(axis=(2, 3))
    return out


def relu(x):
    return np.maximum(x, 0)


def vgg(images, convs, counts, dense=()):
    """Every layer by name; `convs` are (weight, bias) in order, `dense` three of them or none."""
    x, found, convs = (images.transpose(0, 3, 1, 2) - MEAN) / STD, {}, iter(convs)
    for block, count in enumerate(counts, 1):
        for i in range(1, count + 1):
            x = found[f"conv{block}_{i}"] = conv(x, *next(convs), pads=(1, 1, 1, 1))
            x = found[f"relu{block}_{i}"] = relu(x)
        x = found[f"pool{block}"] = pool(x, 2)
    if dense:
        x = adaptive_mean(x, 7).reshape(len(x), -1)
        for i, (weight, bias) in zip((6, 7), dense, strict=False):
            x = found[f"fc{i}"] = x @ weight.T + bias
            x = found[f"relu{i}"] = relu(x)
        found["logits"] = x @ dense[2][0].T + dense[2][1]
    return found


def squeezenet(x, layers, pool_after, first, ceil):
    """Every layer by name, of an image prepared; `layers[name]` is (weight, bias)."""
    found = {}
    x = found["conv1"] = first(x, *layers["conv1"], 2)
    x = found["relu1"] = relu(x)
    x = found["pool1"] = pool(x, 3, ceil=ceil)
    for i in range(2, 10):
        x = found[f"fire{i}/squeeze"] = relu(conv(x, *layers[f"fire{i}/squeeze1x1"]))
        ones = conv(x, *layers[f"fire{i}/expand1x1"])
        threes = conv(x, *layers[f"fire{i}/expand3x3"], pads=(1, 1, 1, 1))
        x = found[f"fire{i}"] = relu(np.concatenate([ones, threes], axis=1))
        if i in pool_after:
            x = found[f"pool{i}"] = pool(x, 3, ceil=ceil)
    x = found["conv10"] = conv(x, *layers["conv10"])
    x = found["relu10"] = relu(x)
    found["logits"] = x.mean(axis=(2, 3))
    return found


def batch_norm(x, t, name):
    mean, var, scale, shift = (
        t[f"{name}.{part}"].astype(np.float64)[:, None, None]
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return scale * (x - mean) / np.sqrt(var + 1e-5) + shift


def resnet(images, t, counts):
    """The blocks' outputs and the logits, of torchvision's tensors, normalizing as it goes."""
    x, found = (images.transpose(0, 3, 1, 2) - MEAN) / STD, {}
    x = relu(batch_norm(conv(x, t["conv1.weight"], stride=2, pads=(3, 3, 3, 3)), t, "bn1"))
    x = pool(x, 3, pad=1)
    for group, count in enumerate(counts, 1):
        for i in range(count):
            at, stride = f"layer{group}.{i}", 2 if group > 1 and i == 0 else 1
            if f"{at}.conv3.weight" in t:
                y = relu(batch_norm(conv(x, t[f"{at}.conv1.weight"]), t, f"{at}.bn1"))
                y = conv(y, t[f"{at}.conv2.weight"], stride=stride, pads=(1, 1, 1, 1))
                y = relu(batch_norm(y, t, f"{at}.bn2"))
                y = batch_norm(conv(y, t[f"{at}.conv3.weight"]), t, f"{at}.bn3")
            else:
                y = conv(x, t[f"{at}.conv1.weight"], stride=stride, pads=(1, 1, 1, 1))
                y = found[f"{at}/relu1"] = relu(batch_norm(y, t, f"{at}.bn1"))
                y = conv(y, t[f"{at}.conv2.weight"], pads=(1, 1, 1, 1))
                y = batch_norm(y, t, f"{at}.bn2")
            if f"{at}.downsample.0.weight" in t:
                x = conv(x, t[f"{at}.downsample.0.weight"], stride=stride)
                x = batch_norm(x, t, f"{at}.downsample.1")
            x = found[at] = relu(x + y)
    found["logits"] = x.mean(axis=(2, 3)) @ t["fc.weight"].T + t["fc.bias"]
    return found


def closest(found, expected):
    """The largest deviation, against the largest value; [N, h, w, C] against [N, C, h, w]."""
    found = np.asarray(found, np.float64)
    found = found.transpose(0, 3, 1, 2) if found.ndim == 4 else found
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()
