"""The light table: preview, pick, refine, in a browser. `app.py` starts it.

| module   | what it does                                                              |
|----------|---------------------------------------------------------------------------|
| `form`   | what a visitor typed, as recipes, or a sentence about the field            |
| `table`  | the model on its device: estimates, pictures one by one, refinements       |
| `visit`  | what one visitor has made: the sheet, the history, the files               |
| `runs`   | a sheet, refinements, a comparison: each yields after every picture        |
| `wording`| the sentences and tables of the page                                       |
| `looks`  | style, colours, and the script that runs in the browser                    |
| `components` | what is on the page, in order (gradio)                                 |
| `page`   | the page (gradio), which only wires the others together                    |

All but the last three work without gradio, and without a browser.
"""
