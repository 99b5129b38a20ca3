"""A published model with its tokenizer: texts and messages to tokens, and tokens to text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxattn.models.pretrained.tokenizer import bytes_of

VISIBLE = str.maketrans({" ": "␣", "▁": "␣", "\n": "⏎", "\t": "⇥"})


@dataclass
class Pretrained:
    """What `load_pretrained` returns.

    Attributes:
        model: The model, in evaluation mode.
        tokenizer: The tokenizer (a `tokenizers.Tokenizer`), or None if there is none.
        config: The numbers of config.json, as they were published.
        chat_template: The Jinja template that turns messages into a prompt, as text, or None if there is none.
    """

    model: Any
    tokenizer: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None

    @property
    def end_token(self) -> int | None:
        """The token that ends a text or an answer, the first of them where the config has several; None without one."""
        ends = self.config.get("eos_token_id")
        return ends[0] if isinstance(ends, list) else ends

    def encode(self, text: str, *, special: bool = True) -> Int[np.ndarray, " t"]:
        """Returns the tokens of a text.

        Args:
            text: The text. Names of special tokens in it become these tokens.
            special: Whether the special tokens are added that the tokenizer puts around a text, such as [CLS].

        Raises:
            ValueError: There is no tokenizer, or a token is not in the vocabulary of the model.
        """
        return self._known(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Any) -> str:
        """Returns the text of tokens [T], without special ones.

        Raises:
            ValueError: There is no tokenizer, or a token is not in the vocabulary.
        """
        return self._tokenizer.decode(self._known(ids).tolist(), skip_special_tokens=True)

    def token_strings(self, ids: Any) -> list[str]:
        """Returns one readable string per token [T]: a space is ␣, a line end ⏎, a byte that is no character \\xe2.

        Raises:
            ValueError: There is no tokenizer, or a token is not in the vocabulary.
        """
        tokens = [self._tokenizer.id_to_token(number) for number in self._known(ids).tolist()]
        if type(self._tokenizer.decoder).__name__ == "ByteLevel":
            tokens = [bytes_of(token).decode("utf-8", "backslashreplace") for token in tokens]
        return [token.translate(VISIBLE) for token in tokens]

    def chat(self, messages: Sequence[Mapping[str, Any]], *, answer: bool = True) -> Int[np.ndarray, " t"]:
        """Returns the tokens of a conversation, in the form that the model was trained on.

        Needs jinja2. The template runs in a sandbox.

        Args:
            messages: For each message its "role", such as "user", and its "content".
            answer: Whether the prompt ends where the answer of the model begins.

        Raises:
            ValueError: There is no chat template, a message lacks a role or content, or the template refuses them.
        """
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self.chat_template is None:
            raise ValueError("chat needs a chat template, which the files of this model do not have: need encode(text)")
        for place, message in enumerate(messages):
            if not {"role", "content"} <= set(message):
                raise ValueError(f"messages[{place}] has {sorted(message)}: need 'role' and 'content'")

        def refused(reason: str) -> None:
            raise TemplateError(reason)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = refused
        names = {f"{name}_token": self._special(f"{name}_token_id") for name in ("bos", "eos")}
        try:
            text = environment.from_string(self.chat_template).render(
                messages=messages, add_generation_prompt=answer, **names
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error
        return self.encode(text, special=False)

    @property
    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError("there is no tokenizer: the files of this model have no vocabulary that is understood")
        return self.tokenizer

    def _special(self, name: str) -> str:
        """Returns the special token whose number stands in the config under a name, or nothing."""
        number = self.config.get(name)
        number = number[0] if isinstance(number, list) else number
        return "" if number is None else self._tokenizer.id_to_token(number)

    def _known(self, ids: Any) -> Int[np.ndarray, " t"]:
        """Returns tokens as an array, all of them in the vocabularies of tokenizer and model."""
        ids = np.asarray(ids)
        ids = ids if ids.size else ids.astype(np.int32)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"ids has shape {ids.shape} and dtype {ids.dtype}: need whole numbers [T]")
        vocabulary = getattr(self.model, "decoder", self.model).config.vocabulary
        for place, number in enumerate(ids.tolist()):
            if not 0 <= number < vocabulary or self._tokenizer.id_to_token(number) is None:
                raise ValueError(
                    f"token {number} at place {place} is not in the vocabulary: need 0 to {vocabulary - 1}, "
                    f"of which the tokenizer knows {self._tokenizer.get_vocab_size()}"
                )
        return ids.astype(np.int32)
