"""Texts need not end where a page ends: every decoder makes stores of whole pages."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ATTENTION, FEED, decoder, tokens

from jaxattn import models
from jaxattn.cache import Paged, Policy, Quantised, Quest
from jaxattn.models import pre_norm

ALL_IN_PAGES = {
    "pages that are chosen": Policy(select=Quest(3, 5)),
    "pages of a pool": Policy(storage=Paged(4)),
    "groups of 16 bits": Policy(storage=Quantised(16, 4, 8)),
    "chosen pages of a pool": Policy(select=Quest(9, 2), storage=Paged(3)),
}
PROMPTS = tokens(2, 4, seed=3)


@pytest.fixture(scope="module")
def model():
    return decoder((pre_norm(ATTENTION, FEED),))


@pytest.mark.parametrize("name", ALL_IN_PAGES)
def test_every_decoder_writes_under_pages_what_it_writes_under_none(model, name):
    """11 tokens, which no size of a page above divides; all pages are read, so the text is that of the whole cache.

    A pool of pages has room for the beams and for the chains of a tree, which share what they have in common.
    """
    policy, options = ALL_IN_PAGES[name], {"max_new_tokens": 7, "temperature": 0.0}
    plain = models.generate(model, PROMPTS, **options).tokens
    np.testing.assert_array_equal(models.generate(model, PROMPTS, store=policy, **options).tokens, plain)
    for ahead in (2, (2, 2)):
        drafted = models.speculate(model, None, PROMPTS, draft_store=policy, ahead=ahead, **options).tokens
        np.testing.assert_array_equal(drafted, plain)
    beams = [models.beam_search(model, PROMPTS, beams=2, max_new_tokens=7, store=s).tokens for s in (None, policy)]
    np.testing.assert_array_equal(*beams)
    server = models.Server(model, slots=2, capacity=11, store=policy)
    for row in PROMPTS:
        server.submit(row, **options)
    finished = {}
    while server.step():
        finished |= server.results()
    finished |= server.results()
    for row in range(2):
        np.testing.assert_array_equal(finished[row].tokens, plain[row])


def test_a_text_that_ends_within_a_page_loses_nothing_where_all_is_read(model):
    found = models.compare_stores(model, tokens(2, 11), {"none": Policy(), **ALL_IN_PAGES}, prompt=4)
    for name, each in found.items():
        assert each.loss == pytest.approx(found["none"].loss, rel=1e-3), name  # 16 bits round by 2^-17 of a range
        assert each.lost.max() < 1e-3
    lost = models.lost_mass(model, tokens(2, 11), Policy(select=Quest(3, 5)), prompt=4)
    assert jnp.isfinite(lost).all()
