"""Prompts, and pictures, to pictures."""

from raymuse.pipeline.folder import SETTINGS, Settings, load_superres, load_uvit, model_sha256, save_network
from raymuse.pipeline.pipeline import Drawn, Options, Picture, Pipeline, image_seed
from raymuse.pipeline.sampler import Course, Draws, sample_ids
from raymuse.pipeline.tasks import UNKNOWN, Request

__all__ = [
    "SETTINGS",
    "UNKNOWN",
    "Course",
    "Drawn",
    "Draws",
    "Options",
    "Picture",
    "Pipeline",
    "Request",
    "Settings",
    "image_seed",
    "load_superres",
    "load_uvit",
    "model_sha256",
    "sample_ids",
    "save_network",
]
