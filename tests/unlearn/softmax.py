"""Convex softmax regression in NumPy, float64, and its exact minimiser: what a retrain gives, made without the package."""

import numpy as np
from scipy.optimize import minimize


def draw(examples, features, classes, seed=0):
    """(x [n, d], labels [n]) of a softmax model with Gaussian weights."""
    rng = np.random.default_rng(seed)
    x, truth = rng.normal(size=(examples, features)), rng.normal(size=(features, classes))
    return x, (x @ truth + rng.gumbel(size=(examples, classes))).argmax(1)


def probabilities(x, weights):
    z = x @ weights
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def value_and_gradient(x, labels, weights, decay):
    p, n = probabilities(x, weights), len(x)
    value = -np.log(p[np.arange(n), labels]).mean() + decay / 2 * (weights**2).sum()
    p[np.arange(n), labels] -= 1
    return value, x.T @ p / n + decay * weights


def hessian(x, weights, decay):
    """[d C, d C]"""
    p, (d, classes) = probabilities(x, weights), weights.shape
    H = np.zeros((d, classes, d, classes))
    for a in range(classes):
        for b in range(a, classes):
            share = p[:, a] * ((a == b) - p[:, b])
            H[:, a, :, b] = H[:, b, :, a] = (x * share[:, None]).T @ x / len(x)
    return H.reshape(d * classes, -1) + decay * np.eye(d * classes)


def train(x, labels, start, decay, tolerance=1e-10):
    """(the minimiser, evaluations of L-BFGS to the tolerance: the epochs of a training)"""
    shape, spent = start.shape, []

    def f(w):
        value, gradient = value_and_gradient(x, labels, w.reshape(shape), decay)
        spent.append(np.linalg.norm(gradient))
        return value, gradient.reshape(-1)

    options = {"maxiter": 5000, "maxfun": 9000, "maxcor": 20, "ftol": 0, "gtol": tolerance / 10}
    w = minimize(f, start.reshape(-1), jac=True, method="L-BFGS-B", options=options).x
    for _ in range(20):
        gradient = f(w)[1]
        if np.linalg.norm(gradient) < tolerance:
            return w.reshape(shape), len(spent)
        w = w - np.linalg.solve(hessian(x, w.reshape(shape), decay), gradient)
    raise AssertionError("not converged")
