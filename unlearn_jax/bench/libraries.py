"""The small language model in torch, and products and solves on it by torch and other libraries."""
# pyright: reportMissingImports=false
# torch and the libraries are optional.

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, grad, jvp
from torch.nn import functional

from unlearn_jax.bench import MOST_STEPS, RTOL
from unlearn_jax.experiment.small_transformer import LORA_SCALE

NAMES = ("q", "v")


class Twin(nn.Module):
    """The small transformer in torch. Only the adapter's factors are parameters; the base model's weights are buffers."""

    embed: torch.Tensor
    positions: torch.Tensor
    unembed: torch.Tensor
    qkvo: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    a: Any
    b: Any

    def __init__(self, base: Mapping[str, Any], adapter: Mapping[str, Mapping[str, Any]], heads: int):
        super().__init__()
        self.heads = heads
        tensors = {name: torch.tensor(np.asarray(x)) for name, x in base.items()}
        for name, x in tensors.items():
            self.register_buffer(name, x)
        self.a, self.b = (
            nn.ModuleDict({n: nn.ModuleList(map(_linear, np.asarray(adapter[n][f"lora_{side}"]))) for n in NAMES})
            for side in "ab"
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] of tokens int64 [B, T]."""
        length = tokens.shape[1]
        split = lambda x: x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        x = self.embed[tokens] + self.positions[:length]
        for layer, (wq, wk, wv, wo) in enumerate(self.qkvo):
            y = normalise(x)
            q, v = (
                y @ w + LORA_SCALE * self.b[n][layer](self.a[n][layer](y)) for n, w in zip(NAMES, (wq, wv), strict=True)
            )
            scores = split(q) @ split(y @ wk).mT * (x.shape[-1] // self.heads) ** -0.5
            weight = scores.masked_fill(~causal, -1e9).softmax(dim=-1)
            x = x + (weight @ split(v)).transpose(1, 2).flatten(2) @ wo
            x = x + functional.gelu(normalise(x) @ self.up[layer], approximate="tanh") @ self.down[layer]
        return normalise(x) @ self.unembed

    def adapter(self) -> list[nn.Parameter]:
        """The adapter's factors."""
        return list(self.parameters())


def normalise(x: torch.Tensor) -> torch.Tensor:
    """Root mean square normalisation over the last axis."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean over all tokens of logits [B, T, V] and labels int64 [B, T]."""
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def to_torch(adapter: Mapping[str, Mapping[str, Any]]) -> list[torch.Tensor]:
    """A pytree like the adapter as tensors in the order of `Twin.adapter`."""
    return [torch.tensor(np.asarray(x)) for side in "ab" for n in NAMES for x in adapter[n][f"lora_{side}"]]


def from_torch(tensors: list[torch.Tensor]) -> dict[str, dict[str, np.ndarray]]:
    """Tensors in the order of `Twin.adapter` as a pytree like the adapter."""
    layers = len(tensors) // (2 * len(NAMES))
    stacks = [np.stack([x.detach().numpy() for x in tensors[i : i + layers]]) for i in range(0, len(tensors), layers)]
    return {n: {"lora_a": stacks[i], "lora_b": stacks[len(NAMES) + i]} for i, n in enumerate(NAMES)}


def flatten(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenates the numbers of some tensors."""
    return torch.cat([x.reshape(-1) for x in tensors])


def unflatten(vector: torch.Tensor, like: list[torch.Tensor]) -> list[torch.Tensor]:
    """The inverse of `flatten`, for tensors like `like`."""
    parts = vector.reshape(-1).split([x.numel() for x in like])
    return [part.reshape(x.shape) for part, x in zip(parts, like, strict=True)]


def _linear(weight: np.ndarray) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(torch.tensor(weight))
    return layer.to(layer.weight.dtype)


# Of dattri's conjugate gradients, which have no tolerance: after the solution they divide zero by zero.
DATTRI_STEPS = 30


class Torch:
    """One batch and one vector, with products and solves by torch and the libraries."""

    def __init__(self, base: Mapping[str, Any], adapter: Any, heads: int, batch: Mapping[str, np.ndarray], vector: Any):
        self.model = Twin(base, adapter, heads)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.params = self.model.adapter()
        self.tokens, self.labels = (torch.tensor(batch[name], dtype=torch.int64) for name in ("tokens", "labels"))
        self.vector = to_torch(vector)
        self.flat = flatten(self.vector)
        self.start = flatten(self.params).detach()

    def value(self, params: list[torch.Tensor]) -> torch.Tensor:
        """The mean loss [] of the batch."""
        named = dict(zip(self.names, params, strict=True))
        return loss(functional_call(self.model, named, (self.tokens,)), self.labels)

    def value_of_vector(self, x: torch.Tensor) -> torch.Tensor:
        """The mean loss [] of the batch, for a flattened adapter."""
        return self.value(unflatten(x, self.vector))

    def as_list(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Splits a flat vector into tensors like the adapter's."""
        return unflatten(x.detach(), self.vector)

    # ---- products

    def gradient(self) -> list[torch.Tensor]:
        """A gradient by reverse mode."""
        return list(torch.autograd.grad(loss(self.model(self.tokens), self.labels), self.params))

    def double_backward(self) -> list[torch.Tensor]:
        """A product by reverse mode through reverse mode."""
        slope = torch.autograd.grad(loss(self.model(self.tokens), self.labels), self.params, create_graph=True)
        return list(torch.autograd.grad(slope, self.params, self.vector))

    def forward_over_reverse(self) -> list[torch.Tensor]:
        """A product by forward mode through reverse mode."""
        at = [x.detach() for x in self.params]
        return list(jvp(grad(self.value), (at,), (self.vector,))[1])

    def retained(self):
        """Products by reverse mode through a retained graph."""
        slope = torch.autograd.grad(loss(self.model(self.tokens), self.labels), self.params, create_graph=True)
        return lambda: list(torch.autograd.grad(slope, self.params, self.vector, retain_graph=True))

    def dattri(self, mode: str) -> list[torch.Tensor]:
        """A product by dattri's `hvp`."""
        from dattri.func.hessian import hvp

        return self.as_list(hvp(self.value_of_vector, mode=mode)((self.start,), self.flat))

    def dattri_at_x(self):
        """Products by dattri's `hvp_at_x`, which keeps what does not depend on the vector."""
        from dattri.func.hessian import hvp_at_x

        product = hvp_at_x(self.value_of_vector, (self.start,))
        return lambda: self.as_list(product(self.flat))

    def pydvl(self) -> list[torch.Tensor]:
        """A product by pyDVL's operator."""
        return self.as_list(self._operator().apply(self.flat))

    def pydvl_precomputed(self):
        """Products by pyDVL with a retained graph of the gradient."""
        from pydvl.influence.torch.functional import create_hvp_function

        product = create_hvp_function(self.model, loss, self._loader(), precompute_grad=True)
        return lambda: self.as_list(product(self.flat))

    # ---- solves

    def dattri_cg(self, damping: float):
        """A solve by dattri's conjugate gradients."""
        from dattri.func.hessian import ihvp_at_x_cg

        def run():
            options = {"max_iter": DATTRI_STEPS, "regularization": damping}
            return self.as_list(ihvp_at_x_cg(self.value_of_vector, self.start, **options)(self.flat))

        return run

    def dattri_explicit(self, damping: float):
        """A solve by dattri's dense inverse."""
        from dattri.func.hessian import ihvp_at_x_explicit

        def run():
            return self.as_list(ihvp_at_x_explicit(self.value_of_vector, self.start, regularization=damping)(self.flat))

        return run

    def pydvl_cg(self, damping: float):
        """A solve by pyDVL's conjugate gradients."""
        from pydvl.influence.torch.operator import CgOperator

        def run():
            solver = CgOperator(self._operator(), damping, rtol=RTOL, atol=0.0, maxiter=MOST_STEPS)
            return self.as_list(solver.apply(self.flat))

        return run

    def kronfluence(self, damping: float):
        """A solve with kronfluence's eigenbases and second moments, which are fitted anew every time, through files."""
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments
        from kronfluence.task import Task

        class Tokens(Task):
            def compute_train_loss(self, batch, model, sample=False):
                logits = model(batch[0]).flatten(0, 1)
                labels = batch[1].flatten()
                if sample:
                    with torch.no_grad():
                        labels = torch.multinomial(logits.softmax(-1), 1).flatten()
                return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")

            def compute_measurement(self, batch, model):
                return self.compute_train_loss(batch, model)

        model = prepare_model(self.model, Tokens())
        data = torch.utils.data.TensorDataset(self.tokens, self.labels)
        length = self.tokens.shape[1]

        def run():
            with tempfile.TemporaryDirectory() as directory:
                analyzer = Analyzer("bench", model, Tokens(), cpu=True, output_dir=directory, disable_tqdm=True)
                analyzer.fit_all_factors(
                    "ekfac", data, per_device_batch_size=len(data), factor_args=FactorArguments(strategy="ekfac")
                )
                factors = analyzer.load_all_factors("ekfac")
            solution = []
            for name, b in zip(self.names, self.vector, strict=True):
                name = name.removesuffix(".weight")
                rows, columns = (factors[f"{kind}_eigenvectors"][name] for kind in ("gradient", "activation"))
                # Kronfluence's gradients are of an example's sum; the curvature here is that of the mean over tokens.
                moments = factors["lambda_matrix"][name] / factors["num_lambda_processed"][name] / length
                solution.append(rows @ ((rows.T @ b @ columns) / (moments + damping)) @ columns.T)
            return solution

        return run

    def _loader(self) -> torch.utils.data.DataLoader:
        data = torch.utils.data.TensorDataset(self.tokens, self.labels)
        return torch.utils.data.DataLoader(data, batch_size=len(data))

    def _operator(self):
        from pydvl.influence.torch.operator import HessianOperator

        return HessianOperator(self.model, loss, self._loader())
