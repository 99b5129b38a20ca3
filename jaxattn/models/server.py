"""Continuous batching: requests join and leave a decoding step of fixed size while others go on."""

import dataclasses
from collections import deque
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Key

from jaxattn.cache import Policy
from jaxattn.core.checks import check_int
from jaxattn.models.sample import check_draws, checked_key, checked_prompts, in_evaluation, likely
from jaxattn.models.state import replaced
from jaxattn.models.transformer import Transformer

SMALLEST = 16  # tokens to which a shorter prompt is padded; longer ones to the next power of two


class Finished(NamedTuple):
    """A request that has ended.

    Attributes:
        tokens: [M], the new tokens, the end token included.
        reason: Why it ended: "end" at its end token, "length" at `max_new_tokens`, or "failed" where the logits of the
            model were NaN, or left no token to draw.
    """

    tokens: Int[np.ndarray, " m"]
    reason: Literal["end", "length", "failed"]


@dataclasses.dataclass
class _Request:
    number: int
    prompt: np.ndarray
    max_new_tokens: int
    key: Key[Array, ""]
    temperature: float
    top_k: int
    top_p: float
    end_token: int
    tokens: list[int] = dataclasses.field(default_factory=list)

    @property
    def reason(self) -> Literal["end", "length", "failed"] | None:
        """Why the request has ended; None while it goes on."""
        if self.tokens[-1] < 0:
            return "failed"
        if self.tokens[-1] == self.end_token:
            return "end"
        return "length" if len(self.tokens) >= self.max_new_tokens else None


class Server:
    """Continues many prompts at once, each as `generate` alone would (Orca, Yu et al., 2022).

        server = models.Server(model, slots=8, capacity=512)
        first = server.submit(prompt, max_new_tokens=64, temperature=0.0)
        while server.step():
            for number, finished in server.results().items():
                ...

    The server has a fixed number of rows, and one compiled step that draws a token for each. A request takes a row as
    soon as one is free, and leaves it when it ends, while the other rows go on. Prompts are padded to powers of two, so
    that there are few programs to compile. All mixers and stores are served.

    Args:
        model: The decoder.
        slots: The number of rows, at least 1.
        capacity: The most tokens of a request, its prompt included; by default the length of the model.
        store: The policy by which attention keeps and reads earlier tokens.

    Raises:
        ValueError: A size is out of range, or the model is not causal or reads a context.
        TypeError: A size is no int.
    """

    def __init__(self, model: Transformer, *, slots: int = 8, capacity: int | None = None, store: Policy | None = None):
        room = model.config.length
        capacity = room if capacity is None else capacity
        for name, given, most in (("slots", slots, None), ("capacity", capacity, room)):
            check_int(name, given)
            if given < 1 or (most is not None and given > most):
                raise ValueError(f"{name} is {given}: need at least 1" + (f", and at most {most}" if most else ""))
        if not model.config.causal or model.crosses:
            what = "is not causal" if not model.config.causal else "reads a context"
            raise ValueError(f"model {what}: need a decoder that continues a text by itself")
        self.capacity = capacity
        self._model = model
        self._graph, self._arrays = nnx.split(in_evaluation(model))
        self._state = _empty(self._graph, int(capacity), self._arrays, store, int(slots))
        of_a_row = None if store is None else dataclasses.replace(store, storage=store.storage.of_a_row())
        self._empty = partial(_empty, self._graph, int(capacity), self._arrays, of_a_row, 1)
        self._rows: list[_Request | None] = [None] * int(slots)
        self._waiting: deque[_Request] = deque()
        self._finished: dict[int, Finished] = {}
        self._submitted = 0
        # What the step reads of the request of each row. Rows without one are at position −1.
        self._of_rows = {
            "tokens": np.zeros(slots, np.int32),
            "positions": np.full(slots, -1, np.int32),
            "counts": np.zeros(slots, np.int32),
            "temperature": np.zeros(slots, np.float32),
            "top_k": np.full(slots, model.config.vocabulary, np.int32),
            "top_p": np.ones(slots, np.float32),
        }
        self._keys = jax.random.split(jax.random.key(0), slots)

    def submit(
        self,
        prompt: Int[Any, " p"],
        *,
        max_new_tokens: int,
        key: Key[Array, ""] | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        end_token: int | None = None,
    ) -> int:
        """Takes a request, and returns its number. It waits for a free row.

        Args:
            prompt: [P], tokens.
            max_new_tokens: The most tokens to draw.
            key: As of `generate`, a new-style key.
            temperature: As of `generate`.
            top_k: As of `generate`.
            top_p: As of `generate`.
            end_token: As of `generate`.

        Raises:
            ValueError: As of `generate`, or the prompt and its new tokens exceed the capacity. Other requests go on.
            TypeError: As of `generate`.
        """
        if np.ndim(prompt) != 1:
            raise ValueError(f"prompt has shape {np.shape(prompt)}: need tokens [length], one request at a time")
        prompts, _ = checked_prompts(self._model, np.asarray(prompt)[None], None, max_new_tokens)
        vocabulary = self._model.config.vocabulary
        check_draws(temperature, top_k, top_p, end_token, vocabulary)
        key = checked_key(key, temperature)
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        length = prompts.shape[1]
        if length + max_new_tokens > self.capacity:
            raise ValueError(
                f"prompt has {length} tokens and max_new_tokens is {max_new_tokens}: need at most {self.capacity} "
                "together, the capacity"
            )
        number, self._submitted = self._submitted, self._submitted + 1
        top_k, top_p = vocabulary if top_k is None else min(top_k, vocabulary), 1.0 if top_p is None else top_p
        end_token = -2 if end_token is None else end_token  # which no token is, also not the −1 of none
        settings = float(temperature), int(top_k), float(top_p), int(end_token)
        self._waiting.append(_Request(number, np.asarray(prompts[0]), int(max_new_tokens), key, *settings))
        return number

    def step(self) -> bool:
        """Gives free rows to waiting requests, and draws one token for every row.

        Returns:
            Whether there are requests that have not ended.
        """
        for row, held in enumerate(self._rows):
            while held is None and self._waiting:
                held = self._admitted(row, self._waiting.popleft())
        if any(self._rows):
            drawn, self._state = _advanced(self._graph, self._arrays, self._state, self._keys, self._of_rows)
            for row, (request, token) in enumerate(zip(self._rows, np.asarray(drawn).tolist(), strict=True)):
                if request is not None:
                    self._took(row, request, token)
        return any(self._rows) or bool(self._waiting)

    def results(self) -> dict[int, Finished]:
        """Returns the requests that have ended since the last time, by number, and forgets them."""
        finished, self._finished = self._finished, {}
        return finished

    def _admitted(self, row: int, request: _Request) -> _Request | None:
        """Reads a prompt into a row, and draws its first token; returns the request if it goes on."""
        length = len(request.prompt)
        size = min(max(SMALLEST, 1 << (length - 1).bit_length()), self.capacity)
        prompt = np.zeros(size, np.int32)
        prompt[:length] = request.prompt
        settings = request.temperature, request.top_k, request.top_p
        token, self._state = _admitted(
            self._graph, self._arrays, self._state, self._empty(), row, prompt, length, request.key, settings
        )
        self._rows[row] = request
        self._keys = self._keys.at[row].set(request.key)
        self._of_rows["positions"][row] = length - 1
        for name, value in zip(("temperature", "top_k", "top_p"), settings, strict=True):
            self._of_rows[name][row] = value
        self._took(row, request, int(token))
        return self._rows[row]

    def _took(self, row: int, request: _Request, token: int) -> None:
        """Notes the token that a request drew, and frees its row if that was the last."""
        request.tokens.append(token)
        reason = request.reason
        of = self._of_rows
        if reason is None:
            of["tokens"][row], of["counts"][row] = token, len(request.tokens)
            of["positions"][row] += 1
            return
        drawn = request.tokens if reason != "failed" else request.tokens[:-1]
        self._finished[request.number] = Finished(np.array(drawn, np.int32), reason)
        self._rows[row] = None
        of["positions"][row] = -1
        self._state = _freed(self._state, self._empty(), row)


@partial(jax.jit, static_argnums=(0, 1, 4))
def _empty(graph, capacity, arrays, store, rows):
    """Returns the state of rows that have read nothing."""
    kept_by = {} if store is None else {"store": store}
    return nnx.merge(graph, arrays).init_state(rows, capacity, **kept_by)


@partial(jax.jit, donate_argnums=0)
def _freed(state, empty, row):
    return replaced(state, jnp.reshape(row, 1), empty)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _admitted(graph, arrays, state, empty, row, prompt, length, key, settings):
    """Returns (the first token, the state with the prompt in this row)."""
    places = jnp.arange(len(prompt))
    positions = jnp.where(places < length, places, -1)[None]
    model = nnx.merge(graph, arrays)
    logits, one, _ = model(prompt[None], positions=positions, state=empty, logits_at=jnp.reshape(length - 1, (1, 1)))
    token = _drawn(logits[:, 0], key[None], jnp.zeros(1, jnp.int32), *(jnp.asarray(x)[None] for x in settings))
    return token[0], replaced(state, jnp.reshape(row, 1), one)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advanced(graph, arrays, state, keys, of_rows):
    """Returns (the next token of each row, the state)."""
    tokens, positions = of_rows["tokens"][:, None], of_rows["positions"][:, None]
    logits, state, _ = nnx.merge(graph, arrays)(tokens, positions=positions, state=state)
    settings = (of_rows[name] for name in ("temperature", "top_k", "top_p"))
    return _drawn(logits[:, 0], keys, of_rows["counts"], *settings), state


def _drawn(logits, keys, counts, temperature, top_k, top_p):
    """Returns a token of each row, under settings of its own; −1 where none can be drawn."""
    # Sorting a large vocabulary takes long: only where a row asks for it.
    all_of_them = ((top_k >= logits.shape[-1]) & (top_p >= 1)).all()
    kept = jax.lax.cond(
        all_of_them,
        lambda: jax.vmap(likely)(logits, temperature),
        lambda: jax.vmap(likely)(logits, temperature, top_k, top_p),
    )
    drawn = jax.vmap(lambda key, count, kept: jax.random.categorical(jax.random.fold_in(key, count), kept))(
        keys, counts, kept
    )
    return jnp.where(kept.max(-1) == -jnp.inf, -1, drawn).astype(jnp.int32)
