"""The DiT: draws pictures from K/V that it pulls, or, as a single stage, serves whole requests.

How one picture passes, file by file:

1. server.py         `Generate` checks the message (picture_request.py, where it draws from contexts); a single stage
                     reads the request's images in a pool of processes
2. bagel/kv/         the puller makes room in the store and fetches the pages that are not there yet
3. server.py         the request waits for its place (bagel/rpc/admission.py) while pages arrive
4. page_loader.py    tells the ranks of each page as it becomes ready, which copy it into the slab
5. runner_client.py  gives commands and step plans (bagel/engine/scheduler.py) to the ranks, and passes events back
6. workers/          process.py starts the ranks; rank.py loads the model and runs the engine
7. bagel/engine/     engine.py carries out the commands: diffusion.py takes the steps, vae_worker.py decodes
8. server.py         makes messages of the events, and releases the K/V and the place at the end
"""
