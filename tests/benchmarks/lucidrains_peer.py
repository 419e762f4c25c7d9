"""lucidrains' MaskGit in its own environment: `python lucidrains_peer.py SHAPE`, a JSON object.

Says its parameters, then draws once for every line on its standard input and answers with the seconds that it took.

What is changed from outside, and why: its T5 would be downloaded, and its tokenizer calls what transformers 5 no longer
has, so the text states are handed in as random numbers of the same shape, at no cost to it; and the VQGAN's decoder,
which is another network than ours, is left out: what is timed is text states to ids. torchvision: see
torchvision_python.py.
"""

import json
import sys
import time

import torch
from torchvision_python import import_torchvision

import_torchvision()

import muse_maskgit_pytorch.muse_maskgit_pytorch as muse  # noqa: E402
from muse_maskgit_pytorch import MaskGit, MaskGitTransformer, VQGanVAE  # noqa: E402
from transformers import T5Config  # noqa: E402


def build(shape: dict) -> tuple[MaskGit, list[torch.Tensor]]:
    """The model, and a list that gets the ids of what is drawn."""
    muse.get_encoded_dim.__globals__["T5_CONFIGS"]["none"] = {"config": T5Config(d_model=shape["text_width"])}
    vae = VQGanVAE(dim=16, codebook_size=shape["codes"], use_vgg_and_gan=False)
    transformer = MaskGitTransformer(
        num_tokens=shape["codes"], dim=shape["width"], seq_len=shape["side"] ** 2, depth=shape["layers"],
        dim_head=shape["width"] // shape["heads"], heads=shape["heads"], ff_mult=shape["mlp"], t5_name="none",
    )  # fmt: skip
    transformer.encode_text = lambda texts: torch.randn(len(texts), shape["text_length"], shape["text_width"])
    model, drawn = MaskGit(vae=vae, transformer=transformer, image_size=shape["side"] * 16), []
    model.vae.decode_from_ids = drawn.append
    return model, drawn


def main(shape: dict) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(shape["threads"])
    muse.tqdm = lambda steps, **_: steps
    model, drawn = build(shape)
    used = [p for name, p in model.transformer.named_parameters() if not name.startswith("self_cond_to_init_embed")]
    print(json.dumps({"parameters": sum(p.numel() for p in used)}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter(), time.process_time()
        model.generate(
            ["a picture"] * shape["batch"], timesteps=shape["steps"], cond_scale=shape["guidance"],
            fmap_size=shape["side"],
        )  # fmt: skip
        took = {"seconds": time.perf_counter() - began[0], "processor": time.process_time() - began[1]}
        assert drawn[-1].shape == (shape["batch"], shape["side"], shape["side"])
        assert int(drawn.pop().max()) < shape["codes"]
        print(json.dumps(took), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
