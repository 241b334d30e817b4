"""A page in the browser for what the commands do; only its modules that draw it import Gradio.

`tasks` are the work, which a `worker` does in a process of its own; `jobs` runs such processes, one
heavy one at a time; `sessions` keep what each visitor brought apart; `gate` says what a browser may
ask for at all; `page` and `tabs` are what people see.
"""
