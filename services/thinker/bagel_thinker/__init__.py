"""The Thinker: reads prompts, writes text, and gives out the K/V that pictures are drawn from.

How one request passes, file by file:

1. server.py        `BuildContext` takes the message of one context; a pool of processes reads its images
2. head_start.py    lets the engine encode an image to edit as soon as the VAE can take it
   server.py        `_chain` plans it: the segments of the prompt, each with its digest (bagel/engine/segments.py)
3. server.py        a text waits for its place in the batch (bagel/rpc/admission.py)
4. bagel/kv/        the store reserves room under a lease if K/V will be pulled; the first event names the context
5. engine.py        `submit` gives the reading to the engine, which runs in a thread of its own
6. torch_engine.py  or vllm/engine.py: computes the segments, stores each layer's K/V, writes the text
7. post.py          brings what the engine says to the event loop; server.py makes events of it
8. bagel/kv/        serves the K/V to a DiT that pulls (bagel/kv/service.py), while they are still being computed
"""
