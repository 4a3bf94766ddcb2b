"""A small picture that matches the large one later: same prompt, same seed, a fraction of the compute.

    previews = [preview(pipe, "a lighthouse at dusk", seed) for seed in range(8)]
    picture = refine(pipe, previews[2].checkpoint)   # the full-size run goes on where it was left

The first steps run at full size, where the layout forms; then the latent is made smaller, and the rest runs small, for
some steps corrected towards what the network saw at full size (commutator-zero guidance). Rectified-flow models only.

| module       | what it does                                                                    |
|--------------|---------------------------------------------------------------------------------|
| `options`    | the knobs, and the plan: phases, evaluations, sigmas                             |
| `phases`     | the full-size steps, the choice of an operator, the small steps                  |
| `selection`  | which elements of the latent a small picture keeps                               |
| `guidance`   | the correction                                                                   |
| `sampler`    | `preview` and `refine`                                                           |
| `checkpoint` | where a full-size run was left, in two files                                     |
| `positions`  | ids of the small tokens that they had at full size                               |
| `explain`    | the plan of a published model and its FLOPs, without weights                     |
| `operators`  | the same guidance for other operators: translate and warp the picture mid-run    |

Source: arXiv 2604.09227, of which there is no public code. Its method is `"subsample"`; `"mean"`, the default, is
ours.
"""

from solver.samplers.preview.checkpoint import Checkpoint
from solver.samplers.preview.options import PreviewOptions
from solver.samplers.preview.sampler import Preview, preview, refine

__all__ = ["Checkpoint", "Preview", "PreviewOptions", "preview", "refine"]
