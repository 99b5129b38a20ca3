"""What can be read from a site: linear probes with controls, and the likeness of two sets of representations."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxattn.core.part import part


@part
class Probe:
    """scores = x W + b.

    Attributes:
        weight: [F, C].
        bias: [C].
    """

    weight: Float[Array, "f c"]
    bias: Float[Array, " c"]

    def __call__(self, x: Float[Array, "*n f"]) -> Float[Array, "*n c"]:
        return x @ self.weight + self.bias


def fit_ridge(x: Float[Array, "n f"], y: Float[Array, "n c"], *, penalty: float = 1.0) -> Probe:
    """Returns the probe with the least Σ ‖y − xW − b‖² + penalty ‖W‖²; the bias is not penalised.

    Args:
        x: [n, F].
        y: [n, C].
        penalty: At least 0.
    """
    mean_x, mean_y = x.mean(0), y.mean(0)
    a, b = x - mean_x, y - mean_y
    weight = jnp.linalg.solve(a.T @ a + penalty * jnp.eye(x.shape[-1], dtype=x.dtype), a.T @ b)
    return Probe(weight, mean_y - mean_x @ weight)


def fit_logistic(
    x: Float[Array, "n f"],
    labels: Int[Array, " n"],
    classes: int | None = None,
    *,
    penalty: float = 1.0,
    steps: int = 50,
) -> Probe:
    """Returns the probe with the least −Σ log softmax(xW + b)[label] + penalty/2 ‖W‖², by Newton's method.

    The bias is not penalised. A step that does not lower the loss is halved.

    Args:
        x: [n, F].
        labels: [n], integers from 0.
        classes: C; by default one more than the largest label.
        penalty: Above 0, since the weights of separable classes have no minimum without one.
        steps: The most steps.

    Raises:
        ValueError: `penalty` is not above 0, or a label is none of the classes.
    """
    if not penalty > 0:
        raise ValueError(f"penalty is {penalty}: need a number above 0")
    classes = int(labels.max()) + 1 if classes is None else classes
    if not isinstance(labels, jax.core.Tracer) and not (labels.min() >= 0 and labels.max() < classes):
        raise ValueError(f"labels has numbers from {labels.min()} to {labels.max()}: need some from 0 to {classes - 1}")
    n, features = x.shape
    wide = jnp.concatenate([x, jnp.ones((n, 1), x.dtype)], 1)
    target = jax.nn.one_hot(labels, classes, dtype=x.dtype)
    ridge = jnp.append(jnp.full(features, penalty, x.dtype), 0.0)

    def loss(w: Array) -> Array:
        return -(target * jax.nn.log_softmax(wide @ w)).sum() + (ridge[:, None] * w**2).sum() / 2

    def step(w: Array, _: None) -> tuple[Array, None]:
        p = jax.nn.softmax(wide @ w)
        gradient = wide.T @ (p - target) + ridge[:, None] * w
        inner = jnp.einsum("nc,cd->ncd", p, jnp.eye(classes, dtype=x.dtype)) - p[:, :, None] * p[:, None]
        hessian = jnp.einsum("nf,ncd,ng->fcgd", wide, inner, wide).reshape(w.size, w.size)
        # A common bias of all classes changes nothing, so that the matrix has no inverse without a little more.
        least = max(1e-8, 16 * float(jnp.finfo(x.dtype).eps)) * jnp.trace(hessian) / w.size
        hessian = hessian + jnp.diag(jnp.repeat(ridge, classes) + least)
        direction = jnp.linalg.solve(hessian, gradient.reshape(-1)).reshape(w.shape)
        sizes = 0.5 ** jnp.arange(10)
        losses = jnp.append(jax.vmap(lambda size: loss(w - size * direction))(sizes), loss(w))
        size = jnp.append(sizes, 0.0)[jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses))]
        return w - size * direction, None

    w, _ = jax.lax.scan(step, jnp.zeros((features + 1, classes), x.dtype), length=steps)
    return Probe(w[:-1], w[-1])


def auroc(scores: Float[Array, " n"], labels: Bool[Array, " n"]) -> Float[Array, ""]:
    """Returns the chance that a positive example scores above a negative one, ties counting half; NaN without both.

    Args:
        scores: [n]. With a NaN among them the chance is NaN.
        labels: [n], True for positive examples.
    """
    labels = labels.astype(bool)
    order = jnp.sort(scores)
    below, up_to = jnp.searchsorted(order, scores, side="left"), jnp.searchsorted(order, scores, side="right")
    rank = (below + up_to + 1).astype(float) / 2
    positive = labels.sum()
    negative = labels.size - positive
    # By the mean rank, since the number of pairs does not fit into 32 bits for many examples.
    chance = (jnp.where(labels, rank / jnp.maximum(positive, 1), 0).sum() - (positive + 1) / 2) / negative
    return jnp.where((positive == 0) | (negative == 0) | jnp.isnan(scores).any(), jnp.nan, chance)


class Selectivity(NamedTuple):
    """How well a probe does beside one of random labels.

    Attributes:
        accuracy: The share of held-out examples that are right.
        control: The same where every type has a random label.
        chance: The share of the most frequent class among held-out examples.
    """

    accuracy: Array
    control: Array
    chance: Array


def selectivity(
    x: Float[Array, "n f"],
    labels: Int[Array, " n"],
    types: Int[Array, " n"],
    held_out: Bool[Array, " n"],
    *,
    key: Array,
    penalty: float = 1.0,
) -> Selectivity:
    """Returns the accuracy of a logistic probe, and that of a control task (Hewitt and Liang, 2019).

    The control task gives every type, such as a word, a label drawn at random with the frequencies of the classes: what
    a probe can learn there, it has learnt by heart.

    Args:
        x: [n, F].
        labels: [n].
        types: [n], the type of each example, from 0.
        held_out: [n], which examples are only scored. Split by document, not by token.
        key: The key of the labels of the control task.
        penalty: As of `fit_logistic`.
    """
    classes = int(labels.max()) + 1
    drawn = jax.random.permutation(key, labels)
    of_type = drawn[jnp.arange(int(types.max()) + 1) % len(drawn)][types]
    seen = ~held_out

    def accuracy(wanted: Array) -> Array:
        probe = fit_logistic(x[seen], wanted[seen], classes, penalty=penalty)
        return (probe(x[held_out]).argmax(-1) == wanted[held_out]).mean()

    chance = jnp.bincount(labels[held_out], length=classes).max() / held_out.sum()
    return Selectivity(accuracy(labels), accuracy(of_type), chance)


def cka(x: Float[Array, "n f"], y: Float[Array, "n g"], *, unbiased: bool = True) -> Float[Array, ""]:
    """Returns the centred kernel alignment of two representations of the same examples (Kornblith et al., 2019).

    CKA = HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) with linear kernels K = xxᵀ and L = yyᵀ. It is 1 for y = c x Q with Q
    orthogonal and c > 0. The unbiased HSIC (Song et al., 2012; Nguyen et al., 2021) is 0 on average for independent
    ones; the biased one grows with F/n.

    Args:
        x: [n, F], with n above 3 if unbiased.
        y: [n, G].
        unbiased: Whether HSIC is the unbiased estimate.

    Raises:
        ValueError: There are not as many examples in both, or too few.
    """
    if len(x) != len(y) or (unbiased and len(x) < 4):
        raise ValueError(f"x has {len(x)} examples and y {len(y)}: need as many, and at least 4")
    x, y = x - x.mean(0), y - y.mean(0)  # which changes neither estimate, but its rounding where means are large
    ours, theirs = x @ x.T, y @ y.T
    between = hsic(ours, theirs, unbiased=unbiased)
    return between / jnp.sqrt(hsic(ours, ours, unbiased=unbiased) * hsic(theirs, theirs, unbiased=unbiased))


def hsic(ours: Float[Array, "n n"], theirs: Float[Array, "n n"], *, unbiased: bool = True) -> Float[Array, ""]:
    """Returns the Hilbert-Schmidt independence criterion of two kernels. Over batches, add these up before dividing.

    Args:
        ours: K, [n, n].
        theirs: L, [n, n].
        unbiased: tr(K̃L̃) + 1ᵀK̃1 1ᵀL̃1 / ((n−1)(n−2)) − 2/(n−2) 1ᵀK̃L̃1, over n(n−3), where K̃ is K without its diagonal;
            else tr(HKHL) / (n−1)².
    """
    n = len(ours)
    if not unbiased:
        centred = ours - ours.mean(0) - ours.mean(1)[:, None] + ours.mean()
        return (centred * theirs).sum() / (n - 1) ** 2
    ours, theirs = (x * (1 - jnp.eye(n, dtype=x.dtype)) for x in (ours, theirs))
    cross = (ours @ theirs).sum() * 2 / (n - 2)
    return ((ours * theirs).sum() + ours.sum() * theirs.sum() / ((n - 1) * (n - 2)) - cross) / (n * (n - 3))
