"""The gateway: validates requests, sends them through the stages of the deployed pipeline, and streams events back.

How one request passes, file by file:

1. server.py    `GatewayService.Generate` takes its message, which receiving.py has let in; rest/ makes the same message
2. serving.py   `Requests.serve` puts the work behind an outbox (outbox.py), so that a slow reader holds no place
3. serving.py   `_run_all` waits for a place of the gateway's own (bagel/rpc/admission.py), and goes on with 4 and 5
4. planning.py  `read_request`: the message becomes a valid `Request`; images.py reads the headers of its images
5. backends.py  `Backends.begin` chooses the services, least busy first, and so the model that is asked
6. planning.py  `plan`: the request with final sizes, and the stages of its pipeline that it goes through
7. routes/      `route_of` picks the way: whole.py, text.py or staged.py; each makes its stages' messages from the plan
8. uploads.py   puts prompt and images into a message when it is sent; routes/calls.py reads the answers
9. routes/      base.py passes each event on as it comes, `accepted` first, and adds up the timings at the end
10. the stages  go on from there: bagel_thinker/server.py and bagel_dit/server.py
"""
