"""The engine: pictures and text on one model, behind commands and events (docs/design.md).

local.py drives it in one process, bagel_dit.workers in a service. scheduler.py makes step plans; engine.py carries out
commands; diffusion.py takes the steps of pictures on the canvases of sampler.py; vae_worker.py decodes them;
single_stage.py serves whole requests with text_scheduler.py, which computes contexts (context.py) and text (text.py).
"""
