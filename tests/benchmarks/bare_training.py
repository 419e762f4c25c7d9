"""A bare PyTorch loop over token shards: `python bare_training.py CONFIG` (a BaseConfig as JSON).

The same network, batches, optimizer and loss as `raymuse train`, in thirty lines of one process: no Ray, no DeepSpeed,
no metrics, no checkpoints, no data order that survives a restart. Its batches are made before the clock starts, so that
all of our loader counts on our side.
"""

import sys
from itertools import count

import numpy as np
import torch
from torch.nn import functional as F

from raymuse.config.training import BaseConfig
from raymuse.training.optimizers import build_optimizer
from raymuse.training.start import first_network
from raymuse.training.tokens import TokenStream

MADE = 200  # batches; then they come again


def main(config: BaseConfig) -> None:
    stream = TokenStream(config, "cpu")
    network = first_network(config, stream).train()
    size, ones = config.batch_size, np.ones(config.batch_size, np.float32)
    mask_id = network.config.mask_id
    batches = [stream.batch(np.arange(first, first + size), ones, mask_id) for first in range(0, MADE * size, size)]
    optimizer = build_optimizer(network, config.optimizer)
    for step in count():
        batch = batches[step % MADE]
        condition = network.condition(batch["states"], batch["pooled"], batch["micro"])
        logits = network.head(network.features(batch["ids"], condition)[batch["mask"]])
        loss = F.cross_entropy(logits, batch["targets"][batch["mask"]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.optimizer.clip_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(f"step {step + 1} loss {loss.item():.6f}", flush=True)


if __name__ == "__main__":
    main(BaseConfig.model_validate_json(sys.argv[1]))
