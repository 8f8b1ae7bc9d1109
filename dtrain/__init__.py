"""dtrain: training U-ViT video diffusion transformers, and other DiT-style models, with torchrun and FSDP2.

This module stays light, so that importing one kernel does not pull in the framework.
"""

__version__ = "0.1.0"
