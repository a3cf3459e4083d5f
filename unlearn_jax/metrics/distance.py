"""Distances of two adapters as changes of the weights.

A and B of a low-rank change B A are defined up to (M^-1 A, B M), so they are never compared themselves. Neither is B A
formed: B of all adapters together has at most k r directions, and so has A. In orthonormal bases of these each change is a
matrix [k r, k r], and norms and inner products of those are the ones of the changes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

Adapter = Any
Scales = float | Mapping[str, float]


class _Factor(NamedTuple):
    """The factor that a leaf is, by its path."""

    module: str  # the path without the factor's name and what follows
    key: str  # that two factors of one change share
    first: bool  # A


def compress(
    adapters: Sequence[Adapter], *, a: str | None = "lora_a", b: str | None = "lora_b", scales: Scales = 1.0
) -> list[np.ndarray]:
    """One float64 vector for each adapter, in which lengths and angles are those of the change of the weights.

    Args:
      adapters: pytrees with the same paths. Two leaves whose paths differ in one part alone, which ends in `a` in the one and
        in `b` in the other (parts are separated by dots, too, and upper case does not matter), are the factors of a change
        B A: A [..., r, in] and B [..., out, r], or transposed, [..., in, r] and [..., r, out] (leading axes: stacked layers;
        the smaller of the sizes that could be r is). So are pixel_jax's own names, PEFT's (`...q_proj.lora_A.weight`,
        `...lora_A.default.weight`) and those of a state of flax NNX. Every other leaf counts as it is.
      a: name of the first factor; None for adapters that are not factored: then every leaf counts as it is.
      b: name of the second one, or None.
      scales: what a module's change is multiplied by, alpha / r: one number, or by the path of the module ("...q_proj"), if
        ranks or scales differ.

    Raises:
      ValueError: adapters of different paths; no factors in any of them; a leaf that looks like a factor (`lora` in its path)
        and has no partner; factors that do not multiply; modules and scales that do not match.
    """
    flat = [_by_path(adapter) for adapter in adapters]
    for other in flat[1:]:
        if other.keys() != flat[0].keys():
            raise ValueError(f"adapters differ in their leaves: {sorted(other.keys() ^ flat[0].keys())}")
    factors = {} if a is None or b is None else {path: _factor(path, a, b) for path in flat[0]}
    pairs: dict[str, dict[bool, str]] = {}
    for path, factor in factors.items():
        if factor is not None:
            pairs.setdefault(factor.key, {})[factor.first] = path
        elif "lora" in path.lower():
            raise ValueError(
                f"{path} belongs to an adapter and is neither {a!r} nor {b!r}: it cannot be measured as B A"
            )
    if a is not None and b is not None and not pairs:
        raise ValueError(
            f"no leaf is called {a!r} or {b!r}; there are {', '.join(sorted(flat[0]))}: name the factors by a= and b=, or give "
            f"a=None, b=None if they are no factors"
        )
    scale = _scales(scales, {factor.module for factor in factors.values() if factor is not None})
    vectors = [[] for _ in adapters]
    for path in flat[0]:
        factor = factors.get(path)
        if factor is None:
            parts = [leaves[path] for leaves in flat]
        elif len(pairs[factor.key]) < 2:
            raise ValueError(f"{path} {flat[0][path].shape} has no partner among {', '.join(sorted(flat[0]))}")
        elif factor.first:
            partner = pairs[factor.key][False]
            parts = _cores([(leaves[path], leaves[partner]) for leaves in flat], path, partner)
            parts = [scale[factor.module] * part for part in parts]
        else:
            continue  # `b` goes with its `a`
        for vector, part in zip(vectors, parts, strict=True):
            vector.append(np.ravel(part))
    return [np.concatenate(vector) for vector in vectors]


def delta_w_distance(adapter: Adapter, other: Adapter, **options: Any) -> float:
    """Frobenius norm of the difference of two adapters' changes; options as those of `compress`."""
    one, two = compress([adapter, other], **options)
    return float(np.linalg.norm(one - two))


def delta_w_cosine(adapter: Adapter, other: Adapter, origin: Adapter, **options: Any) -> float:
    """Cosine between the moves from `origin` to two adapters, such as an edited and a retrained one; NaN if one stays."""
    one, two, start = compress([adapter, other, origin], **options)
    one, two = one - start, two - start
    lengths = np.linalg.norm(one) * np.linalg.norm(two)
    return float(one @ two / lengths) if lengths else float("nan")


def _cores(pairs, path, partner):
    pairs = [_oriented(a, b, path, partner) for a, b in pairs]
    left, _ = np.linalg.qr(np.concatenate([b for _, b in pairs], axis=-1))  # [..., out, k r]
    right, _ = np.linalg.qr(np.concatenate([np.swapaxes(a, -1, -2) for a, _ in pairs], axis=-1))  # [..., in, k r]
    return [(np.swapaxes(left, -1, -2) @ b) @ (a @ right) for a, b in pairs]


def _oriented(a, b, path, partner):
    """A [..., r, in] and B [..., out, r], whichever way round they lie."""
    ranks = []
    if a.ndim >= 2 and b.ndim >= 2 and a.shape[:-2] == b.shape[:-2]:
        ranks = [(a.shape[i], i) for i, j in ((-2, -1), (-1, -2)) if a.shape[i] == b.shape[j]]
    if not ranks:
        raise ValueError(f"{path} {a.shape} and {partner} {b.shape} do not multiply")
    turned = min(ranks, key=lambda rank: rank[0])[1] == -1
    return (np.swapaxes(a, -1, -2), np.swapaxes(b, -1, -2)) if turned else (a, b)


def _scales(scales: Scales, modules: set[str]) -> Mapping[str, float]:
    if not isinstance(scales, Mapping):
        return dict.fromkeys(modules, float(scales))
    if differ := sorted(modules ^ set(scales)):
        raise ValueError(f"scales are of other modules than the adapter's: {', '.join(differ)} in only one of them")
    return scales


def _by_path(adapter):
    leaves, _ = jax.tree.flatten_with_path(adapter)
    return {".".join(map(_name, path)): np.asarray(leaf, np.float64) for path, leaf in leaves}


def _name(key):
    for field in ("key", "name", "idx"):
        if hasattr(key, field):
            return str(getattr(key, field))
    return str(key)


def _factor(path: str, a: str, b: str) -> _Factor | None:
    """None: the leaf is no factor. PEFT calls those of an embedding lora_embedding_A and lora_embedding_B."""
    parts = path.split(".")
    for i in range(len(parts) - 1, -1, -1):
        word = parts[i].lower().replace("lora_embedding_", "lora_")
        for name in (a, b):
            if word.endswith(name.lower()):
                before = word.removesuffix(name.lower())
                return _Factor(
                    ".".join([*parts[:i], *[before] * bool(before)]),
                    ".".join([*parts[:i], before, *parts[i + 1 :]]),
                    name == a,
                )
    return None
