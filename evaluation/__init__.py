"""How good few-step pictures are, measured: solvers × step counts × guidance scales on held-out prompts.

    python evaluate.py --config configs/eval_mini_sd.yaml

| module          | what it does                                                                                 |
|-----------------|----------------------------------------------------------------------------------------------|
| `config`        | every knob                                                                                   |
| `solvers`       | the classical solvers on their grids, the learned ones from their folders                    |
| `contenders`    | the rows of the table: a solver, or a distilled network with its own scheduler               |
| `budget`        | what all of it costs, said before it begins                                                  |
| `rendering`     | stock pipeline calls: same noise for all, evaluations counted and shared, time taken         |
| `targets`       | full-step pictures and their features, once, on disk                                         |
| `metrics`       | consistency, Fréchet distance, caption check, ranks                                          |
| `cells`         | one (contender, steps, guidance): measured, kept on disk                                     |
| `bootstrap`     | intervals of means and of paired differences                                                 |
| `workflow`      | preview-and-refine, simulated                                                                |
| `report`        | metrics.json and table.md                                                                    |
| `plots`, `contact_sheet` | what to look at                                                                     |
| `run`           | all of it in order                                                                           |
"""
