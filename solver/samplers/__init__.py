"""Training-free samplers, each a cascade of stock pipeline calls.

| module    | what it does                                                                    |
|-----------|---------------------------------------------------------------------------------|
| `latents` | the one adapter for the latent layouts of all families                          |
| `cascade` | a run cut into segments, each a stock call at its own size and sigmas           |
| `preview` | a small picture that matches the full-size one of the same prompt and seed      |
| `ralu`    | low resolution first, then only the edges, then all: full-size pictures, faster |
| `hiflow`  | larger than the model knows, guided by the run at its own size                  |
"""
