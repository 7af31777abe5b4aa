"""As in the product, nothing here is differentiated, which small operations take a tenth less time without."""

import pytest
import torch

OVER_TOY_MODELS = ("test_enumeration", "test_distribution")


@pytest.fixture(autouse=True)
def without_gradients(request: pytest.FixtureRequest):
    """Forward passes of the product's own models see to it themselves."""
    with torch.inference_mode(request.path.stem in OVER_TOY_MODELS):
        yield
