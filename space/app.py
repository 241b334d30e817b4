"""The Space: the page of `weightport app`, for strangers."""

import os

from weightport.app.server import serve

serve("0.0.0.0", int(os.environ.get("GRADIO_SERVER_PORT", "7860")))
