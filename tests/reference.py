"""
Slow references, one number at a time in Python floats (float64), written from the papers and from nothing else.

They share no code with `hf_sai`; they are what its tests compare against.
"""

from __future__ import annotations

import math


def moments(elements: list[float]) -> tuple[float, float]:
    """Euclidean norm and standard deviation (n - 1) of a list of numbers."""
    n = len(elements)
    mean = math.fsum(elements) / n
    norm = math.sqrt(math.fsum(x * x for x in elements))
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in elements) / (n - 1)) if n > 1 else 0.0
    return norm, std


class ReferenceSGDSaI:
    """
    SGD-SaI on lists of floats (arXiv 2412.11768, Algorithm 1, with the first-step rules of this project).

    Args:
        tensors (`list[list[float]]`): The parameters, flat.
        groups (`list[dict]`): One dict of options per tensor: lr, momentum, weight_decay, eps.
        normalize (`str`): "none", "max" or "rms".
        measure_steps (`int`): Number of informative gradients to average g-SNR over.
        resolution (`float`): Relative spacing of the gradients' dtype; below it a gradient counts as constant.
    """

    def __init__(self, tensors, groups, normalize="none", measure_steps=1, maximize=False, resolution=2.0**-23):
        self.theta = [list(t) for t in tensors]
        self.groups, self.normalize, self.k = groups, normalize, measure_steps
        self.sign, self.resolution = (-1.0 if maximize else 1.0), resolution
        self.snr_samples = [[] for _ in tensors]
        self.constant = [False] * len(tensors)
        self.buffer = [None] * len(tensors)
        self.moves = [[0.0] for _ in tensors]  # the latest, to judge rounding by
        self.max = self.rms = None
        self.measuring_rounds = 0

    def gsnr(self, i):
        return math.fsum(self.snr_samples[i]) / len(self.snr_samples[i]) if self.snr_samples[i] else 0.0

    def step(self, gradients):
        """One update; a gradient is a flat list or None."""
        skipped, now = set(), set()
        for i, g in enumerate(gradients):
            if g is None or len(self.snr_samples[i]) >= self.k:
                continue
            if not all(math.isfinite(x) for x in g):
                if not self.snr_samples[i]:
                    skipped.add(i)
            elif any(x != 0.0 for x in g):
                now.add(i)
                norm, std = moments(g)
                mean = math.fsum(g) / len(g)
                if len(g) < 2 or std <= self.resolution * abs(mean):
                    self.constant[i] = True
                    self.snr_samples[i].append(math.sqrt(len(g)))
                else:
                    # norm / std is never below sqrt(n - 1); eps is not to be felt either
                    self.snr_samples[i].append(max(norm / (std + self.groups[i]["eps"]), math.sqrt(len(g) - 1)))
        measured = [i for i, s in enumerate(self.snr_samples) if s and not self.constant[i]]
        if measured or self.measuring_rounds:  # the maximum is open for k steps from the first that measured
            self.measuring_rounds += 1
            if measured and self.measuring_rounds <= self.k:
                self.max = max(self.gsnr(i) for i in measured)
        # Open as long as the maximum; while only constant gradients were seen it is of the step alone.
        if now and self.measuring_rounds <= self.k:
            elements = [self.gsnr(i) * x for i in now for x in gradients[i]]
            self.rms = math.sqrt(math.fsum(x * x for x in elements) / len(elements))
        for i, g in enumerate(gradients):
            if g is not None and i not in skipped:
                self.update(i, g)

    def update(self, i, g):
        options = self.groups[i]
        scale = self.gsnr(i)
        if self.normalize == "max" and scale:
            scale /= self.max if self.max is not None else max(self.gsnr(j) for j in range(len(self.theta)))
        if self.normalize == "rms" and scale:
            scale /= self.rms
        g = [self.sign * x for x in g]
        mu = options["momentum"]
        if mu and self.buffer[i] is None and self.snr_samples[i]:
            self.buffer[i] = list(g)
        elif mu and self.buffer[i] is not None:
            self.buffer[i] = [mu * m + (1.0 - mu) * x for m, x in zip(self.buffer[i], g, strict=True)]
        direction = self.buffer[i] if mu and self.buffer[i] is not None else g
        decay = 1.0 - options["lr"] * options["weight_decay"]
        self.moves[i] = [options["lr"] * scale * d for d in direction]
        self.theta[i] = [t * decay - options["lr"] * scale * d for t, d in zip(self.theta[i], direction, strict=True)]


class ReferencePair:
    """
    A of shape (r, in) and B of shape (out, r) on numpy float64 arrays: SGD-SaI on bounded gradients.

    Args:
        a (`array`): A.
        b (`array`): B.
        options (`dict`): lr, momentum, weight_decay, a_rate.
    """

    def __init__(self, a, b, options):
        import numpy

        self.factors = [numpy.array(a, dtype=float), numpy.array(b, dtype=float)]
        self.options, self.norm = options, 0.0
        self.scales, self.buffers = [0.0, 0.0], [None, None]

    def step(self, gradients):
        """One update from the gradients of both."""
        norms = [math.sqrt((gradient**2).sum()) for gradient in gradients]
        self.norm = self.norm or max(norms)
        rates = [self.options["a_rate"], 1.0]
        for i, gradient in enumerate(gradients):
            if not self.scales[i] and norms[i]:
                self.scales[i] = norms[i] / gradient.std(ddof=1)
            direction = rates[i] * gradient / max(norms[i], self.norm)
            mu = self.options["momentum"]
            if self.scales[i] and mu:
                old = self.buffers[i]
                direction = self.buffers[i] = direction if old is None else mu * old + (1 - mu) * direction
            decay = 1 - self.options["lr"] * self.options["weight_decay"]
            self.factors[i] = self.factors[i] * decay - self.options["lr"] * self.scales[i] * direction


def grad_norm(rows: list[list[float]]) -> list[list[float]]:
    """SWAN's GradNorm, one row at a time: centred, divided by the biased standard deviation; zeros without one."""
    result = []
    for row in rows:
        mean = math.fsum(row) / len(row)
        std = math.sqrt(math.fsum((x - mean) ** 2 for x in row) / len(row))
        result.append([(x - mean) / std if std else 0.0 for x in row])
    return result


def whitened(matrix):
    """`U V^T` of a float64 matrix by numpy's SVD, directions without extent left out."""
    import numpy

    u, s, vh = numpy.linalg.svd(matrix, full_matrices=False)
    kept = s > 1e-9 * s.max(initial=0.0)
    return (u * kept) @ vh


def optimal_quintics(lower, count, cushion=0.018):
    """Polar Express, Algorithm 1: each the best odd quintic (Remez) for the interval that the one before leaves."""
    import numpy

    upper, found = 1.0, []
    for _ in range(count):
        low = max(lower, cushion * upper)
        inner = [(3 * low + upper) / 4, (low + 3 * upper) / 4]
        error = math.inf
        while True:
            points = numpy.array([low, *inner, upper])
            rows = numpy.stack([points, points**3, points**5, [1, -1, 1, -1]], axis=1)
            a, b, c, new_error = numpy.linalg.solve(rows, numpy.ones(4))
            if abs(new_error - error) <= 1e-14:
                break
            error = new_error
            root = math.sqrt(9 * b * b - 20 * a * c)
            inner = [math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))]
        if cushion * upper > lower:  # the middle of what the ends become is 1
            ends = [a * x + b * x**3 + c * x**5 for x in (lower, upper)]
            a, b, c = (2 / sum(ends) * value for value in (a, b, c))
        found.append((a, b, c))
        lower = a * lower + b * lower**3 + c * lower**5
        upper = 2 - lower
    return found


def swan_direction(matrix):
    """GradNorm, whitening by SVD, rescaled to GradNorm's norm; float64, one matrix."""
    import numpy

    normed = numpy.array(grad_norm(matrix.tolist()))
    direction = whitened(normed)
    norm = numpy.linalg.norm(direction)
    return direction * (numpy.linalg.norm(normed) / norm if norm else 0.0)


class ReferenceSWAN:
    """
    SWAN on numpy float64 arrays, one matrix at a time (arXiv 2412.13148), Adam for the rest.

    Args:
        tensors (`dict[str, array]`): The parameters.
        views (`dict[str, callable]`): For every tensor to whiten, from an array of its shape to the list of matrices
            in it, as views that can be written through.
        options (`dict`): lr, scale, adam_lr_ratio, weight_decay, beta1, beta2, eps.
    """

    def __init__(self, tensors, views, options):
        import numpy

        self.theta = {name: numpy.array(value, dtype=float) for name, value in tensors.items()}
        self.views, self.options = views, options
        self.moments = {name: [0, 0.0, 0.0] for name in tensors if name not in views}

    def step(self, gradients):
        """One update; gradients by name, a missing one is None."""
        import numpy

        o = self.options
        for name, gradient in gradients.items():
            theta = self.theta[name]
            theta *= 1.0 - o["lr"] * o["weight_decay"]
            if name in self.views:
                for part, direction in zip(self.views[name](theta), self.views[name](gradient), strict=True):
                    part -= o["lr"] * o["scale"] * swan_direction(direction)
                continue
            moment = self.moments[name]
            moment[0] += 1
            moment[1] = o["beta1"] * moment[1] + (1 - o["beta1"]) * gradient
            moment[2] = o["beta2"] * moment[2] + (1 - o["beta2"]) * gradient**2
            mean, square = moment[1] / (1 - o["beta1"] ** moment[0]), moment[2] / (1 - o["beta2"] ** moment[0])
            theta -= o["lr"] * o["adam_lr_ratio"] * mean / (numpy.sqrt(square) + o["eps"])
