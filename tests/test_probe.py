"""What the probe refuses in modules that no model type of transformers has in this form."""

import pytest
import torch

from cpmpi.errors import UserError
from cpmpi.model.probe import probe
from tests.test_transformers_private import skeleton


class Mixer(torch.nn.Module):
    """A feed-forward part that also looks at the tokens before, by a convolution."""

    def __init__(self, inner, convolution):
        super().__init__()
        self.inner, self.convolution = inner, convolution

    def forward(self, hidden_1CH):
        padded_1HC = torch.nn.functional.pad(hidden_1CH.transpose(1, 2), (2, 0))
        if isinstance(self.convolution, torch.nn.Conv2d):
            mixed_1HC = self.convolution(padded_1HC[:, :, None])[:, :, 0]
        else:
            mixed_1HC = self.convolution(padded_1HC)
        return self.inner(mixed_1HC.transpose(1, 2))


@pytest.mark.parametrize(
    "convolution",
    [
        lambda: torch.nn.Conv1d(32, 32, 3, groups=32, device="meta"),
        lambda: torch.nn.Conv1d(32, 32, 3, device="meta"),
        lambda: torch.nn.Conv2d(32, 32, (1, 3), device="meta"),
    ],
)
def test_a_convolution_over_tokens_is_refused(convolution):
    model = skeleton("llama")
    probe(model)
    layer = model.model.layers[1]
    layer.mlp = Mixer(layer.mlp, convolution())
    with pytest.raises(
        UserError, match=r"^LlamaForCausalLM mixes tokens by a convolution or a state-space layer, not by"
    ):
        probe(model)
