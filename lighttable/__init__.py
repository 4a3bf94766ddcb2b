"""The light table: preview, pick, refine, in a browser. `app.py` starts it.

| module   | what it does                                                              |
|----------|---------------------------------------------------------------------------|
| `form`   | what a visitor typed, as recipes, or a sentence about the field            |
| `table`  | the model on its device: estimates, pictures one by one, refinements       |
| `visit`  | what one visitor has made: the sheet, the history, the files               |
| `runs`   | a sheet, refinements, a comparison: each yields after every picture        |
| `wording`| the sentences and tables of the page                                       |
| `page`   | the page (gradio), which only wires the others together                    |

All but `page` work without gradio, and without a browser.
"""
