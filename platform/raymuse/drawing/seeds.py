"""What tells a run's pictures apart: their keys, and their seeds."""

import hashlib


def picture_key(prompt: int, sample: int) -> str:
    """The key of one picture of a run, from its place."""
    return f"{prompt:09d}-{sample}"


def image_seed(run_seed: int, prompt: int, sample: int) -> int:
    """The seed of one picture of a run, from the run's seed and its place: 63 bits."""
    digest = hashlib.blake2b(f"{run_seed}/{prompt}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def sample_seed(run_seed: int, prompt: int, sample: int, own: int | None) -> int:
    """The same, but the prompt's `own` for its first picture, from which those of the others then follow."""
    if own is None:
        return image_seed(run_seed, prompt, sample)
    return own if sample == 0 else image_seed(own, 0, sample)
