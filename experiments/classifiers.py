"""Small classifiers that experiments look into: what shape is in an image, and whether brackets are balanced.

Both read their answer at a first token that stands for the whole. `Shapes` has a shortcut, the colour of the
background, that is right as often as one says.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from jaxattn import icl, models, nn
from jaxattn.core.checks import check_probability, check_static_int
from jaxattn.core.part import part
from jaxattn.train import next_token_loss


def classified(model: models.Transformer, prompt: icl.Prompt) -> tuple[Array, dict[str, Array]]:
    """The loss of a class for each input, as `decoders.train` takes it."""
    targets = {"targets": prompt.y, "weights": prompt.weights}
    total, sums = next_token_loss(model(prompt.x)[0][:, None], targets)
    return total, {name: sums[name] for name in ("weight", "correct")}


def encoder(
    *, vocabulary: int, length: int, width: int, layers: int, heads: int, seed: int, classes: int = 2
) -> models.Transformer:
    """An encoder whose first token has the answer."""
    return models.Transformer(
        models.TransformerConfig(
            vocabulary,
            length,
            width,
            _layers(width, layers, heads),
            causal=False,
            positions=models.Spec(nn.PositionEmbedding),
            head=models.Spec(nn.Pooler, classes=classes),
        ),
        rngs=nnx.Rngs(seed),
    )


def vision(
    *, side: int, patch: int, width: int, layers: int, heads: int, seed: int, classes: int = 2
) -> models.Transformer:
    """A vision transformer of side x side patches."""
    return models.Transformer(
        models.TransformerConfig(
            classes,
            side**2 + 1,
            width,
            _layers(width, layers, heads),
            causal=False,
            embed=models.Spec(nn.PatchEmbedding, patch=(patch, patch), size=(side * patch, side * patch)),
            positions=models.Spec(nn.PositionEmbedding),
            head=models.Spec(nn.Pooler, classes=classes),
        ),
        rngs=nnx.Rngs(seed),
    )


def _layers(width: int, layers: int, heads: int) -> list[Any]:
    attention = models.Spec(nn.MultiHeadAttention, heads=heads, position=None)
    block = models.Spec(nn.FeedForward, hidden=2 * width, activation="gelu_tanh", gated=False)
    return [models.pre_norm(attention, block)] * layers


@part
class Shapes:
    """Images with a shape at a random place, on a background whose colour goes with the class.

    The shape is a square of stripes of a random colour, two patches high and wide, on the grid of patches; the stripes
    of class 0 lie and those of class 1 stand. The background is bluish for class 0 and reddish for class 1 with
    probability b, else the other way round; ½ says nothing. There is noise everywhere. `hidden` of a prompt is a pair:
    [B, side, side], the patches of the shape, and [B], the class that the background would suggest.

    Attributes:
        background: b, in 0..1.
        side: The number of patches of a side, at least 2.
        patch: Pixels of a side of a patch, at least 2.
        noise: The deviation of the noise; colours are from 0 to 1.
    """

    background: float = 0.5
    side: int = 8
    patch: int = 4
    noise: float = 0.3

    def __post_init__(self):
        check_probability("Shapes: background", self.background)
        for name in ("side", "patch"):
            check_static_int("Shapes", name, getattr(self, name), 2)

    @property
    def length(self) -> int:
        """The number of tokens, the class token among them."""
        return self.side**2 + 1

    @property
    def forms(self) -> Bool[np.ndarray, "2 n n"]:
        """The pixels of both shapes."""
        lying = np.tile(np.arange(2 * self.patch)[:, None] % 2 == 0, (1, 2 * self.patch))
        return np.stack([lying, lying.T])

    def sample(self, key: PRNGKeyArray, batch: int) -> icl.Prompt:
        """Returns images [B, H, W, 3] with one answer each."""
        for_class, for_tint, for_place, for_colour, for_noise = jax.random.split(key, 5)
        label = jax.random.randint(for_class, (batch,), 0, 2)
        follows = jax.random.uniform(for_tint, (batch,)) < self.background
        suggested = jnp.where(follows, label, 1 - label)
        place = jax.random.randint(for_place, (batch, 2), 0, self.side - 1)
        colour = 0.5 + 0.5 * jax.random.uniform(for_colour, (batch, 3))
        pixels = self.side * self.patch
        tint = jnp.array([[0.1, 0.1, 0.4], [0.4, 0.1, 0.1]])[suggested]
        image = jnp.broadcast_to(tint[:, None, None], (batch, pixels, pixels, 3))

        def drawn(image: Array, form: Array, place: Array, colour: Array) -> Array:
            canvas = jnp.zeros((pixels, pixels), bool)
            on = jax.lax.dynamic_update_slice(canvas, form, tuple(place * self.patch))
            return jnp.where(on[..., None], colour, image)

        image = jax.vmap(drawn)(image, jnp.asarray(self.forms)[label], place, colour)
        image = image + self.noise * jax.random.normal(for_noise, image.shape)
        grid = jnp.arange(self.side)
        inside = (grid >= place[:, :, None]) & (grid < place[:, :, None] + 2)  # [B, 2, side]
        mask = inside[:, 0, :, None] & inside[:, 1, None]
        answer = label[:, None]
        return icl.Prompt(image, answer, jnp.ones((batch, 1)), answer, (mask, suggested))


@part
class Brackets:
    """Brackets of k kinds behind a first token: are they balanced?

    Half of the rows are balanced. In the others two unequal brackets of a balanced row have changed places; a row that
    is still balanced then counts as such. Tokens 0 .. k − 1 open, k .. 2k − 1 close them, 2k is the first token.
    `hidden` is [B, T]: where the partner of each bracket stands in the balanced row that was drawn first, −1 for the
    first token.

    Attributes:
        kinds: k, at least 1.
        length: T, the number of tokens, odd.
    """

    kinds: int
    length: int

    def __post_init__(self):
        check_static_int("Brackets", "kinds", self.kinds, 1)
        check_static_int("Brackets", "length", self.length, 3)
        if self.length % 2 == 0:
            raise ValueError(f"Brackets: length is {self.length}: need an odd one, of a first token and pairs")

    @property
    def vocabulary(self) -> int:
        """The number of different tokens."""
        return 2 * self.kinds + 1

    def sample(self, key: PRNGKeyArray, batch: int) -> icl.Prompt:
        """Returns rows of tokens with one answer each: 1 for balanced ones."""
        keys = jax.random.split(key, batch)
        tokens, partner, balanced = jax.vmap(self._row)(keys)
        answer = balanced.astype(int)[:, None]
        return icl.Prompt(tokens, answer, jnp.ones((batch, 1)), answer, partner)

    def _row(self, key: PRNGKeyArray) -> tuple[Array, Array, Array]:
        for_steps, for_kinds, for_swap, for_half = jax.random.split(key, 4)
        count = self.length - 1
        coins = jax.random.uniform(for_steps, (count,))
        kinds = jax.random.randint(for_kinds, (count,), 0, self.kinds)

        def step(state: tuple[Array, Array], drawn: tuple[Array, Array, Array]) -> Any:
            stack, depth = state
            place, coin, kind = drawn
            opens = (depth == 0) | ((coin < 0.5) & (depth < count - place))
            top = stack[depth - 1]
            stack = jnp.where(opens, stack.at[depth].set(place), stack)
            token = jnp.where(opens, kind, self.kinds + kinds[top])
            return (stack, jnp.where(opens, depth + 1, depth - 1)), (token, jnp.where(opens, -1, top))

        places = jnp.arange(count)
        start = jnp.zeros(count, int), jnp.zeros((), int)
        _, (row, opened) = jax.lax.scan(step, start, (places, coins, kinds))
        partner = jnp.where(opened >= 0, opened, 0)
        partner = jnp.where(opened >= 0, partner, jnp.argmax(opened == places[:, None], 1))
        differ = row[:, None] != row
        i, j = jnp.divmod(jax.random.choice(for_swap, count**2, p=differ.ravel() / differ.sum()), count)
        swapped = row.at[i].set(row[j]).at[j].set(row[i])
        row = jnp.where(jax.random.bernoulli(for_half), swapped, row)
        tokens = jnp.concatenate([jnp.full(1, 2 * self.kinds), row])
        return tokens, jnp.concatenate([jnp.full(1, -1), partner + 1]), self.balanced(row)

    def balanced(self, row: Int[Array, " n"]) -> Bool[Array, ""]:
        """Returns whether brackets, without the first token, are balanced."""
        count = row.shape[0]

        def step(state: tuple[Array, Array, Array], token: Array) -> Any:
            stack, depth, fine = state
            opens = token < self.kinds
            closes_top = (depth > 0) & (stack[depth - 1] == token - self.kinds)
            stack = jnp.where(opens, stack.at[depth].set(token), stack)
            return (stack, jnp.where(opens, depth + 1, depth - 1), fine & (opens | closes_top)), None

        start = jnp.zeros(count, int), jnp.zeros((), int), jnp.ones((), bool)
        (_, depth, fine), _ = jax.lax.scan(step, start, row)
        return fine & (depth == 0)
