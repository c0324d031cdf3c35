"""Models to write and read: every tensor of them random, so that one in another's place is seen."""

import pytest
import torch
from shoestring.train.model.decoder import CausalLM, materialise


@pytest.fixture(scope="session")
def build():
    """`build(m)`: a model on the CPU with random weights, norms and selection biases; the same at each call. A softmax router has none."""

    def build(m) -> CausalLM:
        with torch.device("meta"):
            model = CausalLM(m)
        materialise(model.stage, seed=0)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, tensor in [*model.stage.named_parameters(), *model.stage.named_buffers()]:
                if tensor.dim() == 1:
                    tensor.normal_(0.0, 0.1, generator=generator).add_(0.0 if name.endswith("bias") else 1.0)
                    if name.endswith("bias") and m.score_func == "softmax":
                        tensor.zero_()
        return model

    return build
