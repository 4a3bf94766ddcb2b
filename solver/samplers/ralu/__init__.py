"""RALU: mixed-resolution acceleration of diffusion transformers, training-free.

| module             | what it does                                                                   |
|--------------------|--------------------------------------------------------------------------------|
| `schedule`         | three stages: where each starts and ends, its sigmas, NT-matching, the presets |
| `plan`             | tokens, steps, sigmas and FLOPs of a run, before it is paid                    |
| `noise`            | copies of latents, and the noise that makes them look like a plain run         |
| `edges`            | which cells of the small picture deserve the full resolution early             |
| `mixed_resolution` | large and small tokens in one sequence, as hooks on a stock transformer        |
| `prompts`          | a call's arguments for several calls: prompts encoded once, rows of a batch    |
| `sampler`          | the three stages as stock pipeline calls                                       |
| `rivals`           | what RALU is compared with                                                     |

Source: "Training-free Mixed-Resolution Latent Upsampling for Spatially Accelerated Diffusion Transformers", arXiv
2507.08422.
"""
