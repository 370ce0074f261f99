"""What families with a sampled memory share and no forward pass of evaluation shows."""

import pytest
import torch

from tests.tiny import tiny_model


@pytest.mark.parametrize("family", ["rt_detr", "rt_detr_v2", "d_fine", "deimv2"])
def test_classes_that_are_kept_keep_their_denoising_queries(family):
    """Last the row of queries that only fill up a batch: their group sees them."""
    model = tiny_model(1, family)
    rows = model.model.denoising_class_embed.weight.detach().clone()
    assert rows.any(1).all()
    model.keep_classes(torch.tensor([2, 0]), ["triangle", "circle"])
    embedding = model.model.denoising_class_embed
    assert torch.equal(embedding.weight, rows[[2, 0, 3]])
    assert (embedding.num_embeddings, embedding.padding_idx) == (3, 2)
